"""How much a model loses when one layer alone keeps few experts, measured on a task's own text.

The loss of a cut layer is its mean KL divergence from the full model. It needs no right answers, is never negative,
and is far less noisy than the change of the text's likelihood: a few windows of text are enough to tell layers apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemoe.allocation import ExpertBudget, uniform
from edgemoe.errors import AllocationError
from edgemoe.expert_set import ExpertLayers, ExpertSet, everything
from edgemoe.loss_curves import LossCurves
from edgemoe.perplexity import measure

if TYPE_CHECKING:
    from edgemoe.backend import Llama

__all__ = ["cut_layer", "default_sizes", "sensitivity"]

_SIXTEENTHS = (2, 4, 6, 8, 12)
"""Sizes measured by default, in sixteenths of a layer."""


def default_sizes(layers: ExpertLayers) -> tuple[int, ...]:
    """Numbers of experts at which layers are measured: five from 1/8 to 3/4 of a layer, or what the model allows.

    Returns
    -------
    tuple of int
        Ascending, multiples of the number of groups, at least what every layer must keep, less than all; empty if the
        model activates all experts.
    """
    floor, n_group = max(layers.floor), layers.n_group
    wanted = {max(floor, layers.n_expert * part // 16 // n_group * n_group) for part in _SIXTEENTHS}
    return tuple(sorted(size for size in wanted if size < layers.n_expert))


def cut_layer(scores: npt.ArrayLike, layers: ExpertLayers, position: int, size: int) -> ExpertSet:
    """Keep all experts of every layer but one, and of that one the best.

    Parameters
    ----------
    scores : array-like [L, N]
        Finite; larger is better.
    layers : ExpertLayers
        The model.
    position : int
        Which of the L layers is cut.
    size : int
        Experts that it keeps.

    Raises
    ------
    BudgetError
        If a layer of that size cannot route.
    """
    best = uniform(scores, layers, ExpertBudget(per_layer=size)).kept[position]
    whole = everything(layers)
    kept = tuple(best if here == position else ids for here, ids in enumerate(whole.kept))
    return replace(whole, kept=kept, why=f"layer {layers.numbers[position]} alone cut to its {size} best")


def sensitivity(
    llama: Llama,
    windows: Sequence[Sequence[int]],
    scores: npt.ArrayLike,
    layers: ExpertLayers,
    sizes: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LossCurves:
    """Measure what each layer loses alone.

    Parameters
    ----------
    llama : Llama
        Opened with ``logits_all=True``.
    windows : sequence of sequence of int
        Calibration text as in `edgemoe.perplexity.measure`.
    scores : array-like [L, N]
        The task's; they choose the experts that a cut layer keeps.
    layers : ExpertLayers
        The model.
    sizes : sequence of int, optional
        Ascending, all less than N; `default_sizes` by default.
    on_progress : callable, optional
        ``on_progress(done, total)`` in evaluated windows.

    Returns
    -------
    LossCurves
        Mean KL divergence from the full model, nats per token, for each layer and size.

    Raises
    ------
    AllocationError
        If there is no size to measure or no text.
    BudgetError
        If a layer of some size cannot route.
    EdgemoeError
        What evaluating raises; nothing is kept of an interrupted measurement.
    """
    sizes = default_sizes(layers) if sizes is None else tuple(sizes)
    if not sizes or not windows:
        raise AllocationError(
            "there is nothing to measure: give windows of text, and sizes that are smaller than a layer"
        )
    cuts = [cut_layer(scores, layers, position, size) for position in range(len(layers.numbers)) for size in sizes]
    done, total = 0, len(windows) * (1 + len(cuts))

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    loss = np.array([figures.kl for figures in measure(llama, windows, cuts, advance)])
    # Rounding can leave a cut that changed nothing a hair below zero.
    curves = np.maximum(loss, 0.0).reshape(len(layers.numbers), len(sizes))
    return LossCurves((*sizes, layers.n_expert), np.hstack([curves, np.zeros((len(curves), 1))]))
