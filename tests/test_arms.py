"""Which sets are compared: properties that make the comparison fair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_patterns import tiny_model, tiny_pattern

from edgemoe.arms import (
    ALL_TASKS,
    FULL,
    NEAREST,
    OWN,
    RANDOM,
    WEIGHTS,
    WRONG,
    Arm,
    arms_of,
    generalist,
    tasks_by_similarity,
)
from edgemoe.errors import BudgetError, PatternError
from edgemoe.evidence import Source
from edgemoe.expert_set import ExpertLayers, everything
from edgemoe.loss_curves import LossCurves
from edgemoe.pattern import Pattern, merge

MODEL = tiny_model(4, 16)
LAYERS = ExpertLayers(MODEL.layers, 16, (2,) * 4, (100,) * 4)
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon")


def pattern(task: str, *, measured: bool = True, n_tokens: int = 100) -> Pattern:
    rng = np.random.default_rng(NAMES.index(task))
    shape = (4, 16)
    scores = {
        "peu": rng.random(shape, dtype=np.float32),
        "soft-count": rng.random(shape, dtype=np.float32),
        "frequency": rng.random(shape, dtype=np.float32),
        "tcess": rng.standard_normal(shape, dtype=np.float32),
    }
    made = tiny_pattern(task, MODEL, scores=scores, measured=False)
    source = Source(task, f"{NAMES.index(task) + 1:064x}", 2, n_tokens, False, False)
    loss = np.hstack([np.sort(rng.random((4, 3)), axis=1)[:, ::-1], np.zeros((4, 1))])
    return replace(made, sources=(source,), sensitivity=LossCurves((2, 4, 8, 16), loss) if measured else None)


TASKS = [pattern(name) for name in NAMES]
KEEPS = (12, 8, 4)


def arms(**options: Any) -> tuple[Arm, ...]:
    return arms_of(TASKS[0], TASKS, LAYERS, KEEPS, **options)


def test_the_full_model_comes_first() -> None:
    first = arms()[0]
    assert (first.name, first.keep, first.sets) == (FULL, 16, (everything(LAYERS),))
    assert [arm.name for arm in arms()].count(FULL) == 1


def test_every_size_has_every_arm() -> None:
    expected = {
        *((OWN, allocation, "peu") for allocation in ("uniform", "mass", "measured")),
        *((name, how, "peu") for name in (NEAREST, WRONG, ALL_TASKS) for how in ("uniform", "measured")),
        *((RANDOM, allocation, RANDOM) for allocation in ("uniform", "measured")),
        *((OWN, how, other) for other in ("soft-count", "frequency", "tcess") for how in ("uniform", "measured")),
    }
    for keep in KEEPS:
        found = [(arm.name, arm.allocation, arm.criterion) for arm in arms() if arm.keep == keep]
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_weights_alone_are_an_arm_that_knows_no_task() -> None:
    aimer = np.arange(LAYERS.n_expert, dtype=np.float64) * np.ones((len(LAYERS.numbers), 1))
    for keep in KEEPS:
        (arm,) = (arm for arm in arms(aimer=aimer) if arm.name == WEIGHTS and arm.keep == keep)
        best = tuple(range(LAYERS.n_expert - keep, LAYERS.n_expert))
        assert arm.sets[0].kept == (best,) * len(LAYERS.numbers)
        assert (arm.task, arm.allocation, arm.criterion) == ("", "uniform", "aimer")


def test_main_arms_leave_other_criteria_out() -> None:
    assert {arm.criterion for arm in arms(criteria=False)} == {"", "peu", RANDOM}


def test_no_set_is_larger_than_asked_for() -> None:
    for arm in arms():
        assert all(chosen.mean_kept <= arm.keep for chosen in arm.sets)
        assert all(len(ids) >= 2 for chosen in arm.sets for ids in chosen.kept)


def test_random_sets_are_as_large_as_the_own_one_in_every_layer() -> None:
    for arm in arms():
        if arm.name == RANDOM:
            (own,) = (
                other.sets[0]
                for other in arms(criteria=False)
                if (other.name, other.allocation, other.keep) == (OWN, arm.allocation, arm.keep)
            )
            assert len(set(arm.sets)) == 3
            assert all(chosen.sizes == own.sizes and chosen != own for chosen in arm.sets)


def test_other_tasks_bring_their_own_sizes() -> None:
    """A wrong task's measured set is what that task would use itself."""
    by_task = {task.task: task for task in TASKS}
    for arm in arms():
        if arm.name in (NEAREST, WRONG):
            assert arm.task != "alpha"
            (theirs,) = (
                other.sets
                for other in arms_of(by_task[arm.task], [], LAYERS, KEEPS, criteria=False)
                if (other.name, other.allocation, other.keep) == (OWN, arm.allocation, arm.keep)
            )
            assert arm.sets == theirs


