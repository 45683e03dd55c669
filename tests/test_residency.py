"""Putting a set of experts into force: what is read, what stays in memory, and what the model then computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from plain_llama import arena_share, logits, plain_llama
from tiny_models import write_tiny_model

from edgemoe.backend import Llama
from edgemoe.errors import StoreError
from edgemoe.expert_set import ExpertLayers, ExpertSet, everything
from edgemoe.memory import page_size
from edgemoe.plan import expert_pages
from edgemoe.store import Tuning
from edgemoe.trace import RouterTrace

SETTINGS = {"n_ctx": 128, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "seed": 1}
N_EXPERT = 10
LAYERS = (0, 1, 2)
PROMPT = list(range(20, 60))
ANSWER = [5, 6, 7, 8]

# One tensor's share of an expert is 256 KiB, which its first and last page exceed by 3 % at most.
LARGE = {"embd": 256, "head_dim": 64, "ff": 256, "ff_exp": 256, "expert": N_EXPERT, "used": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = write_tiny_model(tmp_path_factory.mktemp("residency") / "large.gguf", "qwen3moe", **LARGE)
    return path


@contextmanager
def opened(path: Path, share: float = 1.0, **changes: object) -> Iterator[Llama]:
    with arena_share(share), Llama(str(path), **{**SETTINGS, **changes}) as llama:
        yield llama


def of(*kept: list[int]) -> ExpertSet:
    return ExpertSet(LAYERS, N_EXPERT, 2, tuple(map(tuple, kept)))


def spread(first: int, n: int) -> ExpertSet:
    """Of each layer n experts in a row; those of the next `first` have all but one in common."""
    return of(*(sorted((first + layer + i) % N_EXPERT for i in range(n)) for layer in LAYERS))


def predicted(chosen: ExpertSet, llama: Llama) -> int:
    return chosen.n_bytes(ExpertLayers.of(llama.index).expert_bytes)


@pytest.mark.parametrize("io", ["direct", "mmap", "pread"])
def test_a_set_reads_and_holds_its_own_bytes(model: Path, io: str) -> None:
    chosen = of([0, 3, 4, 9], [1, 2], [0, 2, 4, 6, 7, 8])
    with opened(model, io=io) as llama:
        switch = llama.residency.restrict(chosen)
        stats = llama.store.stats()
        assert switch.bytes_read == stats.bytes_read and switch.seconds > 0
        assert (stats.hits, stats.misses) == (0, 0), "reading ahead is not counted as use"
        for measured in (switch.bytes_read, stats.resident_bytes):
            assert predicted(chosen, llama) <= measured <= 1.03 * predicted(chosen, llama)
        # What a budget in bytes is counted with is an upper bound of what is held, and close to it.
        assert stats.resident_bytes <= chosen.n_bytes(expert_pages(llama.index)) <= 1.03 * predicted(chosen, llama)
        assert llama.residency.restrict(chosen).bytes_read == 0


def test_experts_smaller_than_a_page_are_read_within_page_rounding(tmp_path: Path) -> None:
    (path,) = write_tiny_model(tmp_path / "small.gguf", "qwen3moe", expert=N_EXPERT, expert_type="q4_0")
    with opened(path) as llama:
        chosen = of([0, 9], [4, 5], [2, 7])
        read = llama.residency.restrict(chosen).bytes_read
        assert predicted(chosen, llama) <= read <= predicted(chosen, llama) + 2 * page_size() * 3 * chosen.n_kept


@pytest.mark.parametrize("share", [1.0, 0.52], ids=["room-for-both", "room-for-one"])
def test_switching_between_sets_reads_the_difference(model: Path, share: float) -> None:
    """Four of five experts in common: a fifth of the bytes, also where the former set has to make room."""
    with opened(model, share) as llama:
        first, second = spread(0, 5), spread(1, 5)
        assert len(second.missing_from(first)) == second.n_kept // 5
        whole = llama.residency.restrict(first).bytes_read
        difference = llama.residency.restrict(second).bytes_read
        assert difference == pytest.approx(whole / 5, rel=0.03)
        before = llama.store.stats()
        assert before.resident_bytes <= before.arena_bytes
        assert (before.evictions > 0) is (share < 1.0)
        logits(llama, PROMPT, ANSWER)
        after = llama.store.stats()
        assert after.misses == 0 and after.bytes_read == before.bytes_read, "a miss cannot happen"
        assert (llama.residency.restrict(first).bytes_read > 0) is (share < 1.0)


def test_limiting_reads_nothing_ahead_and_computes_the_same(model: Path) -> None:
    chosen = spread(2, 4)
    with opened(model) as llama:
        full = logits(llama, PROMPT, ANSWER)
        llama.residency.restrict(chosen)
        restricted = logits(llama, PROMPT, ANSWER)
        assert np.abs(restricted - full).max() > 1e-3
    with opened(model) as llama:
        llama.residency.limit(chosen)
        assert llama.store.stats().bytes_read == 0
        np.testing.assert_array_equal(logits(llama, PROMPT, ANSWER), restricted)
        assert llama.store.stats().bytes_read <= 1.03 * predicted(chosen, llama)
        llama.residency.limit(None)
        np.testing.assert_array_equal(logits(llama, PROMPT, ANSWER), full)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
def test_preferring_changes_no_answer(model: Path, share: float) -> None:
    """Soft: every expert may be chosen, and the logits are those of plain llama.cpp, bit for bit."""
    plain = plain_llama(model, **SETTINGS)
    expected = logits(plain, PROMPT, ANSWER)
    plain.close()
    with opened(model, share) as llama:
        assert llama.plan.n_ubatch == SETTINGS["n_ubatch"]
        switch = llama.residency.prefer(spread(0, 2))
        assert predicted(spread(0, 2), llama) <= switch.bytes_read <= 1.03 * predicted(spread(0, 2), llama)
        for _ in range(2):
            np.testing.assert_array_equal(logits(llama, PROMPT, ANSWER), expected)
        # From a task's set to all experts and back to another set.
        llama.residency.restrict(spread(1, 2))
        assert np.abs(logits(llama, PROMPT, ANSWER) - expected).max() > 1e-3
        llama.residency.prefer(spread(3, 2))
        np.testing.assert_array_equal(logits(llama, PROMPT, ANSWER), expected)


def read_all(llama: Llama) -> None:
    """Read every expert of every layer in turn, many times what the arena holds."""
    for layer in LAYERS:
        for expert in range(N_EXPERT):
            llama.store.warm(layer, [expert])


def test_preferred_experts_stay_before_those_never_used_and_allowing_all_ends_that(model: Path) -> None:
    kept = spread(0, 2)
    with opened(model, 0.5) as llama:
        llama.eval([5])
        llama.residency.prefer(kept)
        read_all(llama)
        assert llama.store.stats().evictions > 0
        assert llama.residency.prefer(kept).bytes_read == 0, "they are in memory still"
        llama.residency.allow_all()
        read_all(llama)
        assert llama.residency.prefer(kept).bytes_read > 0, "without a preference they are like any other"


def test_what_a_token_used_is_resident_and_comes_first(model: Path) -> None:
    # With look-ahead the first layer's experts count for more, in so small a model than others' that were just used.
    with opened(model, 0.5, tuning=Tuning(look_ahead=False)) as llama:
        assert llama.store.residents() == {}
        traces: list[RouterTrace] = []
        with llama.tap.watch(traces.append):
            llama.eval([5])
        used = {
            layer: set(np.argsort(-row[-1])[:2].tolist()) for layer, row in zip(LAYERS, traces[0].logits, strict=True)
        }
        llama.residency.prefer(spread(0, 1))
        read_all(llama)
        residents = llama.store.residents()
        assert residents.keys() == set(LAYERS)
        for layer, ids in residents.items():
            assert len(set(ids)) == len(ids) and set(ids) <= set(range(N_EXPERT))
            assert set(ids[:2]) == used[layer]
            assert layer in ids[:3], "the one that is preferred"
        before = llama.store.stats().bytes_read
        for layer, ids in residents.items():
            llama.store.warm(layer, ids)
        assert llama.store.stats().bytes_read == before


def test_all_experts_again_after_a_set(model: Path) -> None:
    with opened(model) as llama:
        full = logits(llama, PROMPT, ANSWER)
        llama.residency.restrict(spread(0, 3))
        llama.residency.allow_all()
        np.testing.assert_array_equal(logits(llama, PROMPT, ANSWER), full)
        llama.residency.restrict(everything(ExpertLayers.of(llama.index)))
        np.testing.assert_array_equal(logits(llama, PROMPT, ANSWER), full)


def test_a_layer_that_the_arena_cannot_hold(model: Path) -> None:
    with (
        opened(model, 0.0) as llama,
        pytest.raises(StoreError, match="need more than the arena"),
    ):
        llama.residency.restrict(everything(ExpertLayers.of(llama.index)))
