"""`--skip-mass`: what real graphs compute, the same answer whatever the disk does, and what skipping costs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_llama import TINY_MOE, arena_share, greedy, logits
from tiny_models import TINY_ARCHITECTURES, write_tiny_model

from edgemoe.backend import Llama
from edgemoe.chat import Sampling, complete
from edgemoe.errors import BackendError
from edgemoe.skip_cost import SkipCost, measure_skipping
from edgemoe.store import Tuning

SETTINGS = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "seed": 1}
PROMPT = list(range(60, 90))


@contextmanager
def opened(path: Path = TINY_MOE, share: float = 0.2, **changes: object) -> Iterator[Llama]:
    with arena_share(share), Llama(str(path), **{**SETTINGS, **changes}) as llama:
        yield llama


def decoded_weights(llama: Llama, token: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Ids and weights of a token that follows the prompt, by MoE layer."""
    session = llama.store.session
    llama.reset()
    llama.eval(PROMPT)
    session.watch_routers(list(llama.index.moe_layers), outputs=True)
    llama.eval([token])
    traces = {layer: session.take_trace(layer) for layer in llama.index.moe_layers}
    session.watch_routers([])
    return {layer: (ids[0], weights[0]) for layer, (_, ids, weights, _, _) in traces.items()}


@pytest.mark.parametrize("name", ["tiny-moe", *TINY_ARCHITECTURES])
def test_every_architecture_skips_the_lightest_and_renormalises(name: str, tmp_path: Path) -> None:
    path = TINY_MOE
    if name != "tiny-moe":
        path = tmp_path / f"{name}.gguf"
        write_tiny_model(path, name)
    with opened(path, share=0.0) as llama:
        llama.store.skip(0.0, 0)
        exact = decoded_weights(llama, 5)
        llama.store.skip(0.45, 0)  # a cache that holds nothing: every expert is a miss
        skipping = decoded_weights(llama, 5)
        stats = llama.store.stats()
    first = llama.index.moe_layers[0]  # later ones see another input
    np.testing.assert_array_equal(skipping[first][0], exact[first][0])
    weights = exact[first][1]
    shares = weights / weights.sum()
    left, mass = weights.copy(), 0.0
    for slot in np.argsort(shares, kind="stable"):
        if mass + shares[slot] > 0.45:
            break
        mass += shares[slot]
        left[slot] = 0
    np.testing.assert_allclose(skipping[first][1], left * weights.sum() / left.sum(), rtol=1e-4)
    most_used = max(llama.index.n_expert_used)
    assert (stats.skipped_slots > 0) == (most_used > 1)
    assert stats.skipped_mass <= 0.45 * stats.routed_layers
    assert stats.routed_layers == len(llama.index.moe_layers)


def test_nothing_else_than_routing_decides() -> None:
    """Neither look-ahead nor the way to read, nor what ran before in the process."""
    with opened(skip_mass=0.3) as llama:
        answer = greedy(llama, PROMPT, 60)
        expected = logits(llama, PROMPT, answer)
        stats = llama.store.stats()
        assert 0 < stats.skipped_slots < stats.routed_slots
        greedy(llama, PROMPT[::-1], 20)
        np.testing.assert_array_equal(logits(llama, PROMPT, answer), expected)
    for changes in ({"tuning": Tuning.plain()}, {"io": "pread"}, {"io": "mmap", "tuning": Tuning(look_ahead=False)}):
        with opened(skip_mass=0.3, **changes) as llama:
            np.testing.assert_array_equal(logits(llama, PROMPT, answer), expected)
    with opened() as llama:
        assert np.abs(logits(llama, PROMPT, answer) - expected).max() > 0.1, "skipping changes what is said"


def test_two_processes_answer_alike() -> None:
    command = [sys.executable, "-m", "edgemoe", "run", str(TINY_MOE), "--ram", "100MiB", "--ctx", "512"]
    command += [
        "--skip-mass",
        "0.3",
        "--temp",
        "0",
        "--max-tokens",
        "40",
        "--threads",
        "1",
        "--json",
        "def read(path):",
    ]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    first, second = map(json.loads, runs)
    assert first["text"] == second["text"]
    for figure in ("skipped_share", "skipped_mass"):
        assert 0 < first["stats"][figure] == second["stats"][figure]
    assert first["stats"]["skipped_mass"] <= first["stats"]["skip_mass"] == 0.3


