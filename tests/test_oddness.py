"""Thresholds by length and means by task, on numbers whose quantiles are known."""

import numpy as np
import pytest

from edgemoe.oddness import FALSE_REJECTIONS, Oddness, _student_quantile


def pieces(n: int, n_tokens: float, mean: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n] and two features [n, 2] of pieces of one length."""
    features = np.random.default_rng(seed).normal(mean, (1.0, 5.0), (n, 2))
    return np.full(n, n_tokens), features


def learned(*groups: tuple[np.ndarray, np.ndarray], n_tasks: int = 1, nearest: np.ndarray | None = None) -> Oddness:
    tokens, features = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    return Oddness.of(tokens, np.zeros(len(tokens), np.intp) if nearest is None else nearest, features, n_tasks)


def rejected(usual: Oddness, features: np.ndarray, n_tokens: int, nearest: int = 0) -> float:
    judged = [usual.judge(row, nearest, n_tokens) for row in features]
    return float(np.mean([oddness > threshold for oddness, threshold in judged]))


STUDENT = {1: 6.3138, 2: 2.9200, 3: 2.3534, 4: 2.1318, 5: 2.0150, 10: 1.8125, 18: 1.7341}  # 95 %, from tables


@pytest.mark.parametrize(("freedom", "quantile"), STUDENT.items())
def test_student_s_quantile_is_that_of_the_tables(freedom, quantile):
    assert _student_quantile(freedom) == pytest.approx(quantile, rel=0.003)


@pytest.mark.parametrize("n", [3, 12, 60, 1000])
def test_new_pieces_are_rejected_as_often_as_promised(n):
    rates = [
        rejected(learned(pieces(n, 512, seed=seed)), pieces(200, 512, seed=1000 + seed)[1], 512) for seed in range(60)
    ]
    assert np.mean(rates) == pytest.approx(FALSE_REJECTIONS, abs=0.03 if n > 3 else 0.12)


def test_features_count_in_their_own_standard_deviations():
    usual = learned(pieces(4000, 512))
    assert usual.deviation[0] == pytest.approx([1.0, 5.0], rel=0.05)
    start = usual.judge(np.zeros(2), 0, 512)[0]
    assert usual.judge(np.array([3.0, 0.0]), 0, 512)[0] - start == pytest.approx(3, rel=0.05)
    assert usual.judge(np.array([0.0, 15.0]), 0, 512)[0] - start == pytest.approx(3, rel=0.05)


def test_each_length_has_its_threshold_and_those_between_lie_between():
    usual = learned(pieces(200, 32, 8.0), pieces(200, 512, 0.0))
    assert np.exp(usual.log_tokens) == pytest.approx([32, 512])
    point = np.array([8.0, 8.0])
    oddness = [usual.judge(point, 0, n_tokens)[0] for n_tokens in (8, 32, 128, 512, 4096)]
    assert oddness[0] == pytest.approx(oddness[1]) and oddness[3] == pytest.approx(oddness[4])
    assert oddness[1] < oddness[2] < oddness[3]
    assert oddness[1] == pytest.approx(0, abs=0.3)
    assert oddness[2] == pytest.approx((oddness[1] + oddness[3]) / 2, rel=0.1)
    assert usual.shortest == 32


def test_a_uniform_task_does_not_swallow_what_a_diverse_one_would_take():
    # Documents of task 0 lie close to its mean, those of task 1 far from theirs.
    tokens, near = pieces(1000, 512, 0.0)
    _, far = pieces(1000, 512, 6.0)
    nearest = np.repeat([0, 1], 1000)
    usual = learned((tokens, near), (tokens, far), n_tasks=2, nearest=nearest)
    between = np.array([4.0, 4.0])
    assert rejected(usual, between[None], 512, nearest=0) == 1
    assert rejected(usual, between[None], 512, nearest=1) == 0
    assert usual.deviation[0, 0] == pytest.approx(1.15, abs=0.15)  # not the distance between the tasks


def test_a_task_with_no_pieces_is_like_all_and_one_with_few_nearly():
    tokens, features = pieces(60, 512)
    few = np.full((1, 2), 22.0)
    usual = learned((tokens, features), (tokens[:1], few), n_tasks=3, nearest=np.append(np.zeros(60, np.intp), 1))
    overall = np.concatenate([features, few]).mean(0)
    assert usual.mean[0, 2] == pytest.approx(overall)
    assert usual.mean[0, 1] == pytest.approx((100 * overall + 22.0) / 101)


def test_few_pieces_of_a_length_join_their_neighbours():
    usual = learned(pieces(30, 32), pieces(3, 128, seed=1), pieces(30, 512, seed=2))
    assert len(usual.log_tokens) == 2
    assert len(learned(pieces(4, 32), pieces(5, 512)).log_tokens) == 1


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_is_rejected_where_nothing_is_known(n):
    usual = learned(pieces(n, 512))
    assert usual.judge(np.full(2, 1e9), 0, 512) == (0.0, np.inf)


def test_only_the_features_that_were_learned_are_judged():
    tokens, features = pieces(50, 512)
    usual = learned((tokens, features[:, 1:]))
    assert usual.judge(np.array([1e9, 2.0]), 0, 512) == usual.judge(np.array([2.0]), 0, 512)
