"""Whatever scores and budget: floors and limits hold, larger budgets keep what smaller ones kept, ties are stable."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgemoe.allocation import (
    ExpertBudget,
    ExpertLayers,
    ExpertSet,
    by_mass,
    mass_share,
    measured,
    random_like,
    uniform,
)
from edgemoe.errors import AllocationError, BudgetError
from edgemoe.expert_set import everything
from edgemoe.loss_curves import LossCurves, expected_loss

ANALYSIS = Path(__file__).parents[2] / "shared" / "models" / "tiny-moe" / "analysis.json"

Scores = npt.NDArray[np.float64]
Way = Callable[[Scores, ExpertLayers, ExpertBudget], ExpertSet]


def by_curves(scores: Scores, layers: ExpertLayers, budget: ExpertBudget) -> ExpertSet:
    """`measured`, with curves that follow from the scores."""
    sizes = (*sorted({1, layers.n_expert // 3 + 1, layers.n_expert} - {layers.n_expert}), layers.n_expert)
    rows = np.nan_to_num(scores[:, : len(sizes)])
    rows[:, -1] = 0
    return measured(scores, layers, budget, LossCurves(sizes, rows))


WAYS = {"uniform": uniform, "by_mass": by_mass, "measured": by_curves}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
nested_ways = pytest.mark.parametrize("way", [uniform, by_mass], ids=["uniform", "by_mass"])


@st.composite
def models(draw: st.DrawFn) -> ExpertLayers:
    n_layer = draw(st.integers(1, 5))
    n_group = draw(st.sampled_from([1, 1, 2, 4]))
    n_group_used = draw(st.integers(1, n_group))
    n_expert = n_group * draw(st.integers(2, 24 // n_group))
    most = n_expert // n_group * n_group_used
    used = draw(st.lists(st.integers(1, min(most, 8)), min_size=n_layer, max_size=n_layer))
    size = draw(st.lists(st.integers(1, 30), min_size=n_layer, max_size=n_layer))
    first = draw(st.integers(0, 3))
    return ExpertLayers(tuple(range(first, first + n_layer)), n_expert, tuple(used), tuple(size), n_group, n_group_used)


@st.composite
def scored(draw: st.DrawFn, gaps: bool = True) -> tuple[ExpertLayers, Scores]:
    layers = draw(models())
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 100)
    scores = draw(hnp.arrays(np.float64, (len(layers.numbers), layers.n_expert), elements=values))
    if gaps and draw(st.integers(0, 3)) == 0:
        scores[draw(st.integers(0, len(scores) - 1))] = np.nan
        scores[0, draw(st.integers(0, layers.n_expert - 1))] = np.nan
    return layers, scores


def budgets(layers: ExpertLayers) -> st.SearchStrategy[ExpertBudget]:
    """From below the floor to more than everything."""
    whole = layers.n_expert * sum(layers.expert_bytes)
    per_layer = st.floats(0.5, layers.n_expert + 2).map(lambda mean: ExpertBudget(per_layer=mean))
    return per_layer | st.integers(1, whole + 9).map(lambda n: ExpertBudget(n_bytes=n))


def mask_of(found: ExpertSet) -> npt.NDArray[np.bool_]:
    """Which experts are kept, [L, N]."""
    return np.array([np.isin(np.arange(found.n_expert), ids) for ids in found.kept])


def spent(found: ExpertSet, layers: ExpertLayers, budget: ExpertBudget) -> float:
    return found.mean_kept if budget.n_bytes is None else found.n_bytes(layers.expert_bytes)


@every_way
@given(data=st.data())
def test_limits_floors_groups_and_ranks(way: Way, data: st.DataObject) -> None:
    layers, scores = data.draw(scored())
    budget = data.draw(budgets(layers))
    try:
        found = way(scores, layers, budget)
    except BudgetError as error:
        assert error.needed is not None and error.needed > 0
        if budget.n_bytes is not None:
            assert error.needed > budget.n_bytes
        way(scores, layers, ExpertBudget(n_bytes=error.needed))
        return
    limit = budget.per_layer if budget.n_bytes is None else budget.n_bytes
    assert limit is not None and spent(found, layers, budget) <= limit + 1e-6
    assert found == way(scores.copy(), layers, budget)
    assert found.why.endswith(f"from {budget}")
    assert (found.layers, found.n_expert) == (layers.numbers, layers.n_expert)

    mask = mask_of(found)
    assert all(n >= k for n, k in zip(found.sizes, layers.floor, strict=True))
    assert mask[np.isnan(scores)].all()
    groups = mask.reshape(len(mask), layers.n_group, -1).sum(axis=2)
    assert (groups == groups[:, :1]).all()
    if layers.n_group > 1:
        assert (groups >= 2).all()
    assert (groups[:, 0] * layers.n_group_used >= layers.n_expert_used).all()
    # Nobody who was dropped ranks above anybody who was kept, in any layer and group.
    for row, kept in zip(
        scores.reshape(-1, layers.n_expert // layers.n_group), mask.reshape(groups.size, -1), strict=True
    ):
        rank = sorted(range(len(row)), key=lambda i: (-np.inf if np.isnan(row[i]) else -row[i], i))
        assert sorted(rank[: kept.sum()]) == np.flatnonzero(kept).tolist()


@every_way
@given(data=st.data())
def test_a_sufficient_budget_keeps_what_is_worth_keeping(way: Way, data: st.DataObject) -> None:
    layers, scores = data.draw(scored())
    found = way(scores, layers, ExpertBudget(per_layer=layers.n_expert))
    if way is by_curves:
        assert "expected loss, +0.000" in found.why
    else:
        assert found == everything(layers)


@nested_ways
@given(data=st.data())
def test_larger_budgets_keep_what_smaller_ones_kept(way: Way, data: st.DataObject) -> None:
    layers, scores = data.draw(scored())
    small, large = data.draw(budgets(layers)), data.draw(budgets(layers))
    assume((small.n_bytes is None) == (large.n_bytes is None))
    try:
        first, second = way(scores, layers, small), way(scores, layers, large)
    except BudgetError:
        return
    if first.n_kept > second.n_kept:
        first, second = second, first
    assert first.missing_from(second) == ()


@given(data=st.data())
def test_larger_budgets_never_lose_more(data: st.DataObject) -> None:
    layers, scores = data.draw(scored(gaps=False))
    means = sorted(data.draw(st.lists(st.floats(1, layers.n_expert), min_size=2, max_size=4)))
    whole = layers.n_expert
    sizes = (1, whole // 2, whole) if whole > 3 else (1, whole)
    rows = scores[:, : len(sizes)].copy()
    rows[:, -1] = 0
    curves = LossCurves(sizes, rows)
    try:
        found = [measured(scores, layers, ExpertBudget(per_layer=mean), curves) for mean in means]
    except BudgetError:
        return
    reached = [expected_loss(one.sizes, curves) for one in found]
    assert reached == sorted(reached, reverse=True)


def flat(n_layer: int, n_expert: int, k: int, **more: int) -> ExpertLayers:
    return ExpertLayers(tuple(range(n_layer)), n_expert, (k,) * n_layer, (100,) * n_layer, **more)


def test_the_papers_rule() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.5], [3.0, -2.0, -1.0, -3.0]])
    found = uniform(scores, flat(2, 4, 1), ExpertBudget(per_layer=2))
    assert found.kept == ((1, 2), (0, 2))  # the tie of 2 and 3 goes to the lower number; negative scores rank too
    assert str(found) == "1/2"
    assert found.why == "uniform: the 2 best of every layer, from a budget of 2 experts per layer"
    assert uniform(scores, flat(2, 4, 1), ExpertBudget(per_layer=2.9)).kept == found.kept
    assert uniform(scores, flat(2, 4, 1), ExpertBudget(n_bytes=599)).kept == found.kept
    assert uniform(scores, flat(2, 4, 1), ExpertBudget(n_bytes=600)).sizes == (3, 3)


def test_a_layer_that_was_never_observed_stays_whole_and_the_others_pay() -> None:
    scores = np.array([[np.nan] * 4, [4.0, 3, 2, 1], [1.0, 2, 3, 4]])
    found = uniform(scores, flat(3, 4, 1), ExpertBudget(per_layer=2))
    assert found.kept == ((0, 1, 2, 3), (0,), (3,))
    assert "1 layer whole that nothing is known of" in found.why
    assert by_mass(scores, flat(3, 4, 1), ExpertBudget(per_layer=2)).kept == found.kept
    with pytest.raises(
        BudgetError, match=r"1 layer whole that nothing is known of; give at least 2 experts per layer \(600 B\)$"
    ):
        by_mass(scores, flat(3, 4, 1), ExpertBudget(per_layer=1.9))


def test_mass_goes_where_routing_is_wide() -> None:
    scores = np.array([[1.0, 1, 1, 1], [97.0, 1, 1, 1]])
    assert by_mass(scores, flat(2, 4, 1), ExpertBudget(per_layer=2.5)).kept == ((0, 1, 2, 3), (0,))
    assert by_mass(scores, flat(2, 4, 2), ExpertBudget(per_layer=2.5)).kept == ((0, 1, 2), (0, 1))
    # Twice the bytes for the same share are worth half as much.
    heavy = replace(flat(2, 4, 1), expert_bytes=(100, 1))
    assert by_mass(scores, heavy, ExpertBudget(n_bytes=104)).kept == ((0,), (0, 1, 2, 3))


def test_a_layer_without_mass_counts_as_routed_evenly() -> None:
    scores = np.array([[0.0] * 4, [0.4, 0.3, 0.2, 0.1]])
    assert by_mass(scores, flat(2, 4, 1), ExpertBudget(per_layer=3)).kept == ((0, 1, 2, 3), (0, 1))
    assert mass_share(scores, flat(2, 4, 1), 0.5).kept == ((0, 1), (0, 1))


@given(scored(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_share_of_the_mass(given: tuple[ExpertLayers, Scores], less: float, more: float) -> None:
    layers, scores = given
    less, more = sorted((less, more))
    small, large = mass_share(scores, layers, less), mass_share(scores, layers, more)
    assert small.missing_from(large) == ()
    for row, ids, size, floor in zip(scores, large.kept, large.sizes, layers.floor, strict=True):
        mass = np.nan_to_num(row)
        held = mass[list(ids)].sum()
        assert held >= more * mass.sum() * (1 - 1e-9)
        if layers.n_group == 1 and size > floor and mass.sum() > 1e-300 and not np.isnan(row).any():
            assert held - mass[list(ids)].min() < more * mass.sum()


@pytest.mark.skipif(not ANALYSIS.exists(), reason="the analysis of the test model is not beside the repository")
def test_the_test_models_analysis_is_reproduced() -> None:
    """It found 23.4 experts a layer for 95 % of the mass, mean of the 12 trained domains, in code of its own."""
    found = json.loads(ANALYSIS.read_text())
    sets = [mass_share(found["score"]["0.0"][domain], flat(8, 32, 4), 0.95) for domain in found["domains"]]
    assert np.mean([one.mean_kept for one in sets]) == pytest.approx(23.4, abs=0.05)


def test_shares_that_add_up_but_for_rounding() -> None:
    assert mass_share(np.array([[0.7, 0.2, 0.1]]), flat(1, 3, 1), 0.9).sizes == (2,)
    assert mass_share(np.array([[0.7, 0.3, 0.0]]), flat(1, 3, 1), 1.0).sizes == (2,)
    for share in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(AllocationError, match="give a number above 0 and at most 1"):
            mass_share(np.ones((1, 3)), flat(1, 3, 1), share)


def test_groups_keep_equally_many() -> None:
    layers = flat(1, 8, 2, n_group=2, n_group_used=1)
    scores = np.array([[9.0, 8, 7, 6, 1, 2, 3, 4]])
    assert uniform(scores, layers, ExpertBudget(per_layer=5)).kept == ((0, 1, 6, 7),)
    assert by_mass(scores, layers, ExpertBudget(per_layer=6)).kept == ((0, 1, 2, 5, 6, 7),)
    assert mass_share(scores, layers, 0.7).kept == ((0, 1, 2, 5, 6, 7),)
    with pytest.raises(BudgetError, match=r"activates 2 experts from 1 of 2 groups; give at least 4 experts per layer"):
        uniform(scores, layers, ExpertBudget(per_layer=3))


def test_measured_is_brute_force() -> None:
    rng = np.random.default_rng(7)
    layers = replace(flat(3, 8, 2), expert_bytes=(3, 4, 6))
    for _ in range(20):
        rows = np.append(rng.normal(0.3, 0.3, (3, 3)), np.zeros((3, 1)), axis=1)
        curves = LossCurves((1, 2, 5, 8), rows)
        budget = ExpertBudget(n_bytes=int(rng.integers(26, 104)))
        found = measured(rng.random((3, 8)), layers, budget, curves)
        best = min(
            expected_loss(sizes, curves)
            for sizes in itertools.product(range(2, 9), repeat=3)
            if np.dot(sizes, layers.expert_bytes) <= (budget.n_bytes or 0)
        )
        assert expected_loss(found.sizes, curves) == best
        assert f"the smallest expected loss, {best:+.3f} nats per token" in found.why


def test_equal_curves_are_cut_equally() -> None:
    curves = LossCurves((4, 8, 16, 32), np.tile([2.2, 1.4, 0.6, 0.0], (6, 1)))
    scores = np.random.default_rng(0).random((6, 32))
    for mean in (5, 8, 12, 20, 29):
        assert measured(scores, flat(6, 32, 4), ExpertBudget(per_layer=mean), curves).sizes == (mean,) * 6
    # What does not divide evenly goes to the earlier layers.
    assert measured(scores, flat(6, 32, 4), ExpertBudget(per_layer=62 / 6), curves).sizes == (11, 11, 10, 10, 10, 10)


def test_layers_that_lose_nothing_get_the_floor() -> None:
    rows = np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0], [0.01, -0.02, 0.0]])
    scores = np.random.default_rng(0).random((3, 16))
    found = measured(scores, flat(3, 16, 4), ExpertBudget(per_layer=6), LossCurves((4, 8, 16), rows))
    assert found.sizes == (10, 4, 4)
    rich = measured(scores, flat(3, 16, 4), ExpertBudget(per_layer=16), LossCurves((4, 8, 16), rows))
    assert rich.sizes == (16, 4, 8)  # nothing is gained from the rest of the budget
    # Nothing was measured below 8, so layers that lost nothing there are not taken to lose nothing at 4.
    blind = measured(scores, flat(3, 16, 4), ExpertBudget(per_layer=10), LossCurves((8, 16), rows[:, 1:]))
    assert blind.sizes == (16, 7, 7)
    assert "nats per token (a guess for 2 layers below 8 experts, the fewest measured), from" in blind.why
    assert "guess" not in found.why


def test_layers_without_a_curve_stay_whole() -> None:
    rows = np.array([[1.0, 0.0], [np.nan, np.nan], [1.0, 0.0]])
    found = measured(np.ones((3, 8)), flat(3, 8, 2), ExpertBudget(per_layer=4), LossCurves((2, 8), rows))
    assert found.sizes == (2, 8, 2)
    assert "1 layer whole that nothing is known of" in found.why
    with pytest.raises(BudgetError, match="give at least 4 experts per layer"):
        measured(np.ones((3, 8)), flat(3, 8, 2), ExpertBudget(per_layer=3), LossCurves((2, 8), rows))


def test_measured_finds_the_layers_that_matter() -> None:
    """On the 32-expert test model layers 0 and 1 lose 0.29 nats each at 16 experts, the six others 0.003 each."""
    per_layer = np.array([[0.6, 0.41, 0.29, 0.09, 0.0]] * 2 + [[0.02, 0.014, 0.003, 0.001, 0.0]] * 6)
    curves = LossCurves((4, 8, 16, 24, 32), per_layer)
    scores = np.random.default_rng(0).random((8, 32))
    budget = ExpertBudget(per_layer=16)
    found = measured(scores, flat(8, 32, 4), budget, curves)
    assert found.sizes[:2] == (32, 32)
    same = uniform(scores, flat(8, 32, 4), budget)
    assert expected_loss(found.sizes, curves) < expected_loss(same.sizes, curves) / 10


@given(scored(gaps=False), st.integers(0, 2**32))
def test_random_sets_have_the_sizes_of_another(given: tuple[ExpertLayers, Scores], seed: int) -> None:
    layers, scores = given
    like = mass_share(scores, layers, 0.6)
    found = random_like(like, layers, seed)
    assert found.sizes == like.sizes
    assert found == random_like(like, layers, seed)
    groups = mask_of(found).reshape(len(scores), layers.n_group, -1).sum(axis=2)
    assert (groups == groups[:, :1]).all()


def test_random_sets_differ_by_seed_and_are_pinned() -> None:
    like = uniform(np.ones((2, 16)), flat(2, 16, 2), ExpertBudget(per_layer=4))
    drawn = {random_like(like, flat(2, 16, 2), seed).kept for seed in range(10)}
    assert len(drawn) == 10
    assert random_like(like, flat(2, 16, 2), 1).kept == ((1, 3, 6, 13), (4, 7, 8, 13))
    with pytest.raises(AllocationError, match="give a set of this model"):
        random_like(like, flat(3, 16, 2), 0)


@every_way
def test_scores_that_do_not_fit(way: Way) -> None:
    layers, budget = flat(2, 4, 1), ExpertBudget(per_layer=2)
    with pytest.raises(AllocationError, match=r"shape \[2, 5\] for a model of 2 layers with 4 experts; score this"):
        way(np.ones((2, 5)), layers, budget)
    with pytest.raises(AllocationError, match="a score of layer 1 is infinite"):
        uniform(np.array([[1.0] * 4, [1, 2, np.inf, 3]]), layers, budget)


def test_negative_mass_and_foreign_curves() -> None:
    with pytest.raises(AllocationError, match=r"a score of layer 1 is -2, and a share of the mass cannot be negative"):
        by_mass(np.array([[1.0, 2], [-2, 1]]), flat(2, 2, 1), ExpertBudget(per_layer=1))
    with pytest.raises(AllocationError, match="do not fit a model of 2 with 4; measure this model"):
        measured(np.ones((2, 4)), flat(2, 4, 1), ExpertBudget(per_layer=1), LossCurves((2, 8), np.zeros((2, 2))))


@every_way
def test_the_refusal_names_what_would_do(way: Way) -> None:
    scores = np.random.default_rng(0).random((2, 16))
    with pytest.raises(
        BudgetError,
        match=r"^a budget of 3 experts per layer is too small: a token activates 8 experts; give at least 8 experts"
        r" per layer \(1\.56 KiB\) or lower k of k/M$",
    ) as caught:
        way(scores, flat(2, 16, 8), ExpertBudget(per_layer=3))
    assert caught.value.needed == 1600
    assert way(scores, flat(2, 16, 8).activating(3), ExpertBudget(per_layer=3)).sizes == (3, 3)


def test_budgets_that_say_nothing() -> None:
    for arguments in ({}, {"per_layer": 8, "n_bytes": 9}, {"per_layer": 0}, {"n_bytes": -1}, {"per_layer": np.nan}):
        with pytest.raises(BudgetError, match="give one positive number of either"):
            ExpertBudget(**arguments)
    assert uniform(np.ones((6, 32)), flat(6, 32, 1), ExpertBudget(per_layer=7 * (1 / 3) * 3)).sizes == (7,) * 6
    huge = uniform(np.ones((2, 4)), flat(2, 4, 1), ExpertBudget(n_bytes=10**30))
    assert huge == everything(flat(2, 4, 1))
