"""Loss curves are made sound, and the cheapest sizes are those of brute force."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import AllocationError
from edgemoe.loss_curves import LossCurves, cheapest_sizes, expected_loss

LOSSES = st.floats(-0.25, 3)


@st.composite
def curves(draw: st.DrawFn, n_layer: int | None = None, n_expert: int | None = None) -> LossCurves:
    whole = n_expert or draw(st.integers(2, 64))
    sizes = [*sorted(draw(st.sets(st.integers(1, whole - 1), min_size=1, max_size=5))), whole]
    n = n_layer or draw(st.integers(1, 4))
    rows = [[*draw(st.lists(LOSSES, min_size=len(sizes) - 1, max_size=len(sizes) - 1)), 0.0] for _ in range(n)]
    return LossCurves(tuple(sizes), np.array(rows))


@given(curves())
def test_every_curve_becomes_sound(given: LossCurves) -> None:
    table = given.by_size
    assert table.shape == (len(given.loss), given.n_expert + 1)
    assert np.isinf(table[:, 0]).all()
    assert np.isfinite(table[:, 1:]).all()
    assert (np.diff(table[:, 1:], axis=1) <= 0).all()
    assert (table[:, -1] == 0).all()


@given(curves())
def test_sound_curves_are_met_at_the_measured_sizes(given: LossCurves) -> None:
    sound = LossCurves(given.sizes, -np.sort(-np.maximum(given.loss, 0), axis=1))
    assert np.abs(sound.by_size[:, list(given.sizes)] - sound.loss).max() < 1e-11


def test_noise_is_averaged_out() -> None:
    given = LossCurves((2, 4, 8, 16), np.array([[0.1, 0.3, -0.1, 0.0], [0.5, 0.1, 0.2, 0.0]]))
    assert given.by_size[0, [2, 4, 8, 16]] == pytest.approx([0.2, 0.2, 0.0, 0.0])
    assert given.by_size[1, [2, 4, 8, 16]] == pytest.approx([0.5, 0.15, 0.15, 0.0])


def test_between_sizes_the_loss_is_linear_in_octaves() -> None:
    given = LossCurves((8, 32), np.array([[1.0, 0.0]]))
    assert given.by_size[0, 16] == pytest.approx(0.5)
    # Convex in the size: the next expert always gains less than the last one did.
    assert (np.diff(given.by_size[0, 1:], n=2) > -1e-11).all()


def test_below_the_smallest_size_the_steepest_part_continues() -> None:
    given = LossCurves((8, 16, 32), np.array([[1.2, 0.2, 0.0], [0.0, 0.0, 0.0]]))
    assert given.by_size[0, 4] == pytest.approx(2.2)
    assert given.by_size[0, 2] == pytest.approx(3.2)
    # A layer that lost nothing yet is taken for an average one: half of a nat for an octave.
    assert given.by_size[1, 8] == 0
    assert given.by_size[1, 4] == pytest.approx(0.5)


def test_a_layer_without_a_curve_stays_whole() -> None:
    given = LossCurves((2, 4), np.array([[0.5, 0.0], [np.nan, np.nan]]))
    assert given.unmeasured.tolist() == [False, True]
    assert expected_loss((2, 4), given) == pytest.approx(0.5)
    assert expected_loss((4, 3), given) == np.inf
    only = LossCurves((2, 4), np.full((2, 2), np.nan))
    assert expected_loss((4, 4), only) == 0


def test_the_expected_loss_is_the_sum() -> None:
    given = LossCurves((2, 4), np.array([[0.5, 0.0], [0.25, 0.0]]))
    assert expected_loss((2, 2), given) == 0.75
    assert expected_loss((4, 2), given) == 0.25
    for sizes in [(2,), (2, 5), (2, -1), (2, 2, 2), ()]:
        with pytest.raises(AllocationError, match="use the curves of this model"):
            expected_loss(sizes, given)


@pytest.mark.parametrize(
    ("sizes", "loss"),
    [
        ((4,), [[0.0]]),
        ((0, 4), [[1.0, 0.0]]),
        ((4, 2), [[1.0, 0.0]]),
        ((2, 2), [[1.0, 0.0]]),
        ((2, 4), [[1.0, 0.5, 0.0]]),
        ((2, 4), [1.0, 0.0]),
        ((2, 4), [[1.0, 0.1]]),
        ((2, 3, 4), [[1.0, np.nan, 0.0]]),
        ((2, 4), [[np.inf, 0.0]]),
    ],
)
def test_curves_that_contradict_themselves(sizes: tuple[int, ...], loss: list[object]) -> None:
    with pytest.raises(AllocationError, match=r"; give .*"):
        LossCurves(sizes, np.array(loss, np.float64))


@given(st.data())
def test_the_cheapest_sizes_are_those_of_brute_force(data: st.DataObject) -> None:
    n_layer, n_unit = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    loss = data.draw(curves(n_layer, n_unit)).by_size
    prices = data.draw(st.lists(st.integers(1, 9), min_size=n_layer, max_size=n_layer))
    least = data.draw(st.lists(st.integers(1, n_unit), min_size=n_layer, max_size=n_layer))
    floor = sum(p * n for p, n in zip(prices, least, strict=True))
    total = data.draw(st.integers(floor, floor + 9 * n_layer * n_unit))

    found = cheapest_sizes(loss, prices, least, total).tolist()
    every = [
        (sum(loss[i, n] for i, n in enumerate(sizes)), cost)
        for sizes in itertools.product(*(range(low, n_unit + 1) for low in least))
        if (cost := sum(p * n for p, n in zip(prices, sizes, strict=True))) <= total
    ]
    cost = sum(p * n for p, n in zip(prices, found, strict=True))
    assert all(n >= low for n, low in zip(found, least, strict=True))
    assert (sum(loss[i, n] for i, n in enumerate(found)), cost) == min(every)


def test_odd_prices_come_close_to_the_budget_and_the_optimum() -> None:
    rng = np.random.default_rng(3)
    n_layer, n_unit = 40, 128
    rows = np.append(-np.sort(-rng.random((n_layer, 4)) * rng.random((n_layer, 1))), np.zeros((n_layer, 1)), axis=1)
    loss = LossCurves((8, 16, 32, 64, 128), rows).by_size
    prices = rng.integers(1_000_000, 2_000_000, n_layer).tolist()
    least = [8] * n_layer
    total = 60 * sum(prices)
    found = cheapest_sizes(loss, prices, least, total)
    spent = sum(p * n for p, n in zip(prices, found.tolist(), strict=True))
    assert total - max(prices) < spent <= total
    # No budget-weighted price per nat can do better than this bound (Lagrange), whatever the multiplier.
    reached = loss[np.arange(n_layer), found].sum()
    bounds = [
        (loss[:, 8:] + m * np.outer(prices, np.arange(8, n_unit + 1))).min(axis=1).sum() - m * total
        for m in np.geomspace(1e-12, 1e-6, 500)
    ]
    assert max(bounds) <= reached <= max(bounds) + 0.02


def test_the_largest_models_take_less_than_a_second() -> None:
    rng = np.random.default_rng(0)
    rows = np.append(-np.sort(-rng.random((58, 5))), np.zeros((58, 1)), axis=1)
    loss = LossCurves((16, 32, 64, 128, 192, 256), rows).by_size
    start = time.process_time()
    cheapest_sizes(loss, rng.integers(1_000_000, 2_000_000, 58).tolist(), [8] * 58, 10**12)
    assert time.process_time() - start < 1
