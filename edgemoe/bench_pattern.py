"""What a task's pattern would say of given routes: which experts their prompt uses most, and routes within these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgemoe.allocation import ExpertBudget, by_mass, mass_share
from edgemoe.expert_set import ExpertLayers, ExpertSet
from edgemoe.routes import Ids

__all__ = ["best_experts", "prompt_counts", "within"]

Counts = npt.NDArray[np.int64]


def prompt_counts(prompt: Ids, n_expert: int) -> Counts:
    """How often a prompt uses each expert, int64 [layers, n_expert], of int32 [tokens, layers, k]."""
    n_layer = prompt.shape[1]
    entries = prompt + n_expert * np.arange(n_layer)[:, None]
    return np.bincount(entries.ravel(), minlength=n_layer * n_expert).reshape(n_layer, n_expert)


def best_experts(counts: Counts, layers: ExpertLayers, n_bytes: int, share: float) -> ExpertSet:
    """Choose what the task mode would hold if the counts were a task's.

    Parameters
    ----------
    counts : int64 [layers, n_expert]
        Uses.
    layers : ExpertLayers
        The model, an expert's size as it counts in the arena.
    n_bytes : int
        Room; what routing needs at least is taken whatever the room.
    share : float
        No more experts than hold this share of each layer's uses, above 0, at most 1.
    """
    most = mass_share(counts, layers, share).n_bytes(layers.expert_bytes)
    return by_mass(counts, layers, ExpertBudget(n_bytes=max(layers.floor_bytes, min(n_bytes, most))))


def within(rows: Ids, counts: Counts, chosen: Sequence[Sequence[int]]) -> Ids:
    """Routes of a pruned model: experts outside the set become the most used of the set that the token lacks.

    Parameters
    ----------
    rows : int32 [tokens, layers, k]
        Routes among all experts.
    counts : int64 [layers, n_expert]
        Uses, by which the set is ordered.
    chosen : sequence of sequences of int
        The set of each layer, k experts at least.

    Returns
    -------
    int32 [tokens, layers, k]
    """
    inside = rows.copy()
    for layer, ids in enumerate(chosen):
        ranked = sorted(ids, key=lambda expert: (-counts[layer, expert], expert))
        allowed = set(ids)
        for row in inside[:, layer]:
            substitutes = (expert for expert in ranked if expert not in set(row.tolist()))
            for place, expert in enumerate(row.tolist()):
                if expert not in allowed:
                    row[place] = next(substitutes)
    return inside
