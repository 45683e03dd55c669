"""Which sets of experts are compared on one task's text: its own, and those that show what its own is worth.

For each number of experts M the task's own set is spread over the layers in every way there is, and held against the
set of the most similar other task, of a middling dissimilar one, of all tasks together, against random sets of the same
sizes, against the task's other criteria, and against what the experts' weights alone say. Everything follows
from stored patterns; no model is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgemoe.allocation import ExpertBudget, by_mass, measured, random_like, uniform
from edgemoe.expert_set import ExpertLayers, ExpertSet, everything
from edgemoe.loss_curves import LossCurves
from edgemoe.pattern import Pattern, merge
from edgemoe.quality import ALLOCATIONS

__all__ = [
    "ALL_TASKS",
    "FULL",
    "NEAREST",
    "OWN",
    "RANDOM",
    "WEIGHTS",
    "WRONG",
    "Arm",
    "arms_of",
    "generalist",
    "spread",
    "tasks_by_similarity",
]

FULL = "full model"
OWN = "own"
NEAREST = "nearest task"
WRONG = "median-wrong"
ALL_TASKS = "all tasks"
RANDOM = "random"
WEIGHTS = "weights"

SEEDS = (1, 2, 3)
"""Of random sets."""

_SIMILAR_BY = "soft-count"
"""Criterion that tasks are compared by where both have it."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to choose experts.

    Attributes
    ----------
    name : str
        What kind of set: `OWN` and so on.
    task : str
        Whose pattern chose: a task's name, else empty.
    allocation, criterion : str
        How experts were spread over the layers (empty for the full model) and ranked.
    keep : int
        M that was asked for, mean over layers.
    sets : tuple of ExpertSet
        One, or several random ones.
    """

    name: str
    task: str
    allocation: str
    criterion: str
    keep: int
    sets: tuple[ExpertSet, ...]

    @property
    def mean_kept(self) -> float:
        """Experts kept per layer, mean over layers; equal for all sets."""
        return self.sets[0].mean_kept


def arms_of(
    pattern: Pattern,
    others: Sequence[Pattern],
    layers: ExpertLayers,
    keeps: Sequence[int],
    *,
    criteria: bool = True,
    aimer: npt.NDArray[np.float64] | None = None,
) -> tuple[Arm, ...]:
    """List what is to be measured on one task's text.

    Parameters
    ----------
    pattern : Pattern
        The task.
    others : sequence of Pattern
        All tasks of the model; the task itself, and merges of it, are told apart by their sources.
    layers : ExpertLayers
        The model.
    keeps : sequence of int
        Numbers of experts M, mean over layers.
    criteria : bool
        Compare the task's other criteria too.
    aimer : float64 array [L, N], optional
        Scores of the experts' weights alone (`edgemoe.weight_scores.aimer`), whatever the task: compared, too.

    Returns
    -------
    tuple of Arm
        The full model first.

    Raises
    ------
    BudgetError
        If so few experts cannot route.
    PatternError
        If the tasks are ranked by different criteria, so that there is no set of all of them.
    """
    ranked = tasks_by_similarity(pattern, others)
    rivals = [(NEAREST, ranked[0])] if ranked else []
    # With one or two other tasks there is no middle that differs from the nearest one.
    if len(ranked) > 1:
        rivals.append((WRONG, ranked[len(ranked) // 2]))
    everyone = generalist([pattern, *ranked])
    if everyone is not None:
        rivals.append((ALL_TASKS, everyone))

    arms = [Arm(FULL, "", "", "", layers.n_expert, (everything(layers),))]
    for keep in keeps:
        arms += _own(pattern, layers, keep)
        for name, rival in rivals:
            task = "" if name == ALL_TASKS else rival.task
            for allocation in _plain_and_best(rival):
                chosen = spread(rival, rival.criterion, allocation, layers, keep)
                arms.append(Arm(name, task, allocation, rival.criterion, keep, (chosen,)))
        arms += _random(pattern, layers, keep)
        if criteria:
            arms += _criteria(pattern, layers, keep)
        if aimer is not None:
            # The paper cuts all layers alike, and its scores are comparable within a layer only.
            chosen = uniform(aimer, layers, ExpertBudget(per_layer=keep))
            arms.append(Arm(WEIGHTS, "", "uniform", "aimer", keep, (chosen,)))
    return tuple(arms)


def spread(pattern: Pattern, criterion: str, allocation: str, layers: ExpertLayers, keep: int) -> ExpertSet:
    """Choose a task's experts by one of its criteria and one of `ALLOCATIONS`.

    Raises
    ------
    BudgetError
        If so few experts cannot route.
    """
    budget = ExpertBudget(per_layer=keep)
    scores: Floats = pattern.rank_scores if criterion == pattern.criterion else pattern.scores[criterion]
    if allocation == "uniform":
        return uniform(scores, layers, budget)
    if allocation == "mass":
        return by_mass(pattern.scores[criterion], layers, budget)
    assert pattern.sensitivity is not None, "asked for only where it was measured"
    return measured(scores, layers, budget, pattern.sensitivity)


def tasks_by_similarity(pattern: Pattern, others: Sequence[Pattern]) -> list[Pattern]:
    """Other tasks, the most similar first: cosine of the scores of all layers, summed over experts and layers.

    Tasks that share profiled text with this one, as merges of it do, are left out.
    """
    mine = _hashes(pattern)
    strangers = [other for other in others if other.task != pattern.task and not mine & _hashes(other)]
    return sorted(strangers, key=lambda other: (-_cosine(pattern, other), other.task))


def generalist(patterns: Sequence[Pattern]) -> Pattern | None:
    """Merge all tasks into one; of tasks that share profiled text, the more special ones.

    Returns
    -------
    Pattern or None
        With the token-weighted mean of the tasks' loss curves, if all were measured at the same sizes. None if there
        are not two tasks to merge.

    Raises
    ------
    PatternError
        If they are ranked by different criteria.
    """
    apart: list[Pattern] = []
    for pattern in sorted(patterns, key=lambda pattern: (len(pattern.sources), pattern.task)):
        if not any(_hashes(pattern) & _hashes(other) for other in apart):
            apart.append(pattern)
    if len(apart) < 2:
        return None
    curves = [pattern.sensitivity for pattern in apart if pattern.sensitivity is not None]
    merged = merge(apart, "all-tasks")
    if len(curves) < len(apart) or len({curve.sizes for curve in curves}) > 1:
        return merged
    weights = np.array([pattern.n_tokens for pattern in apart], np.float64)
    mean = np.tensordot(weights / weights.sum(), np.stack([curve.loss for curve in curves]), 1)
    return replace(merged, sensitivity=LossCurves(curves[0].sizes, mean))


def _own(pattern: Pattern, layers: ExpertLayers, keep: int) -> Iterator[Arm]:
    for allocation in reversed(_allocations(pattern, pattern.criterion)):
        chosen = spread(pattern, pattern.criterion, allocation, layers, keep)
        yield Arm(OWN, pattern.task, allocation, pattern.criterion, keep, (chosen,))


def _random(pattern: Pattern, layers: ExpertLayers, keep: int) -> Iterator[Arm]:
    for allocation in _plain_and_best(pattern):
        like = spread(pattern, pattern.criterion, allocation, layers, keep)
        chosen = tuple(random_like(like, layers, seed) for seed in SEEDS)
        yield Arm(RANDOM, "", allocation, RANDOM, keep, chosen)


def _criteria(pattern: Pattern, layers: ExpertLayers, keep: int) -> Iterator[Arm]:
    best = _allocations(pattern, pattern.criterion)[0]
    for criterion in sorted(set(pattern.scores) - {pattern.criterion}):
        for allocation in _allocations(pattern, criterion):
            if allocation in ("uniform", best):
                chosen = spread(pattern, criterion, allocation, layers, keep)
                yield Arm(OWN, pattern.task, allocation, criterion, keep, (chosen,))


def _allocations(pattern: Pattern, criterion: str) -> list[str]:
    """Those that the pattern has the means for, the best first."""
    possible = {
        "measured": pattern.sensitivity is not None,
        "mass": bool(pattern.scores[criterion].min() >= 0),
        "uniform": True,
    }
    return [allocation for allocation in ALLOCATIONS if possible[allocation]]


def _plain_and_best(pattern: Pattern) -> list[str]:
    best = _allocations(pattern, pattern.criterion)[0]
    return ["uniform"] if best == "uniform" else ["uniform", best]


def _hashes(pattern: Pattern) -> set[str]:
    return {source.calibration_hash for source in pattern.sources}


def _cosine(one: Pattern, other: Pattern) -> float:
    common = next((name for name in (_SIMILAR_BY, one.criterion) if name in one.scores and name in other.scores), None)
    if common is None:
        return 0.0
    a, b = (pattern.scores[common].astype(np.float64).ravel() for pattern in (one, other))
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), np.finfo(np.float64).tiny))
