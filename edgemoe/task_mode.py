"""Which task's experts a running model uses: matched to what it reads, or pinned by the user.

``task`` routes within the task's set (PreMoe's k/M); a miss cannot happen, and the model is the pruned one. ``auto``
lets every expert be chosen, has the task's set in memory first, and counts its experts as likelier than others when
some have to leave: the answers are exact.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgemoe.allocation import ExpertBudget, by_mass, mass_share, measured, uniform
from edgemoe.errors import BudgetError, PatternError
from edgemoe.expert_set import ExpertLayers, ExpertSet
from edgemoe.fingerprint import fingerprint
from edgemoe.index import ExpertIndex
from edgemoe.keep import Keep
from edgemoe.matcher import Match, TaskDocuments, TaskMatcher, next_task
from edgemoe.memory import format_bytes
from edgemoe.patterns import Pattern, PatternStore
from edgemoe.plan import MIB, ExpertPlan, budget_holding, expert_pages
from edgemoe.quality import SAFE_CHANGE, safe_point
from edgemoe.residency import Residency, Switch
from edgemoe.routed_shares import RoutedShares

__all__ = ["TaskMode", "choose", "open_tasks"]

MODES = ("task", "auto")

WARM_SHARE = 0.95
"""Of each layer's routed mass: what ``auto`` reads ahead at most. The rest is read when it is asked for."""

FEWEST_TOKENS = 16
"""New tokens that a turn must have to question a task that is active already."""


def choose(pattern: Pattern, layers: ExpertLayers, budget: ExpertBudget) -> ExpertSet:
    """Spend a budget on a task: where cutting costs least if that was measured, else by routed mass.

    Raises
    ------
    BudgetError
        If it cannot hold as many experts as a token activates.
    """
    if pattern.sensitivity is not None:
        return measured(pattern.rank_scores, layers, budget, pattern.sensitivity)
    scores = pattern.scores[pattern.criterion]
    if scores.min() < 0:
        return uniform(pattern.rank_scores, layers, budget)
    return by_mass(scores, layers, budget)


