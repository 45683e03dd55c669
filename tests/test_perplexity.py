"""Measured figures against a plain computation on llama.cpp's own logits."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from plain_llama import plain_llama
from tiny_models import write_tiny_model

from edgemoe import perplexity
from edgemoe.backend import Llama
from edgemoe.errors import BackendError
from edgemoe.expert_set import ExpertLayers, ExpertSet, everything
from edgemoe.perplexity import Figures, measure, measuring_bytes

RAM = "1GiB"
N_CTX = 64
Doubles = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perplexity") / "tiny.gguf"
    write_tiny_model(path, "qwen3moe")
    return path


def windows(n_vocab: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, n_vocab, length).tolist() for length in lengths]


def opened(path: Path) -> Llama:
    return Llama(str(path), ram=RAM, n_ctx=N_CTX, n_threads=1, n_threads_batch=1, logits_all=True)


def few_of(layers: ExpertLayers, seed: int = 0) -> ExpertSet:
    rng = np.random.default_rng(seed)
    kept = tuple(tuple(sorted(rng.permutation(layers.n_expert)[: k + 1].tolist())) for k in layers.n_expert_used)
    return ExpertSet(layers.numbers, layers.n_expert, max(layers.n_expert_used), kept)


def evaluated(llama: Llama, tokens: list[int]) -> npt.NDArray[np.float32]:
    llama.reset()
    llama.eval(tokens)
    return llama.scores[: len(tokens)].copy()


def log_softmax(logits: npt.NDArray[np.float32]) -> Doubles:
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    return np.asarray(exact - np.log(np.exp(exact).sum(axis=1, keepdims=True)))


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_figures_are_those_of_plain_numpy(model: Path, rows_at_once: int) -> None:
    with opened(model) as llama:
        chosen = few_of(ExpertLayers.of(llama.index))
        text = windows(llama.n_vocab(), 20, 33)
        with mock.patch.object(perplexity, "_CHUNK", rows_at_once * llama.n_vocab()):
            (found,) = measure(llama, text, [chosen])
        llama.residency.limit(chosen)
        limited = [log_softmax(evaluated(llama, window[:-1])) for window in text]
    plain = plain_llama(model, n_ctx=N_CTX, n_threads=1, n_threads_batch=1, logits_all=True)
    full = [log_softmax(evaluated(plain, window[:-1])) for window in text]
    plain.close()

    nll, full_nll, kl, agreed = [], [], [], []
    for window, p, q in zip(text, full, limited, strict=True):
        rows, targets = np.arange(len(window) - 1), np.array(window[1:])
        nll.append(-q[rows, targets].sum())
        full_nll.append(-p[rows, targets].sum())
        kl.append((np.exp(p) * (p - q)).sum())
        agreed.append((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    np.testing.assert_allclose(found.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(found.full_nll, full_nll, rtol=1e-5)
    np.testing.assert_allclose(found.divergence, kl, rtol=1e-4)
    assert found.agreed.tolist() == agreed
    assert found.tokens.tolist() == [19, 32]
    assert found.perplexity == pytest.approx(np.exp(sum(nll) / 51), rel=1e-5)
    assert found.full_perplexity == pytest.approx(np.exp(sum(full_nll) / 51), rel=1e-5)
    assert found.perplexity_change == pytest.approx(found.perplexity / found.full_perplexity - 1, rel=1e-6)
    assert found.kl == pytest.approx(sum(kl) / 51, rel=1e-4) and found.kl > 0
    assert found.top1_agreement == sum(agreed) / 51 < 1


def test_all_experts_cost_nothing_and_the_limit_is_lifted(model: Path) -> None:
    with opened(model) as llama:
        layers = ExpertLayers.of(llama.index)
        text = windows(llama.n_vocab(), 30)
        before = evaluated(llama, text[0])
        nothing, something = measure(llama, text, [everything(layers), few_of(layers)])
        assert (nothing.loss, nothing.kl, nothing.top1_agreement) == (0.0, 0.0, 1.0)
        assert something.kl > 0
        assert np.array_equal(evaluated(llama, text[0]), before)


def test_the_limit_is_lifted_when_interrupted(model: Path) -> None:
    with opened(model) as llama:
        chosen = few_of(ExpertLayers.of(llama.index))
        text = windows(llama.n_vocab(), 30)
        before = evaluated(llama, text[0])
        calls = 0

        def stop() -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure(llama, text * 2, [chosen], stop)
        assert np.array_equal(evaluated(llama, text[0]), before)


def test_progress_counts_every_evaluation(model: Path) -> None:
    with opened(model) as llama:
        layers = ExpertLayers.of(llama.index)
        calls: list[None] = []
        measure(
            llama,
            windows(llama.n_vocab(), 9, 9),
            [few_of(layers, seed) for seed in range(3)],
            lambda: calls.append(None),
        )
        assert len(calls) == 2 * (1 + 3)


@pytest.mark.parametrize("length", [0, 1, N_CTX + 2])
def test_window_that_cannot_be_measured(model: Path, length: int) -> None:
    with (
        opened(model) as llama,
        pytest.raises(BackendError, match=r"cannot be measured within a context of \d+; give 2 to"),
    ):
        measure(llama, windows(llama.n_vocab(), length), [])


def test_full_model_without_finite_logits(model: Path) -> None:
    with opened(model) as llama:
        nan = np.full((N_CTX, llama.n_vocab()), np.nan, np.float32)
        with (
            mock.patch.object(llama, "scores", nan),
            mock.patch.object(llama, "eval"),
            pytest.raises(BackendError, match="no finite numbers"),
        ):
            measure(llama, windows(llama.n_vocab(), 9), [])


def figures(*losses: float) -> Figures:
    ones = np.ones(len(losses))
    return Figures(ones * 10, np.array(losses) * 10 + 20, ones * 20, ones, ones * 5)


def test_windows_and_runs_are_added_differently() -> None:
    """More windows narrow the standard error; another random run on the same windows only averages each of them."""
    both = Figures.joined([figures(0.1), figures(0.3)])
    assert both.loss == pytest.approx(0.2)
    assert both.standard_error == pytest.approx(0.1)
    assert both.tokens.tolist() == [10, 10]
    runs = both.with_run(figures(0.3, 0.1))
    assert runs.loss == pytest.approx(0.2)
    assert runs.standard_error == pytest.approx(0.0)
    assert (runs.kl, runs.top1_agreement) == (both.kl, both.top1_agreement)
    assert figures(0.1).standard_error is None


def test_memory_is_what_the_plan_is_told() -> None:
    assert measuring_bytes(512, 4096) >= 4 * 512 * 4096
    assert measuring_bytes(512, 152_000) < 1.2 * 4 * 512 * 152_000
