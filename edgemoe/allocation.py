"""Which experts to keep, for one task's scores and any budget: pure, deterministic, and it says why.

`uniform` is PreMoE's rule (arXiv 2505.17639: the M best of every layer). `by_mass` and `mass_share` let the layers
differ by how widely each routes, `measured` by what cutting each layer was seen to cost; the same budget in the right
layers can cost a fraction of the uniform cut, see `edgemoe.loss_curves`.

All rank the experts of a layer by score, ties by lower index, and differ only in how many of them each layer keeps. A
layer keeps at least as many as a token activates. Where experts are routed by groups, every group keeps equally many,
because llama.cpp wants equal groups, and at least two, because it scores a group by its two best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from edgemoe.errors import AllocationError, BudgetError
from edgemoe.expert_set import ExpertLayers, ExpertSet, few_decimals
from edgemoe.loss_curves import LossCurves, cheapest_sizes, expected_loss
from edgemoe.memory import format_bytes

__all__ = [
    "ExpertBudget",
    "ExpertLayers",
    "ExpertSet",
    "by_mass",
    "mass_share",
    "measured",
    "random_like",
    "uniform",
]


@dataclass(frozen=True, slots=True)
class ExpertBudget:
    """How much may be kept: a number of experts, or bytes; give one of the two.

    Attributes
    ----------
    per_layer : float or None
        Experts per layer, mean over layers; any fraction.
    n_bytes : int or None
        Bytes of experts.

    Raises
    ------
    BudgetError
        If neither or both are given, or it is no positive number.
    """

    per_layer: float | None = None
    n_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [limit for limit in (self.per_layer, self.n_bytes) if limit is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise BudgetError(
                f"a budget of {self.per_layer} experts per layer and {self.n_bytes} bytes says nothing; give one"
                " positive number of either"
            )

    def __str__(self) -> str:
        """In words."""
        if self.n_bytes is not None:
            return f"a budget of {format_bytes(self.n_bytes)} for experts"
        return f"a budget of {few_decimals(self.per_layer or 0.0)} experts per layer"

    def prices(self, layers: ExpertLayers) -> tuple[list[int], int]:
        """Price of one expert of each layer, and the budget (at most all experts) in the same unit."""
        if self.n_bytes is not None:
            each, total = list(layers.expert_bytes), self.n_bytes
        else:
            each = [1] * len(layers.numbers)
            # A mean such as 128 / 6 that was rounded down still means 128 experts of 6 layers.
            total = math.floor((self.per_layer or 0.0) * len(each) + 1e-6)
        return each, min(total, sum(each) * layers.n_expert)


def uniform(scores: npt.ArrayLike, layers: ExpertLayers, budget: ExpertBudget) -> ExpertSet:
    """Keep the M best of every layer, PreMoE's rule, for the largest M within the budget.

    Parameters
    ----------
    scores : array-like [L, N]
        Any real scores, larger is better. NaN marks an expert that must be kept, a row of NaN a layer whose router was
        never observed and which stays whole; what they take is missing elsewhere.
    layers : ExpertLayers
        The model.
    budget : ExpertBudget
        Limit.

    Returns
    -------
    ExpertSet
        Sets of growing budgets are nested.

    Raises
    ------
    BudgetError
        If M would be less than the experts a token activates in any layer. ``needed`` is the bytes that would do.
    AllocationError
        If the scores do not fit the model.
    """
    ranked = _rank(scores, layers)
    prices, total = budget.prices(layers)
    smallest = max(layers.floor) // layers.n_group
    units = np.maximum(np.arange(ranked.n_unit + 1), ranked.forced[:, None])
    spent = layers.n_group * (np.array(prices, np.int64)[:, None] * units).sum(axis=0)
    best = int(np.searchsorted(spent, total, side="right")) - 1
    if best < smallest:
        _refuse(budget, layers, units[:, smallest], ranked)
    m = best * layers.n_group
    kept = "all experts of every layer" if m == layers.n_expert else f"the {m} best of every layer"
    return _keep(ranked, layers, units[:, best], f"uniform: {kept}{ranked.unobserved}, from {budget}")


def by_mass(mass: npt.ArrayLike, layers: ExpertLayers, budget: ExpertBudget) -> ExpertSet:
    """Spend one budget on all layers together, in the order of each expert's share of its layer's routed mass.

    With a budget in bytes the order is that of share per byte.

    Parameters
    ----------
    mass : array-like [L, N]
        Routed mass, or any scores that are not negative; NaN as in `uniform`. A layer without any mass counts as routed
        evenly, as nothing speaks for cutting it.
    layers : ExpertLayers
        The model.
    budget : ExpertBudget
        Limit.

    Returns
    -------
    ExpertSet
        Sets of growing budgets are nested.

    Raises
    ------
    BudgetError
        If the budget cannot hold as many experts as a token activates. ``needed`` is the bytes that would do.
    AllocationError
        If the mass does not fit the model or is negative.
    """
    ranked = _rank(mass, layers)
    shares = ranked.shares(layers)
    prices, total = budget.prices(layers)
    price = layers.n_group * np.array(prices, np.int64)
    room = total - int((price * ranked.least).sum())
    if room < 0:
        _refuse(budget, layers, ranked.least, ranked)
    layer, unit = np.nonzero(np.arange(ranked.n_unit) >= ranked.least[:, None])
    order = np.argsort(-shares[layer, unit] / price[layer], kind="stable")
    n = int(np.searchsorted(np.cumsum(price[layer[order]]), room, side="right"))
    units = ranked.least + np.bincount(layer[order[:n]], minlength=len(price))
    why = f"mass: the experts with the largest shares of their layer's mass{ranked.unobserved}, from {budget}"
    return _keep(ranked, layers, units, why)


def mass_share(mass: npt.ArrayLike, layers: ExpertLayers, share: float) -> ExpertSet:
    """Keep the fewest experts of each layer that hold a share of its routed mass.

    Parameters
    ----------
    mass : array-like [L, N]
        As in `by_mass`.
    layers : ExpertLayers
        The model.
    share : float
        Above 0, at most 1.

    Returns
    -------
    ExpertSet
        Sets of growing shares are nested.

    Raises
    ------
    AllocationError
        If the share is no share, or the mass does not fit the model or is negative.
    """
    if not 0 < share <= 1:
        raise AllocationError(f"{share} is no share of the routed mass; give a number above 0 and at most 1")
    ranked = _rank(mass, layers)
    held = np.cumsum(ranked.shares(layers), axis=1)
    # Shares that add up to it but for rounding do: 0.7 and 0.2 hold 0.9.
    units = np.maximum((held < share * held[:, -1:] * (1 - 1e-12)).sum(axis=1) + 1, ranked.least)
    return _keep(ranked, layers, units, f"mass-share: {share:.4g} of the mass of every layer{ranked.unobserved}")


def measured(scores: npt.ArrayLike, layers: ExpertLayers, budget: ExpertBudget, curves: LossCurves) -> ExpertSet:
    """Give each layer the size that makes the sum of the layers' measured losses smallest.

    Parameters
    ----------
    scores : array-like [L, N]
        As in `uniform`: they choose the experts, the curves how many.
    layers : ExpertLayers
        The model.
    budget : ExpertBudget
        Limit. What no layer gains from is left unspent. Sets of growing budgets need not be nested.
    curves : LossCurves
        Loss of each of the L layers; layers that were not measured stay whole.

    Returns
    -------
    ExpertSet
        The cheapest, see `edgemoe.loss_curves.cheapest_sizes`; `why` states the expected loss.

    Raises
    ------
    BudgetError
        As `by_mass`.
    AllocationError
        If scores or curves do not fit the model.
    """
    ranked = _rank(scores, layers)
    if curves.loss.shape[0] != len(layers.numbers) or curves.n_expert != layers.n_expert:
        raise AllocationError(
            f"loss curves of {curves.loss.shape[0]} layers with {curves.n_expert} experts do not fit a model of"
            f" {len(layers.numbers)} with {layers.n_expert}; measure this model"
        )
    ranked = replace(ranked, forced=np.where(curves.unmeasured, ranked.n_unit, ranked.forced))
    prices, total = budget.prices(layers)
    price = [layers.n_group * one for one in prices]
    if sum(p * n for p, n in zip(price, ranked.least.tolist(), strict=True)) > total:
        _refuse(budget, layers, ranked.least, ranked)
    units = cheapest_sizes(curves.by_size[:, :: layers.n_group], price, ranked.least.tolist(), total)
    sizes = (units * layers.n_group).tolist()
    blind = sum(size < curves.sizes[0] for size in sizes)
    guess = f" (a guess for {_count(blind)} below {curves.sizes[0]} experts, the fewest measured)" if blind else ""
    loss = f"{expected_loss(sizes, curves):+.3f} nats per token{guess}"
    why = f"measured: the smallest expected loss, {loss}{ranked.unobserved}, from {budget}"
    return _keep(ranked, layers, units, why)


def random_like(like: ExpertSet, layers: ExpertLayers, seed: int) -> ExpertSet:
    """Random experts, as many in each layer (and group) as another set has: the control for any way of choosing.

    Raises
    ------
    AllocationError
        If the set belongs to another model, or its layers do not divide evenly into the model's groups.
    """
    shape = (len(layers.numbers), layers.n_expert)
    sizes = np.array(like.sizes, np.int64)
    if (like.layers, like.n_expert) != (layers.numbers, layers.n_expert) or (sizes % layers.n_group).any():
        raise AllocationError(
            f"a set of {len(like.layers)} layers with {like.n_expert} experts does not fit a model of {shape[0]} with"
            f" {shape[1]} in {layers.n_group} groups; give a set of this model"
        )
    # Uniform doubles of PCG64 are the same in every release of numpy; its permutations need not be.
    drawn = np.random.Generator(np.random.PCG64(seed)).random(shape)
    return _keep(_rank(drawn, layers), layers, sizes // layers.n_group, f"random: seed {seed}, as many as {like}")


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Experts of each layer in the order they are kept in, by units: the j-th best of every group make unit j.

    Attributes
    ----------
    ids : int64 [L, U, n_group]
        Expert ids.
    scores : float64 [L, U, n_group]
        Their scores, descending along U; +inf for those that must be kept.
    floor, forced : int64 [L]
        Units that routing needs, and that scores of NaN demand.
    """

    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    floor: npt.NDArray[np.int64]
    forced: npt.NDArray[np.int64]

    @property
    def n_unit(self) -> int:
        """Units of a layer."""
        return int(self.ids.shape[1])

    @property
    def least(self) -> npt.NDArray[np.int64]:
        """Units that every layer must keep, int64 [L]."""
        return np.maximum(self.floor, self.forced)

    @property
    def unobserved(self) -> str:
        """Words for the layers that stay whole because nothing is known of them."""
        n = int((self.forced == self.n_unit).sum())
        return f", {_count(n)} whole that nothing is known of" if n else ""

    def shares(self, layers: ExpertLayers) -> npt.NDArray[np.float64]:
        """Share of each unit of its layer's mass, float64 [L, U], descending; experts that must be kept have none."""
        mass = np.where(np.isposinf(self.scores), 0.0, self.scores)
        if mass.min() < 0:
            layer = layers.numbers[int(np.argmin(mass.min(axis=(1, 2))))]
            raise AllocationError(
                f"a score of layer {layer} is {mass.min():.3g}, and a share of the mass cannot be negative; rank by"
                " routed mass or another score that is never negative"
            )
        # Largest value first, so that masses near the ends of the float range neither overflow nor vanish.
        mass = mass / np.maximum(mass.max(axis=(1, 2), keepdims=True), np.finfo(np.float64).tiny)
        units = mass.sum(axis=2)
        whole = units.sum(axis=1, keepdims=True)
        shares: npt.NDArray[np.float64] = np.where(whole > 0, units / np.maximum(whole, 1e-300), 1.0 / self.n_unit)
        return shares


