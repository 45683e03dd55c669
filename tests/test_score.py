"""Criteria give the values of the papers, by hand and by plain loops; sums are exact; both ways agree."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_kernels import accumulate, confidence, score
from test_trace import BOTH, outputs, trace

from edgemoe.errors import TraceError
from edgemoe.score import CRITERIA, GRID, Accumulator, Criterion, coverage
from edgemoe.trace import ExpertOutputs, RoutedTokens, RouterTrace, top_k

# Three tokens, four experts, one layer. The k_a = 2 largest, and their local p = 1 / (1 + exp(-difference)):
#   x0:  s0 = 3, s1 = 1    p = 0.880797, 0.119203
#   x1:  s1 = 2, s0 = 1    p = 0.731059, 0.268941
#   x2:  s2 = -1, s3 = -2  p = 0.731059, 0.268941
# Mean of the largest p: r = (0.880797 + 0.731059 + 0.731059) / 3 = 0.780971, which x0's expert 0 alone reaches.
HAND = [[3, 1, 0, -1], [1, 2, -3, -4], [-5, -6, -1, -2]]


def tokens(logits: list[list[float]], k_a: int) -> RoutedTokens:
    """One layer's tokens, without numba."""
    return top_k(RouterTrace((0,), np.array([logits], np.float32)), k_a, compiled=False)


def recorded(n_layer: int = 3, n_token: int = 40, n_expert: int = 16, k: int = 4, seed: int = 0) -> RoutedTokens:
    """Random tokens with expert outputs."""
    seen = trace(n_layer, n_token, n_expert, seed)
    gave = outputs(n_layer, n_token, n_expert, k, seed)
    return top_k(RouterTrace(seen.layers, seen.logits * 3, gave), k, compiled=False)


def cut(whole: RoutedTokens, a: int, b: int) -> RoutedTokens:
    """The tokens from a to b."""
    gave = whole.outputs
    part = gave and ExpertOutputs(*(getattr(gave, f.name)[:, a:b] for f in fields(ExpertOutputs)))
    return replace(whole, ids=whole.ids[:, a:b], logits=whole.logits[:, a:b], outputs=part)


def assert_same(a: Accumulator, b: Accumulator) -> None:
    """Bit for bit."""
    assert (a.criterion, a.layers, a.n_token) == (b.criterion, b.layers, b.n_token)
    np.testing.assert_array_equal(a.sums, b.sums)
    np.testing.assert_array_equal(a.routed, b.routed)


SIGMOID = {s: 1 / (1 + math.exp(-s)) for s in (-1, -2)}  # 0.268941, 0.119203
P = (0.8807970779778823, 0.7310585786300049)


@BOTH
@pytest.mark.parametrize(
    ("criterion", "sums"),
    [
        # x0 alone passes r: 3.
        (CRITERIA["peu"], [3, 0, 0, 0]),
        # All pass: 3 + 1 (x0, x1), 1 + 2 (x0, x1), sigmoid(-1), sigmoid(-2); each is larger than its s.
        (Criterion(f="max-sigmoid"), [4, 3, SIGMOID[-1], SIGMOID[-2]]),
        # r = 0.15 drops x0's expert 1 (p = 0.119): 3 + 1, 2, -1, -2.
        (CRITERIA["tcess"], [4, 2, -1, -2]),
        # r = 0.5 leaves each token's first.
        (Criterion(r=0.5, f="identity"), [3, 2, -1, 0]),
        (CRITERIA["act-logits"], [4, 3, -1, -2]),
        (CRITERIA["frequency"], [2, 2, 1, 1]),
        # x0's and x1's p of experts 0 and 1; x2's of 2 and 3.
        (CRITERIA["soft-count"], [P[0] + 1 - P[1], 1 - P[0] + P[1], P[1], 1 - P[1]]),
    ],
    ids=str,
)
def test_hand_made_case(criterion: Criterion, sums: list[float], compiled: bool) -> None:
    found = score([tokens(HAND, 2)], criterion, compiled=compiled)
    np.testing.assert_allclose(found.sums, [sums], atol=3 * GRID)
    np.testing.assert_array_equal(found.routed, [[2, 2, 1, 1]])
    # All three tokens divide, not only those that chose the expert.
    np.testing.assert_array_equal(found.scores(), found.sums / 3)


@BOTH
def test_adaptive_r_is_the_mean_of_the_largest_local_probability(compiled: bool) -> None:
    found = confidence([tokens(HAND, 2)], compiled=compiled).threshold()
    np.testing.assert_allclose(found, [(P[0] + 2 * P[1]) / 3], atol=GRID)
    whole = recorded()
    s = whole.logits[:, :, :3].astype(np.float64)
    expected = (np.exp(s) / np.exp(s).sum(axis=2, keepdims=True)).max(axis=2).mean(axis=1)
    np.testing.assert_allclose(confidence([whole], 3, compiled=compiled).threshold(), expected, atol=GRID)


