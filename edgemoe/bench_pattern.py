"""What a task's pattern would say of given routes: which experts their prompt uses most, and routes within these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgemoe.routes import Ids

__all__ = ["best_experts", "prompt_counts", "within"]

Counts = npt.NDArray[np.int64]


def prompt_counts(prompt: Ids, n_expert: int) -> Counts:
    """How often a prompt uses each expert, int64 [layers, n_expert], of int32 [tokens, layers, k]."""
    n_layer = prompt.shape[1]
    entries = prompt + n_expert * np.arange(n_layer)[:, None]
    return np.bincount(entries.ravel(), minlength=n_layer * n_expert).reshape(n_layer, n_expert)


def best_experts(
    counts: Counts, expert_bytes: Sequence[int], n_bytes: int, least: int, share: float = 1.0
) -> list[list[int]]:
    """Choose the experts with the highest counts of all layers that fit.

    Parameters
    ----------
    counts : int64 [layers, n_expert]
        Uses.
    expert_bytes : sequence of int
        Bytes of one expert of each layer.
    n_bytes : int
        Room for them.
    least : int
        Experts of each layer that are taken before any other, whatever the room.
    share : float
        Stop when so much of all uses is covered, 0 to 1.

    Returns
    -------
    list of lists of int
        Ids of each layer, ascending.
    """
    n_expert = counts.shape[1]
    order = np.argsort(-counts, axis=1, kind="stable")
    chosen = [set(row[:least].tolist()) for row in order]
    room = n_bytes - sum(least * size for size in expert_bytes)
    enough = share * counts.sum() - sum(int(counts[layer, list(ids)].sum()) for layer, ids in enumerate(chosen))
    for entry in np.argsort(-counts, axis=None, kind="stable").tolist():
        layer, expert = divmod(entry, n_expert)
        if enough <= 0 or counts[layer, expert] == 0:
            break
        if expert in chosen[layer] or expert_bytes[layer] > room:
            continue
        chosen[layer].add(expert)
        room -= expert_bytes[layer]
        enough -= int(counts[layer, expert])
    return [sorted(ids) for ids in chosen]


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
