"""Statistics of routes: by hand, on the real traces, and of the streams fitted to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgemoe.errors import TraceError
from edgemoe.route_statistics import TRACES, check, statistics
from edgemoe.routes import Routes, fitted_routes, read_routes, uniform_routes

FILES = Path(__file__).resolve().parent.parent / "benchmarks" / "routes"
SHAPES = {"qwen": (48, 128, 6), "gemma": (30, 128, 6), "gptoss": (36, 128, 2)}


@pytest.mark.parametrize("kind", TRACES)
def test_the_traces_have_the_statistics_that_streams_are_checked_against(kind):
    routes = read_routes(FILES / f"{kind}.route.csv.gz")
    found = statistics(routes, len(routes.decode))
    assert found.n_token == TRACES[kind].n_token
    for (name, value), (_, expected) in zip(found.shares(), TRACES[kind].shares(), strict=True):
        assert value == pytest.approx(expected, abs=0.006), name
    assert found.zipf == pytest.approx(TRACES[kind].zipf, abs=0.006)
    assert found.zipf_first == pytest.approx(TRACES[kind].zipf_first, abs=0.006)
    assert check(found, kind) == []


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", TRACES)
def test_drawn_streams_are_like_their_trace(kind, seed):
    n_token = TRACES[kind].n_token
    found = statistics(fitted_routes(kind, *SHAPES[kind], 8, n_token, seed), n_token)
    assert check(found, kind) == []
    assert found.zipf == pytest.approx(TRACES[kind].zipf, abs=0.1)


def test_uniform_routing_is_not_like_a_trace():
    found = statistics(uniform_routes(8, 128, 6, 0, 128, seed=0), 128)
    different = check(found, "qwen")
    assert len(different) > 10 and different[0] == "overlap at lag 1 is 0.04, qwen's 0.38"
    assert found.overlap == pytest.approx([6 / 128] * 6, abs=0.01)
    assert found.lru[0] < 0.06 and found.distinct > 0.98


def test_statistics_by_hand():
    # Expert 0 always, and 1, 2, 3, 4 in turn, in both layers.
    ids = np.array([[0, 1 + t % 4] for t in range(40)], np.int32)
    found = statistics(Routes("r", 16, np.empty((0, 2, 2), np.int32), np.stack([ids, ids], axis=1)), 40)
    assert found.overlap == (0.5, 0.5, 1, 1, 1, 1)
    assert found.used_within == (0.5, 1, 1, 1, 1)
    assert found.hottest == (0.5, 0.625, 0.875, 1)
    assert found.lru == pytest.approx([75 / 80] * 4)
    assert found.distinct == 5 / 16
    assert found.effective == pytest.approx(2**0.5 * 8**0.5 / 16)
    ranks = np.log([1, 2, 3, 4, 5])
    slope = (ranks[0] - ranks.mean()) * np.log(4) / np.sum((ranks - ranks.mean()) ** 2)
    assert found.zipf == found.zipf_first == pytest.approx(-slope)


def test_lru_slots_that_are_too_few_hit_nothing():
    ids = np.arange(90, dtype=np.int32).reshape(90, 1, 1) % 9
    assert statistics(Routes("r", 64, ids[:0], ids), 90).lru == (0, 0.9, 0.9, 0.9)


def test_what_cannot_be_measured_or_compared():
    routes = uniform_routes(1, 8, 2, 0, 40, seed=0)
    for n_token in (0, 32, 41):
        with pytest.raises(TraceError, match=rf"statistics of {n_token} decoded tokens were asked of routes with 40"):
            statistics(routes, n_token)
    for kind in ("qwen", "llama"):
        with pytest.raises(TraceError, match=rf"have no trace '{kind}'.*measure 128 tokens for qwen"):
            check(statistics(routes, 40), kind)