@BOTH
def test_a_token_as_sure_as_the_mean_passes(compiled: bool) -> None:
    for n_token in (1, 7):
        found = score([tokens([[0.3, 0.1, -2.0]] * n_token, 3)], CRITERIA["peu"], compiled=compiled)
        assert found.sums[0, 0] > 0 and found.sums[0, 1] == 0


@BOTH
def test_one_expert_without_threshold_is_the_first_version_of_the_paper(compiled: bool) -> None:
    logits = trace(3, 50, 8).logits
    first = np.where(np.arange(8) == logits.argmax(axis=2)[:, :, None], logits, 0)
    whole = top_k(RouterTrace((0, 1, 2), logits), 4, compiled=compiled)
    found = score([whole], Criterion(k_a=1, f="identity"), compiled=compiled)
    np.testing.assert_allclose(found.scores(), first.mean(axis=1, dtype=np.float64), atol=GRID)


@BOTH
def test_a_chosen_expert_with_negative_logits_ranks_above_one_never_chosen(compiled: bool) -> None:
    # Expert 2 is never among the two largest, but its 0 is more than the others' -1 - 2 (p = 0.73 and 0.27, all pass).
    # PEU gives those sigmoid(-1) = 0.27, p = 0.73 being r. That is why PEU is the default.
    text = [tokens([[-1, -2, -3], [-2, -1, -4]], 2)]
    tcess = score(text, CRITERIA["tcess"], compiled=compiled).scores()[0]
    peu = score(text, CRITERIA["peu"], compiled=compiled).scores()[0]
    assert tcess.tolist() == [-1.5, -1.5, 0]
    np.testing.assert_allclose(peu, [SIGMOID[-1] / 2, SIGMOID[-1] / 2, 0], atol=GRID)


def loop(whole: RoutedTokens, layer: int, name: str) -> list[float]:
    """The criteria of expert outputs as plain loops over their papers' formulas."""
    gave = whole.outputs
    assert gave
    totals = [0.0] * whole.n_expert
    counts = [0] * whole.n_expert
    for x in range(whole.n_token):
        chosen = [j for j in range(gave.ids.shape[2]) if gave.ids[layer, x, j] >= 0]
        all_g = sum(float(gave.weights[layer, x, j]) for j in chosen)
        for j in chosen:
            i = int(gave.ids[layer, x, j])
            g, norm = float(gave.weights[layer, x, j]), float(gave.norms[layer, x, j])
            change = float(gave.change[layer, x])
            counts[i] += 1
            totals[i] += {
                "task": g * norm,
                "task2": (g * norm) ** 2,
                "ean": norm,
                "reap": g / all_g * norm,
                "man": norm,
                "msan": norm**2,
                "easy-ep": 0.0 if math.isnan(change) else g * norm * change,
            }[name]
    if name in ("reap", "man", "msan"):
        return [total / max(count, 1) for total, count in zip(totals, counts, strict=True)]
    return [total / whole.n_token for total in totals]


