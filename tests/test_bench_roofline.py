"""Lower bounds on routes whose misses can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.bench_roofline import Roofline, prompt_bytes, roofline, with_last_layer
from edgemoe.routes import Routes


def ids(*tokens: list[list[int]]) -> np.ndarray:
    return np.array(tokens, np.int32)


def bound(compute_s: float = 1.0, prompt_compute_s: float = 2.0) -> Roofline:
    # One layer, two experts fit: 0 and 1 alternate with 2, which LRU always throws out too late.
    routes = Routes("by hand", 3, ids([[0]], [[1]]), ids([[2]], [[0]], [[1]], [[2]]))
    return roofline(routes, [100], 200, 1, 50.0, compute_s, prompt_compute_s)


def test_misses_of_both_caches() -> None:
    found = bound()
    assert found.lru_hit_rate == 0.0 and found.lru_bytes == 100.0
    assert found.belady_hit_rate == 0.5 and found.belady_bytes == 50.0


def test_the_slower_term_counts() -> None:
    assert (bound(1.5).lru_s, bound(1.5).belady_s, bound(1.5).bound) == (2.0, 1.5, "compute")
    assert (bound(0.5).lru_s, bound(0.5).belady_s, bound(0.5).bound) == (2.0, 1.0, "disk")


def test_a_prompt_takes_one_pass_or_its_computation() -> None:
    assert bound().prompt_s == 4.0
    assert (bound(prompt_compute_s=7.0).prompt_s, bound(prompt_compute_s=7.0).prompt_pass_s) == (7.0, 4.0)


def test_each_batch_reads_its_experts_once() -> None:
    prompt = ids([[0, 1], [5, 6]], [[1, 2], [5, 6]], [[0, 1], [6, 7]])
    assert prompt_bytes(prompt, [10, 1], n_ubatch=3) == 3 * 10 + 3 * 1
    assert prompt_bytes(prompt, [10, 1], n_ubatch=2) == (3 + 2) * 10 + (2 + 2) * 1


def test_the_last_layer_sees_the_last_token() -> None:
    prompt = ids([[0], [1]], [[2], [3]])
    assert with_last_layer(prompt).tolist() == [[[0], [3]], [[2], [3]]]
    assert prompt[0, 1, 0] == 1


def test_sizes_that_do_not_fit() -> None:
    routes = Routes("by hand", 3, ids([[0]]), ids([[2]]))
    with pytest.raises(Exception, match="expert sizes"):
        roofline(routes, [100, 100], 200, 1, 50.0, 1.0, 1.0)