def test_tasks_are_ordered_by_the_cosine_of_soft_counts() -> None:
    def cosine(name: str) -> float:
        a, b = (TASKS[NAMES.index(n)].scores["soft-count"].ravel().astype(float) for n in ("alpha", name))
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    ranked = [task.task for task in tasks_by_similarity(TASKS[0], TASKS)]
    assert ranked == sorted(NAMES[1:], key=cosine, reverse=True)
    found = {arm.name: arm.task for arm in arms()}
    assert found[NEAREST] == ranked[0]
    assert found[WRONG] == ranked[2]  # of four


def test_tasks_that_share_text_are_no_rivals() -> None:
    both = merge(TASKS[:2], "both")
    assert "both" not in [task.task for task in tasks_by_similarity(TASKS[0], [*TASKS, both])]
    everyone, without = generalist([both, *TASKS]), generalist(TASKS)
    assert everyone is not None and without is not None
    assert everyone.n_tokens == without.n_tokens


def test_generalist_has_the_weighted_mean_of_scores_and_curves() -> None:
    few, many = pattern("alpha", n_tokens=100), pattern("beta", n_tokens=300)
    both = generalist([few, many])
    assert both is not None and both.sensitivity is not None
    assert few.sensitivity is not None and many.sensitivity is not None
    np.testing.assert_allclose(both.sensitivity.loss, 0.25 * few.sensitivity.loss + 0.75 * many.sensitivity.loss)
    np.testing.assert_allclose(both.scores["peu"], 0.25 * few.scores["peu"] + 0.75 * many.scores["peu"], rtol=1e-6)
    without = generalist([few, pattern("beta", measured=False)])
    assert without is not None and without.sensitivity is None


def test_one_task_has_no_rivals() -> None:
    alone = arms_of(TASKS[0], TASKS[:1], LAYERS, KEEPS)
    assert {arm.name for arm in alone} == {FULL, OWN, RANDOM}
    assert generalist(TASKS[:1]) is None
    assert {arm.name for arm in arms_of(TASKS[0], TASKS[:2], LAYERS, KEEPS)} == {FULL, OWN, RANDOM, NEAREST, ALL_TASKS}


def test_without_curves_mass_is_best_and_negative_scores_have_no_mass() -> None:
    plain = pattern("alpha", measured=False)
    found = {(arm.allocation, arm.criterion) for arm in arms_of(plain, [plain], LAYERS, (8,)) if arm.name == OWN}
    assert found == {
        ("uniform", "peu"),
        ("mass", "peu"),
        ("uniform", "soft-count"),
        ("mass", "soft-count"),
        ("uniform", "frequency"),
        ("mass", "frequency"),
        ("uniform", "tcess"),
    }


def test_too_few_experts() -> None:
    with pytest.raises(BudgetError, match="too small"):
        arms_of(TASKS[0], TASKS, LAYERS, (1,))


def test_tasks_ranked_by_different_criteria() -> None:
    other = replace(TASKS[1], criterion="frequency")
    with pytest.raises(PatternError, match="is ranked by"):
        arms_of(TASKS[0], [TASKS[0], other], LAYERS, KEEPS)
