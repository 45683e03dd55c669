"""Replays against a list that is searched, and against every choice of victims there is."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.cache_replay import belady, lru
from edgemoe.errors import TraceError
from edgemoe.routes import read_routes, uniform_routes

QWEN = Path(__file__).resolve().parent.parent / "benchmarks" / "routes" / "qwen.route.csv.gz"


@st.composite
def replays(draw: st.DrawFn, longest: int = 12):
    """Rows, sizes of their layers' experts, an arena that holds a row, and a prompt or none."""
    n_expert = draw(st.integers(1, 5))
    n_used = draw(st.integers(1, n_expert))
    n_layer = draw(st.integers(1, 3))
    drawn = uniform_routes(
        n_layer, n_expert, n_used, draw(st.integers(0, 3)), draw(st.integers(0, longest)), draw(st.integers(0, 999))
    )
    sizes = draw(st.lists(st.integers(1, 3), min_size=n_layer, max_size=n_layer))
    arena = draw(st.integers(n_used * max(sizes), 3 * n_layer * n_expert + 3))
    return drawn.decode, sizes, arena, draw(st.sampled_from([None, drawn.prompt]))


def searched(rows, sizes, arena, prompt):
    """Least recently used, on a list whose first is the oldest."""
    kept: list[tuple[int, int]] = []

    def use(layer, experts):
        missed = [(layer, e) for e in experts if (layer, e) not in kept]
        kept[:] = [entry for entry in kept if entry[0] != layer or entry[1] not in experts]
        kept.extend((layer, e) for e in experts)
        while sum(sizes[of] for of, _ in kept) > arena:
            kept.pop(0)
        return len(missed)

    if prompt is not None:
        for layer in range(len(sizes)):
            use(layer, sorted(set(prompt[:, layer].ravel().tolist())))
    return [[use(layer, ids.tolist()) for layer, ids in enumerate(row)] for row in rows]


@given(replays())
def test_least_recently_used(case):
    rows, sizes, arena, prompt = case
    found = lru(rows, sizes, arena, prompt)
    expected = np.array(searched(*case), np.int64).reshape(rows.shape[:2])
    np.testing.assert_array_equal(found.misses, expected.sum(1))
    np.testing.assert_array_equal(found.hits + found.misses, rows.shape[1] * rows.shape[2])
    np.testing.assert_array_equal(found.bytes_missed, expected @ np.array(sizes))


def fewest_misses(requests, n_slots):
    """By trying every set of entries that could stay."""

    @cache
    def best(at, kept):
        if at == len(requests):
            return 0
        request = requests[at]
        missed = len(request - kept)
        room = n_slots - len(request)
        others = sorted(kept - request)
        if len(others) <= room:
            return missed + best(at + 1, kept | request)
        return missed + min(best(at + 1, request | set(stay)) for stay in combinations(others, room))

    return best(0, frozenset())


@settings(deadline=None)
@given(replays(longest=5))
def test_belady_is_optimal_where_all_experts_have_one_size(case):
    rows, sizes, arena, _ = case
    n_slots = max(arena // 3, rows.shape[2])
    requests = [frozenset((layer, e) for e in ids.tolist()) for row in rows for layer, ids in enumerate(row)]
    found = belady(rows, [1] * len(sizes), n_slots)
    assert int(found.misses.sum()) == fewest_misses(requests, n_slots)


@given(replays())
def test_belady_with_a_prompt_and_sizes_keeps_the_books(case):
    rows, sizes, arena, prompt = case
    found, control = belady(rows, sizes, arena, prompt), lru(rows, sizes, arena, prompt)
    np.testing.assert_array_equal(found.hits + found.misses, control.hits + control.misses)
    if len(set(sizes)) == 1 and prompt is None:
        assert found.misses.sum() <= control.misses.sum()
    if arena >= sum(sizes) * 5:  # everything fits: only first uses miss, whoever should leave
        np.testing.assert_array_equal(found.misses, control.misses)


def test_the_real_trace_and_its_cliff():
    routes = read_routes(QWEN)
    everything = np.concatenate([routes.prompt, routes.decode])
    sizes = [2_650_000] * 48
    for arena, least_recent, optimal in ((3_200_000_000, 0.737, 0.889), (1_050_000_000, 0.380, 0.642)):
        for replay, expected in ((lru, least_recent), (belady, optimal)):
            hits = replay(everything, sizes, arena).hits[len(routes.prompt) :].sum()
            assert hits / routes.decode.size == pytest.approx(expected, abs=0.002)
    below_a_cycle = 700_000_000
    assert lru(routes.decode, sizes, below_a_cycle).hit_rate == 0
    assert belady(routes.decode, sizes, below_a_cycle).hit_rate > 0.5


def test_nothing_asked_for_is_no_miss():
    nothing = np.empty((0, 2, 3), np.int32)
    assert lru(nothing, [1, 1], 3).hit_rate == belady(nothing, [1, 1], 3).hit_rate == 1


@pytest.mark.parametrize("replay", [lru, belady])
def test_what_cannot_be_replayed(replay):
    routes = uniform_routes(2, 8, 3, 1, 1, seed=0)
    for sizes, prompt in (([1], None), ([1, 0], None), ([1, 1], routes.prompt[:, :1])):
        with pytest.raises(TraceError, match="rows of 2 layers need as many expert sizes"):
            replay(routes.decode, sizes, 99, prompt)
    with pytest.raises(TraceError, match="3 experts of 5 bytes do not fit a cache of 14 bytes"):
        replay(routes.decode, [1, 5], 14)
