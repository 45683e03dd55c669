"""Patterns of made-up routes: what fits, and routes that stay within it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.bench_pattern import best_experts, prompt_counts, within
from edgemoe.expert_set import ExpertLayers
from edgemoe.routes import uniform_routes


def test_counts() -> None:
    prompt = np.array([[[0, 1], [2, 3]], [[1, 2], [3, 2]]], np.int32)
    assert prompt_counts(prompt, 4).tolist() == [[1, 2, 1, 0], [0, 0, 2, 2]]


def layers_of(n_expert: int, k: int, *sizes: int) -> ExpertLayers:
    return ExpertLayers(tuple(range(len(sizes))), n_expert, (k,) * len(sizes), sizes)


def test_the_most_used_experts_of_all_layers_come_first() -> None:
    counts = np.array([[9, 1, 0, 5], [7, 6, 2, 0]])
    layers = layers_of(4, 1, 10, 10)
    assert best_experts(counts, layers, 40, 1.0).kept == ((0, 3), (0, 1))
    assert best_experts(counts, layers, 39, 1.0).kept == ((0,), (0, 1))
    # What routing needs is taken whatever the room.
    assert best_experts(counts, layers, 0, 1.0).kept == ((0,), (0,))


def test_experts_that_nothing_uses_are_not_wanted() -> None:
    assert best_experts(np.array([[3, 0, 0, 0]]), layers_of(4, 1, 1), 100, 1.0).kept == ((0,),)


def test_a_share_of_all_uses_is_enough() -> None:
    counts = np.array([[50, 30, 15, 5]])
    assert best_experts(counts, layers_of(4, 1, 1), 100, 0.8).kept == ((0, 1),)
    assert best_experts(counts, layers_of(4, 1, 1), 100, 1.0).kept == ((0, 1, 2, 3),)


@given(st.integers(0, 2**32 - 1), st.integers(4, 16), st.integers(1, 4), st.integers(0, 40))
def test_routes_within_a_set(seed: int, n_expert: int, k: int, room: int) -> None:
    routes = uniform_routes(3, n_expert, k, n_prompt=10, n_decode=10, seed=seed)
    counts = prompt_counts(routes.prompt, n_expert)
    chosen = best_experts(counts, layers_of(n_expert, k, 1, 2, 3), room, 1.0).kept
    size = sum(len(ids) * n_bytes for ids, n_bytes in zip(chosen, (1, 2, 3), strict=True))
    assert size <= max(room, k * 6)
    inside = within(routes.decode, counts, chosen)
    for layer, ids in enumerate(chosen):
        allowed = np.isin(routes.decode[:, layer], ids)
        assert np.isin(inside[:, layer], ids).all()
        assert (inside[:, layer] == routes.decode[:, layer])[allowed].all()
        assert all(len(set(row)) == k for row in inside[:, layer].tolist())


def test_substitutes_are_the_most_used_of_the_set() -> None:
    counts = np.array([[1, 8, 9, 0, 4]])
    rows = np.array([[[3, 2, 0]]], np.int32)
    assert within(rows, counts, [[1, 2, 4]]).tolist() == [[[1, 2, 4]]]
