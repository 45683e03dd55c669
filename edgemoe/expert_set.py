"""Sets of experts: which of them are kept in each layer, and what the model demands of any such set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from edgemoe.errors import AllocationError, BudgetError
from edgemoe.index import ExpertIndex

__all__ = ["ExpertLayers", "ExpertSet", "everything", "few_decimals"]


@dataclass(frozen=True, slots=True)
class ExpertLayers:
    """What a model says of its L layers with experts.

    Attributes
    ----------
    numbers : tuple of int
        Layer numbers, ascending.
    n_expert : int
        Experts of each layer: N.
    n_expert_used : tuple of int
        Experts per token (top-k) of each layer.
    expert_bytes : tuple of int
        Size of one expert of each layer, all its parts.
    n_group, n_group_used : int
        Expert groups and groups per token; 1 and 1 without groups.

    Raises
    ------
    AllocationError
        If they contradict each other.
    """

    numbers: tuple[int, ...]
    n_expert: int
    n_expert_used: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    n_group: int = 1
    n_group_used: int = 1

    def __post_init__(self) -> None:
        if not 0 < len(self.numbers) == len(self.n_expert_used) == len(self.expert_bytes):
            raise AllocationError(
                f"{len(self.numbers)} layers have {len(self.n_expert_used)} numbers of active experts and"
                f" {len(self.expert_bytes)} expert sizes; give one of each for every layer"
            )
        if not all(0 < k <= self.n_expert for k in self.n_expert_used) or min(self.expert_bytes) < 1:
            raise AllocationError(
                f"active experts must lie between 1 and the {self.n_expert} of a layer, and expert sizes must be"
                " positive; take both from the model's header"
            )
        if self.n_group < 1 or self.n_expert % self.n_group or not 0 < self.n_group_used <= self.n_group:
            raise AllocationError(
                f"{self.n_expert} experts cannot be routed by {self.n_group_used} of {self.n_group} groups; take the"
                " groups from the model's header, or 1 of 1"
            )

    @classmethod
    def of(cls, index: ExpertIndex) -> ExpertLayers:
        """Take them from a model's header."""
        layers = index.moe_layers
        grouped = index.n_expert_group > 1
        return cls(
            layers,
            index.n_expert,
            tuple(index.n_expert_used[layer] for layer in layers),
            tuple(index.expert_size(layer) for layer in layers),
            index.n_expert_group if grouped else 1,
            index.n_group_used if grouped else 1,
        )

    def activating(self, k: int) -> ExpertLayers:
        """Take k experts per token, the k of ``k/M``, except in layers that use fewer.

        Raises
        ------
        BudgetError
            If k is more than the model was made for.
        """
        if not 0 < k <= max(self.n_expert_used):
            raise BudgetError(
                f"{k} active experts were asked of a model that uses {max(self.n_expert_used)}; give k/M with a k from"
                f" 1 to {max(self.n_expert_used)}"
            )
        return replace(self, n_expert_used=tuple(min(k, own) for own in self.n_expert_used))

    @property
    def floor(self) -> tuple[int, ...]:
        """Experts that each layer must keep for routing to work."""
        if self.n_group == 1:
            return self.n_expert_used
        size = self.n_expert // self.n_group
        return tuple(self.n_group * min(size, max(2, -(-k // self.n_group_used))) for k in self.n_expert_used)

    @property
    def floor_bytes(self) -> int:
        """What these take."""
        return sum(k * size for k, size in zip(self.floor, self.expert_bytes, strict=True))


@dataclass(frozen=True)
class ExpertSet:
    """The experts that are kept.

    Attributes
    ----------
    layers : tuple of int
        The L layer numbers.
    n_expert : int
        Experts of a whole layer: N.
    n_expert_used : int
        Experts per token, the largest of all layers.
    kept : tuple of tuple of int
        Expert ids of each layer, ascending.
    why : str
        How they were chosen, one sentence for the user; not compared.

    Raises
    ------
    AllocationError
        If the ids are not those of such a model.
    """

    layers: tuple[int, ...]
    n_expert: int
    n_expert_used: int
    kept: tuple[tuple[int, ...], ...]
    why: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.kept) or not self.layers:
            raise AllocationError(f"{len(self.kept)} lists of experts were given for {len(self.layers)} layers")
        for layer, ids in zip(self.layers, self.kept, strict=True):
            if not ids or ids[0] < 0 or ids[-1] >= self.n_expert or any(a >= b for a, b in pairwise(ids)):
                raise AllocationError(
                    f"the experts kept in layer {layer} are not ascending numbers from 0 to {self.n_expert - 1}; choose"
                    " them anew for this model"
                )

    def __str__(self) -> str:
        """``8/64``, and where layers differ ``8/64 (mean of 48 layers, 41 to 128)``."""
        head = f"{self.n_expert_used}/{few_decimals(self.mean_kept)}"
        low, high = min(self.sizes), max(self.sizes)
        return head if low == high else f"{head} (mean of {len(self.layers)} layers, {low} to {high})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of experts kept in each layer."""
        return tuple(map(len, self.kept))

    @property
    def n_kept(self) -> int:
        """Number of experts kept in all layers together."""
        return sum(self.sizes)

    @property
    def mean_kept(self) -> float:
        """Number of experts kept in a layer, mean over layers."""
        return self.n_kept / len(self.layers)

    def n_bytes(self, expert_bytes: Sequence[int]) -> int:
        """Bytes of the kept experts, given the bytes of one expert of each layer."""
        return sum(n * size for n, size in zip(self.sizes, expert_bytes, strict=True))

    def missing_from(self, other: ExpertSet) -> tuple[tuple[int, int], ...]:
        """(layer number, expert) pairs of this set that the other lacks: what switching to this set must read.

        Raises
        ------
        AllocationError
            If the other set belongs to another model.
        """
        if (self.layers, self.n_expert) != (other.layers, other.n_expert):
            raise AllocationError("the two sets of experts belong to different models; switch within one model")
        return tuple(
            (layer, expert)
            for layer, mine, theirs in zip(self.layers, self.kept, other.kept, strict=True)
            for expert in sorted(set(mine) - set(theirs))
        )


def everything(layers: ExpertLayers) -> ExpertSet:
    """All experts."""
    ids = tuple(range(layers.n_expert))
    why = "everything: all experts of every layer"
    return ExpertSet(layers.numbers, layers.n_expert, max(layers.n_expert_used), (ids,) * len(layers.numbers), why)


def few_decimals(value: float) -> str:
    """One decimal where there is one."""
    return f"{value:.1f}".removesuffix(".0")