class TaskMode:
    """The tasks of a model, the one that is active, and its experts.

    Parameters
    ----------
    mode : str
        ``task`` or ``auto``.
    patterns : sequence of Pattern
        All tasks known; at least one.
    layers : ExpertLayers
        The model, with the bytes of pages that an expert takes.
    running_layers : tuple of int
        Layers whose routers see every token of a prompt.
    keep : Keep, optional
        Experts of a layer on average; by default what the arena holds. In ``task`` mode only.
    notes : Mapping of str to str, optional
        What a user should know of a task, as of one that was profiled with another quantization.

    Attributes
    ----------
    active : str or None
        The task whose experts are in force; None for all experts.
    pinned : bool
        Whether the user chose it, so that prompts do not change it.
    match : Match or None
        What the latest prompt was found to be.
    switch : Switch or None
        What the latest change of task took.
    """

    def __init__(
        self,
        mode: str,
        patterns: Sequence[Pattern],
        layers: ExpertLayers,
        running_layers: tuple[int, ...],
        keep: Keep | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.mode = mode
        self._notes = dict(notes or {})
        self.active: str | None = None
        self.pinned = False
        self.match: Match | None = None
        self.switch: Switch | None = None
        self._patterns = {pattern.task: pattern for pattern in patterns}
        self._layers = layers
        self._keep = keep
        self._budget = ExpertBudget(n_bytes=1)
        self._sets: dict[str, ExpertSet] = {}
        self._residency: Residency | None = None
        documents = {pattern.task: TaskDocuments.of(pattern) for pattern in patterns}
        running = tuple(layers.numbers.index(layer) for layer in running_layers)
        self._first = TaskMatcher(documents, (0,))
        self._deep = TaskMatcher(documents, running or (0,))

    @property
    def k(self) -> int | None:
        """Experts per token, where the user lowered it."""
        return None if self._keep is None else self._keep.k

    @property
    def k_a(self) -> int:
        """Logits of a token that its shares are made of: those of the tasks' documents, also where `k` is lower."""
        return max(max(pattern.fingerprint.n_expert_used) for pattern in self._patterns.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Tasks that may be active."""
        return tuple(self._patterns)

    @property
    def active_set(self) -> ExpertSet | None:
        """Experts of the active task, None for all."""
        return None if self.active is None else self.experts_of(self.active)

    @property
    def note(self) -> str | None:
        """What a user should know of the active task."""
        return None if self.active is None else self._notes.get(self.active)

    def pattern(self, task: str) -> Pattern:
        """One of the tasks.

        Raises
        ------
        PatternError
            If it is not among them.
        """
        if task not in self._patterns:
            raise PatternError(f"there is no task {task!r}; known are {', '.join(self.names)}")
        return self._patterns[task]

    def settle(self, plan: ExpertPlan, plan_within: Callable[[int], ExpertPlan]) -> None:
        """Choose how many experts tasks have; before the model is loaded.

        Parameters
        ----------
        plan : ExpertPlan
            What the model is opened with.
        plan_within : callable
            ``plan_within(bytes)`` plans another budget, to name one that would do.

        Raises
        ------
        BudgetError
            If the experts asked for do not fit the arena, or are so few that routing within them was measured to be
            unsafe; ``needed`` is the budget that would do.
        """
        one_each = sum(self._layers.expert_bytes)
        everything_fits = plan.resident_share == 1.0
        if self._keep is None:
            wanted = one_each * self._layers.n_expert if everything_fits else plan.arena_bytes
            least = self._layers.floor_bytes
            if self.mode == "task" and wanted < least:
                needed = budget_holding(plan, least, plan_within)
                raise BudgetError(
                    f"experts=task holds at least {format_bytes(least)} of experts, as many as routing needs in all"
                    f" layers, but {plan.budget.reason} leaves {format_bytes(plan.arena_bytes)}; give"
                    f" ram={needed // MIB}MiB, or experts=auto",
                    needed=needed,
                )
        else:
            # M experts of each layer on average, whichever layers they are in.
            wanted = one_each * self._keep.m
            if wanted > plan.arena_bytes and not everything_fits:
                needed = budget_holding(plan, wanted, plan_within)
                raise BudgetError(
                    f"keep={self._keep} takes {format_bytes(wanted)} of experts, but {plan.budget.reason} leaves"
                    f" {format_bytes(plan.arena_bytes)}; give ram={needed // MIB}MiB, or keep fewer",
                    needed=needed,
                )
        self._budget = ExpertBudget(n_bytes=wanted)
        for task in self._patterns:
            self.experts_of(task)  # refused now, not in mid-conversation
        if self.mode == "task":
            self._refuse_unsafe(plan, plan_within)

    def _refuse_unsafe(self, plan: ExpertPlan, plan_within: Callable[[int], ExpertPlan]) -> None:
        """Refuse fewer experts than were measured to be safe, naming the task that needs most."""
        safe, task = max((safe_point(pattern) or 0, task) for task, pattern in self._patterns.items())
        chosen = self.experts_of(task)
        if math.ceil(chosen.mean_kept) >= safe:
            return
        needed = budget_holding(plan, sum(self._layers.expert_bytes) * safe, plan_within)
        more = f" with ram={needed // MIB}MiB" if needed > plan.budget.bytes else ""
        raise BudgetError(
            f"{chosen} experts are too few for task {task}: fewer than {safe} of {chosen.n_expert} in a layer were"
            f" measured to cost more than {SAFE_CHANGE:.0%} perplexity; keep {safe}{more}, or give experts=auto",
            needed=needed,
        )

    def attach(self, residency: Residency) -> None:
        """Take over the loaded model."""
        self._residency = residency

    def experts_of(self, task: str) -> ExpertSet:
        """Experts that a task would have in force: all that may be chosen, or that are in memory first.

        Raises
        ------
        PatternError
            If there is no such task.
        BudgetError
            If the budget cannot hold as many experts as a token activates.
        """
        pattern = self.pattern(task)
        if task not in self._sets:
            budget = self._budget if self.mode == "task" else self._warm_budget(pattern)
            self._sets[task] = choose(pattern, self._layers, budget)
        return self._sets[task]

    def pin(self, task: str | None) -> None:
        """Use this task, or all experts, whatever the prompts are about.

        Raises
        ------
        PatternError
            If there is no such task.
        """
        self._activate(task)
        self.pinned = True

    def resume(self, task: str | None, pinned: bool, residents: Mapping[int, tuple[int, ...]]) -> Switch:
        """Go on as a saved session left off, with the experts in memory that it had.

        Raises
        ------
        PatternError
            If there is no such task.
        """
        assert self._residency is not None, "a model is loaded"
        if task is not None and self.mode == "task":
            self.switch = self._residency.restrict(self.experts_of(task))
        else:
            self.switch = self._residency.restore(residents, None if task is None else self.experts_of(task))
        self.active, self.pinned = task, pinned
        return self.switch

    def release(self) -> None:
        """Let the next prompt decide again."""
        self.pinned = False

    def match_of(self, heard: RoutedShares) -> Match:
        """Say which task a text belongs to; nothing changes."""
        matcher = self._first if len(heard.layers) == 1 else self._deep
        return matcher.match(heard.shares(), heard.n_token)

    def consider(self, heard: RoutedShares) -> bool:
        """Match what was read to the tasks, and put the nearest one's experts into force.

        Parameters
        ----------
        heard : RoutedShares
            Of a prompt's new tokens, from the first MoE layer or from all running layers.

        Returns
        -------
        bool
            Whether another task, or none, is active now.
        """
        if self.active is not None and heard.n_token < FEWEST_TOKENS:
            return False
        self.match = self.match_of(heard)
        task = next_task(self.active, self.match)
        if task == self.active:
            return False
        self._activate(task)
        return True

    def _activate(self, task: str | None) -> None:
        assert self._residency is not None, "a model is loaded"
        if task is None:
            self._residency.allow_all()
            self.switch = None
        elif self.mode == "task":
            self.switch = self._residency.restrict(self.experts_of(task))
        else:
            self.switch = self._residency.prefer(self.experts_of(task))
        self.active = task

    def _warm_budget(self, pattern: Pattern) -> ExpertBudget:
        """Bytes that ``auto`` reads ahead: what the arena holds, but not experts that hardly any token needs."""
        assert self._budget.n_bytes is not None
        mass = pattern.scores[pattern.criterion]
        most = mass_share(np.maximum(mass, 0), self._layers, WARM_SHARE).n_bytes(self._layers.expert_bytes)
        return ExpertBudget(n_bytes=max(self._layers.floor_bytes, min(self._budget.n_bytes, most)))


def open_tasks(
    index: ExpertIndex, experts: str, keep: str | None, task: str | None, folder: str | os.PathLike[str] | None
) -> TaskMode | None:
    """Read a model's tasks as ``experts`` asks; None for ``all``. Parameters as those of `edgemoe.backend.Llama`.

    Raises
    ------
    PatternError
        If there is no task yet, or not that one.
    BudgetError
        If the options contradict each other or the model.
    """
    if experts not in ("all", *MODES):
        raise BudgetError(f"experts={experts} is unknown; give all, task or auto")
    if experts != "task" and keep is not None:
        raise BudgetError(f"keep={keep} limits the experts, which experts={experts} does not; give experts=task")
    if experts == "all":
        if task is not None:
            raise BudgetError(f"task={task} says nothing with experts=all; give experts=task or experts=auto")
        return None
    kept = None if keep is None else Keep.parse(keep)
    layers = replace(ExpertLayers.of(index), expert_bytes=expert_pages(index))
    if kept is not None and kept.k is not None:
        layers = layers.activating(kept.k)
    if kept is not None and not max(layers.floor) <= kept.m <= index.n_expert:
        raise BudgetError(
            f"keep={keep} cannot be: {index.name} has {index.n_expert} experts in a layer and needs at least"
            f" {max(layers.floor)} of them; give a number between"
        )
    store = PatternStore(fingerprint(index), None if folder is None else Path(folder))
    if task is not None:
        store.load(task)
    found = store.list()
    if not found.patterns:
        problem = f" ({found.problems[0]})" if found.problems else ""
        raise PatternError(f"there is no task for {index.name} in {store.folder}{problem}; run edgemoe profile first")
    notes = {pattern.task: note for pattern in found.patterns if (note := pattern.note_for(store.model))}
    return TaskMode(experts, found.patterns, layers, index.running_layers, kept, notes)
