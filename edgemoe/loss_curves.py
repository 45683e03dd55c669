"""What cutting one layer alone costs, measured at a few sizes, and the cheapest way to cut all of them.

Layers differ far more than their routing shows: on our 32-expert test model half of the experts of two layers cost 36
times as much as half of those of the six others together, and the two losses add up to what cutting all eight costs.
So the loss of each layer is measured with the others whole, and the sum over layers is minimised.

Between sizes a loss is taken as linear in log2(size). On that model halving a layer costs nearly the same again and
again: chords in log2(size) meet losses measured between them within -3 to +33 %, chords in size within +13 to +60 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edgemoe.errors import AllocationError

__all__ = ["LossCurves", "cheapest_sizes", "expected_loss"]

_GRID = 2.0**-40
"""Losses are rounded to multiples of it (1e-12 nats), so that float64 sums are exact and equal sums are ties."""

_CELLS = 1 << 16
"""Resolution of the budget: 128 layers of 512 experts are still counted one by one."""


@dataclass(frozen=True, eq=False)
class LossCurves:
    """Loss of a model with one layer cut, for every layer and a few sizes.

    Attributes
    ----------
    sizes : tuple of int
        G >= 2 numbers of kept experts, ascending; the last is n_expert.
    loss : float64 [L, G]
        What the layer's cut costs, nats per token, 0 for the last size: the change of the mean negative log-likelihood
        or, as `edgemoe.sensitivity` measures it, the divergence from the full model. It may be noisy: negative, or
        rising with the size. A row of NaN is a layer that was not measured, which stays whole.

    Raises
    ------
    AllocationError
        If sizes or losses contradict that.
    """

    sizes: tuple[int, ...]
    loss: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", np.array(self.loss, np.float64))
        if len(self.sizes) < 2 or self.sizes[0] < 1 or any(a >= b for a, b in pairwise(self.sizes)):
            raise AllocationError(
                f"loss curves were measured at {list(self.sizes)} experts; give at least two ascending sizes of which"
                " the last is the whole layer"
            )
        if self.loss.ndim != 2 or self.loss.shape[1] != len(self.sizes):
            raise AllocationError(
                f"loss curves have shape {list(self.loss.shape)} for {len(self.sizes)} sizes; give one row for each"
                f" layer with {len(self.sizes)} losses"
            )
        measured = self.loss[~self.unmeasured]
        if not np.isfinite(measured).all() or measured[:, -1].any():
            raise AllocationError(
                "a loss curve has a gap or is not 0 at the whole layer; give finite losses against the full model, or"
                " only NaN for a layer that was not measured"
            )

    @property
    def n_expert(self) -> int:
        """Experts of a whole layer."""
        return self.sizes[-1]

    @property
    def unmeasured(self) -> npt.NDArray[np.bool_]:
        """Layers without a curve, bool [L]."""
        return np.array([np.isnan(row).all() for row in self.loss], np.bool_)

    @cached_property
    def by_size(self) -> npt.NDArray[np.float64]:
        """Loss at every size, float64 [L, n_expert + 1]: never rising, at least 0, and 0 for the whole layer.

        Noise is averaged out by isotonic regression. Below the smallest measured size nothing is known: the loss
        rises there with every octave as in the layer's steepest part, and at least as in that of an average layer, so
        that a layer that lost nothing so far is not cut further for nothing. Measure down to the smallest size worth
        considering. The column of size 0 is infinite.
        """
        octave = np.log2(self.sizes)
        wanted = np.log2(np.arange(1, self.n_expert + 1))
        curves = np.array([_never_rising(row) for row in self.loss])
        steepest = np.max(-np.diff(curves, axis=1) / np.diff(octave), axis=1)
        measured = ~self.unmeasured
        average = steepest[measured].mean() if measured.any() else 0.0
        table = np.full((len(curves), self.n_expert + 1), np.inf)
        table[:, -1] = 0.0
        for layer in np.flatnonzero(measured):
            below = np.maximum(octave[0] - wanted, 0.0) * max(steepest[layer], average)
            table[layer, 1:] = np.interp(wanted, octave, curves[layer]) + below
        rounded: npt.NDArray[np.float64] = np.rint(table / _GRID) * _GRID
        return rounded


def expected_loss(sizes: Sequence[int], curves: LossCurves) -> float:
    """Sum over layers of what their sizes cost.

    Parameters
    ----------
    sizes : sequence of int
        Experts kept in each of the L layers.
    curves : LossCurves
        Measured losses.

    Returns
    -------
    float
        Nats per token; infinite if a layer is cut that was not measured. Layers are taken as independent, which is too
        hopeful where all of them are cut hard.

    Raises
    ------
    AllocationError
        If the number of layers or a size does not fit the curves.
    """
    kept = np.asarray(sizes, np.int64)
    table = curves.by_size
    if kept.shape != (len(table),) or kept.min(initial=0) < 0 or kept.max(initial=0) > curves.n_expert:
        raise AllocationError(
            f"sizes of {kept.size} layers do not fit loss curves of {len(table)} layers with {curves.n_expert} experts;"
            " use the curves of this model"
        )
    return float(table[np.arange(len(kept)), kept].sum())


def cheapest_sizes(
    loss: npt.NDArray[np.float64], prices: Sequence[int], least: Sequence[int], total: int
) -> npt.NDArray[np.int64]:
    """Minimise the sum of losses within a budget, by dynamic programming over the budget.

    Exact when the budget has at most 65536 steps of the prices' greatest common divisor, as any number of experts and
    any bytes of equally large experts have for usual models. Beyond, what a layer takes is rounded up to one of 65536
    steps, and what is left over goes to the best units that fit.

    Parameters
    ----------
    loss : float64 [L, U + 1]
        Of each layer with 0 to U units, never rising.
    prices : sequence of int
        Of one unit of each layer.
    least : sequence of int
        Units that each layer must have.
    total : int
        At least what `least` costs.

    Returns
    -------
    int64 [L]
        Units of each layer. Of equally good answers one of those that cost least, with more in the earlier layers:
        units that gain nothing are not taken, even if the budget would allow them.
    """
    n_units = loss.shape[1] - 1
    span = sum(price * (n_units - low) for price, low in zip(prices, least, strict=True))
    room = min(span, total - sum(price * low for price, low in zip(prices, least, strict=True)))
    grain = math.gcd(*prices)
    if span // grain > _CELLS:
        grain = -(-span // _CELLS)
    cells = room // grain

    # best[b]: least loss of the layers so far with at most b cells; past its end it stays what it is there.
    best = np.zeros(1)
    stages: list[npt.NDArray[np.float64]] = []
    options: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for row, price, low in zip(loss, prices, least, strict=True):
        useful = np.flatnonzero(np.diff(row[low:], prepend=np.inf) < 0) + low
        weights = -(-price * (useful - low) // grain)
        useful, weights = useful[weights <= cells], weights[weights <= cells]
        stages.append(best)
        options.append((useful, weights))
        wider = np.full(min(cells, len(best) - 1 + int(weights[-1])) + 1, np.inf)
        sums = np.empty(len(wider))
        for units, weight in zip(useful.tolist(), weights.tolist(), strict=True):
            n = min(len(best), len(wider) - weight)
            np.add(best[:n], row[units], out=sums[:n])
            np.minimum(wider[weight : weight + n], sums[:n], out=wider[weight : weight + n])
        best = np.minimum.accumulate(wider)

    chosen = np.array(least, np.int64)
    cell = int(np.argmin(best))
    for layer in reversed(range(len(loss))):
        useful, weights = options[layer]
        affordable = weights <= cell
        before = stages[layer]
        sums = before[np.minimum(cell - weights[affordable], len(before) - 1)] + loss[layer, useful[affordable]]
        pick = int(np.argmin(sums))
        chosen[layer] = useful[pick]
        cell -= int(weights[pick])
    return _filled(loss, prices, chosen, total)


def _filled(
    loss: npt.NDArray[np.float64], prices: Sequence[int], chosen: npt.NDArray[np.int64], total: int
) -> npt.NDArray[np.int64]:
    """Spend what rounding left over on the units that gain most for their price."""
    price = np.array(prices, np.int64)
    known = np.where(np.isfinite(loss), loss, 0.0)  # infinite below what a layer must have, where nothing is asked
    gains = np.append(-np.diff(known, axis=1), np.zeros((len(loss), 1)), axis=1)
    left = total - sum(p * n for p, n in zip(prices, chosen.tolist(), strict=True))
    rows = np.arange(len(loss))
    while True:
        worth = np.where(price <= left, gains[rows, chosen] / price, 0.0)
        layer = int(np.argmax(worth))
        if worth[layer] <= 0:
            return chosen
        chosen[layer] += 1
        left -= prices[layer]


def _never_rising(row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Nearest curve (least squares) that never rises, is never negative and ends at 0: pool adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for value in row[:-1].tolist():
        mean, n = value, 1
        while blocks and blocks[-1][0] < mean:
            earlier, m = blocks.pop()
            mean, n = (earlier * m + mean * n) / (m + n), m + n
        blocks.append((mean, n))
    means, counts = zip(*blocks, strict=True)
    return np.append(np.maximum(np.repeat(means, counts), 0.0), 0.0)