def test_nothing_is_skipped_unless_asked_and_exactness_comes_back() -> None:
    with opened() as llama:
        expected = logits(llama, PROMPT, range(100, 140))
        assert llama.store.stats().routed_slots == 0
        llama.skip_mass = 0.4
        assert np.abs(logits(llama, PROMPT, range(100, 140)) - expected).max() > 0.01
        llama.skip_mass = 0.0
        before = llama.store.stats().routed_slots
        np.testing.assert_array_equal(logits(llama, PROMPT, range(100, 140)), expected)
        assert llama.store.stats().routed_slots == before


def test_prompts_are_not_skipped() -> None:
    with opened(skip_mass=0.5) as llama:
        llama.eval(PROMPT)
        prompt = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy()
        assert llama.store.stats().routed_slots == 0
        llama.skip_mass = 0.0
        llama.eval(PROMPT)
        exact = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
        np.testing.assert_array_equal(prompt, exact)


def test_a_prompt_goes_on_only_from_all_that_was_computed() -> None:
    with opened(skip_mass=0.3) as llama:
        sampling = Sampling(max_tokens=12, temperature=0.0, seed=1)
        first = complete(llama, "def read(path):", sampling)
        first.drain()
        assert (first.skipped_share or 0) > 0
        assert 0 < (first.skipped_mass or 0) <= 0.3
        again = complete(llama, "def read(path):", sampling)
        assert again.reused_tokens == 0
        assert again.drain() == first.text
        computed = llama.input_ids[: llama.n_tokens].tolist()
        assert llama.reusable([*computed, 5, 6]) == len(computed)
        assert llama.reusable(computed) == llama.reusable([*computed[:-1], 5, 6]) == 0
        llama.skip_mass = 0.0
        llama.eval(computed)
        assert llama.reusable([*computed[:-1], 5, 6]) == len(computed) - 1


def test_what_cannot_be_is_refused() -> None:
    strange: list[Any] = [-0.1, 0.51, float("nan"), "much", None]
    for mass in strange:
        with pytest.raises(BackendError, match=f"a skip mass of {mass!r} is no share of the router's weights"):
            Llama(str(TINY_MOE), skip_mass=mass)
    with pytest.raises(BackendError, match="those of a task alone are all in memory"):
        Llama(str(TINY_MOE), skip_mass=0.1, experts="task")


def test_cost_is_what_logits_say() -> None:
    rng = np.random.default_rng(3)
    windows = [tuple(rng.integers(3, 300, n).tolist()) for n in (41, 30)]
    steps: list[None] = []
    with opened(skip_mass=0.1) as llama:
        exact, skipping = measure_skipping(llama, windows, (0.0, 0.3), lambda: steps.append(None))
        assert llama.skip_mass == 0.1
        assert llama.n_tokens == 0
        for cost, bound in ((exact, 0.0), (skipping, 0.3)):
            llama.skip_mass = bound
            for number, window in enumerate(windows):
                half = (len(window) - 1) // 2
                rows = logits(llama, window[:half], window[half:-1])[1:].astype(np.float64)
                nll = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), window[half + 1 :]]
                assert cost.nll[number] == pytest.approx(nll.sum(), rel=1e-9)
                assert cost.tokens[number] == len(rows)
    assert len(steps) == 4
    assert exact.skipped_share == exact.skipped_mass == exact.perplexity_change(exact) == 0
    assert 0 < skipping.skipped_mass <= 0.3
    assert skipping.skipped_share > 0
    assert 0 < skipping.bytes_per_token < exact.bytes_per_token
    assert skipping.perplexity == pytest.approx(exact.perplexity * (1 + skipping.perplexity_change(exact)))
    assert skipping.standard_error(exact) is not None
    single = SkipCost(0.1, exact.tokens[:1], exact.nll[:1], 0, 0.0, 0.0)
    assert single.standard_error(single) is None


def test_windows_that_cannot_be_decoded_are_refused() -> None:
    with opened() as llama:
        for window in ((1, 2), tuple(range(3, 3 + llama.n_ctx() + 2))):
            with pytest.raises(BackendError, match=f"a window of {len(window)} tokens cannot be decoded"):
                measure_skipping(llama, [window], [0.1])