def _rank(scores: npt.ArrayLike, layers: ExpertLayers) -> _Ranked:
    given = np.asarray(scores, np.float64)
    n_layer, n_group = len(layers.numbers), layers.n_group
    if given.shape != (n_layer, layers.n_expert):
        raise AllocationError(
            f"scores have shape {list(given.shape)} for a model of {n_layer} layers with {layers.n_expert} experts;"
            " score this model"
        )
    if np.isinf(given).any():
        layer = layers.numbers[int(np.argmax(np.isinf(given).any(axis=1)))]
        raise AllocationError(f"a score of layer {layer} is infinite; give finite scores, or NaN where none is known")
    size = layers.n_expert // n_group
    must = np.isnan(given)
    grouped = np.where(must, np.inf, given).reshape(n_layer, n_group, size)
    order = np.argsort(-grouped, axis=2, kind="stable")
    ids = order + size * np.arange(n_group)[:, None]
    return _Ranked(
        ids.transpose(0, 2, 1),
        np.take_along_axis(grouped, order, axis=2).transpose(0, 2, 1),
        np.array(layers.floor, np.int64) // n_group,
        must.reshape(n_layer, n_group, size).sum(axis=2).max(axis=1),
    )


def _keep(ranked: _Ranked, layers: ExpertLayers, units: npt.NDArray[np.int64], why: str) -> ExpertSet:
    kept = tuple(tuple(np.sort(ids[:n], axis=None).tolist()) for ids, n in zip(ranked.ids, units.tolist(), strict=True))
    return ExpertSet(layers.numbers, layers.n_expert, max(layers.n_expert_used), kept, why)


def _refuse(budget: ExpertBudget, layers: ExpertLayers, units: npt.NDArray[np.int64], ranked: _Ranked) -> NoReturn:
    """Say what the smallest possible set takes."""
    sizes = [layers.n_group * n for n in units.tolist()]
    needed = sum(n * size for n, size in zip(sizes, layers.expert_bytes, strict=True))
    mean = f"{math.ceil(1000 * sum(sizes) / len(sizes)) / 1000:.3f}".rstrip("0").removesuffix(".")
    groups = f" from {layers.n_group_used} of {layers.n_group} groups" if layers.n_group > 1 else ""
    raise BudgetError(
        f"{budget} is too small: a token activates {max(layers.n_expert_used)} experts{groups}{ranked.unobserved};"
        f" give at least {mean} experts per layer ({format_bytes(needed)})"
        + (" or lower k of k/M" if max(layers.n_expert_used) > 1 else ""),
        needed=needed,
    )


def _count(n_layer: int) -> str:
    return "1 layer" if n_layer == 1 else f"{n_layer} layers"