@BOTH
@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if criterion.needs_outputs])
def test_criteria_of_expert_outputs_equal_a_plain_loop(name: str, compiled: bool) -> None:
    whole = recorded(n_expert=24)
    assert whole.outputs
    whole.outputs.ids[1, :, 3] = -1  # a layer that chooses three
    whole.outputs.weights[1, :, 3] = np.nan
    whole.outputs.ids[2, :, :][whole.outputs.ids[2] == 7] = 8  # an expert never chosen
    whole.outputs.change[0, ::3] = np.nan
    found = score([whole], CRITERIA[name], compiled=compiled).scores()
    for layer in range(3):
        np.testing.assert_allclose(found[layer], loop(whole, layer, name), atol=GRID)
    assert found[2, 7] == 0


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(CRITERIA)),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    seed=st.integers(0, 99),
    compiled=st.booleans(),
)
def test_any_split_adds_up_to_the_same_bits(name: str, cuts: list[int], seed: int, compiled: bool) -> None:
    whole = recorded(n_token=30, seed=seed)
    edges = sorted([0, *cuts, 30])
    parts = [cut(whole, a, b) for a, b in pairwise(edges)]
    first, *others = [confidence([part], compiled=compiled) for part in parts]
    for other in others:
        first = other.merge(first)
    np.testing.assert_array_equal(first.sums, confidence([whole], compiled=compiled).sums)
    r = first.threshold()

    criterion = CRITERIA[name]
    total, *rest = [accumulate([part], criterion, r, compiled=compiled) for part in parts]
    for other in rest:
        total = other.merge(total)
    at_once = score([whole], criterion, compiled=compiled)
    assert_same(total, at_once)
    assert_same(score(parts, criterion, compiled=compiled), at_once)
    np.testing.assert_array_equal(total.scores(), at_once.scores())


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(CRITERIA)), seed=st.integers(0, 99), scale=st.sampled_from([0.01, 1, 30, 1e4]))
def test_numba_and_numpy_agree_within_a_grid_step_per_contribution(name: str, seed: int, scale: float) -> None:
    whole = recorded(seed=seed)
    whole = replace(whole, logits=whole.logits * np.float32(scale))
    compiled, plain = (score([whole], CRITERIA[name], compiled=c) for c in (True, False))
    np.testing.assert_array_equal(compiled.routed, plain.routed)
    assert np.all(np.abs(compiled.sums - plain.sums) <= compiled.routed * GRID)


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recorded(n_layer=7, n_token=200)
    found = []
    for n_threads in (1, 2, 5, 16):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=n_threads: set(range(n)))
        found.append([score([whole], criterion) for criterion in CRITERIA.values()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same(a, b)


def test_a_generalist_keeps_each_task_s_own_threshold() -> None:
    # PreMoe v3 eq. 11: sums over both tasks, each with its own r, divided by all tokens of both.
    one, two = recorded(n_token=10, seed=1), recorded(n_token=30, seed=2)
    a, b = score([one], CRITERIA["peu"]), score([two], CRITERIA["peu"])
    merged = a.merge(b)
    np.testing.assert_allclose(merged.scores(), (a.scores() * 10 + b.scores() * 30) / 40, rtol=1e-12)
    assert_same(merged, b.merge(a))


def test_texts_that_do_not_fit() -> None:
    peu = CRITERIA["peu"]
    for other in (recorded(n_layer=2), recorded(n_expert=17), replace(recorded(), layers=(4, 5, 6))):
        with pytest.raises(TraceError, match="cannot be added"):
            accumulate([recorded(), other], CRITERIA["frequency"])
    with pytest.raises(TraceError, match="different models"):
        score([recorded(), recorded(n_layer=2)], peu)
    with pytest.raises(TraceError, match="criterion"):
        score([recorded()], peu).merge(score([recorded()], CRITERIA["frequency"]))
    with pytest.raises(TraceError, match="expert outputs"):
        score([replace(recorded(), outputs=None)], CRITERIA["reap"])
    with pytest.raises(TraceError, match="k_a is 5 but 4 logits"):
        score([recorded()], Criterion(k_a=5))
    with pytest.raises(TraceError, match="each of 3 layers"):
        accumulate([recorded()], peu)
    with pytest.raises(TraceError, match="each of 3 layers"):
        accumulate([recorded()], peu, np.ones(2))
    unknown = recorded()
    assert unknown.outputs
    unknown.outputs.change[1] = np.nan
    with pytest.raises(TraceError, match="layer 2 changes its input"):
        score([unknown], CRITERIA["easy-ep"])
    settings: list[dict[str, Any]] = [{"r": "adaptive"}, {"f": "identity"}, {"k_a": 1}]
    for setting in settings:
        with pytest.raises(ValueError, match="knows no r, f or k_a"):
            Criterion(alpha=1, **setting)


@pytest.mark.parametrize("name", list(CRITERIA))
def test_no_text_is_an_error_and_no_tokens_add_nothing(name: str) -> None:
    with pytest.raises(TraceError, match="no routed tokens"):
        score([], CRITERIA[name])
    nothing = recorded(n_token=0)
    with pytest.raises(TraceError, match="no tokens"):
        score([nothing], CRITERIA[name]).scores()
    assert_same(score([nothing, recorded(), nothing], CRITERIA[name]), score([recorded()], CRITERIA[name]))


def test_a_generator_is_read_once_or_refused() -> None:
    def texts() -> Iterator[RoutedTokens]:
        yield recorded()

    assert_same(score(texts(), CRITERIA["reap"]), score([recorded()], CRITERIA["reap"]))
    with pytest.raises(TraceError):
        score(texts(), CRITERIA["peu"])


def test_coverage() -> None:
    mass = np.array([[1, 5, 2, 2], [0, 0, 0, 0], [0, 0, 7, 0]])
    for n, expected in ((0, [0, 0, 0]), (1, [0.5, 0.25, 1]), (2, [0.7, 0.5, 1]), (4, [1, 1, 1])):
        np.testing.assert_allclose(coverage(mass, n), expected)
        np.testing.assert_allclose(coverage(mass / 3, n), expected)
    with pytest.raises(TraceError, match="choose 0 to 4"):
        coverage(mass, 5)
    with pytest.raises(TraceError, match="not negative"):
        coverage(mass - 1, 2)


def test_numba_is_imported_by_those_who_use_it_only() -> None:
    code = "import sys, edgemoe.score, edgemoe.weight_scores; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
