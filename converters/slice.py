"""PreMoE's pruned model (arXiv 2505.17639) as a file of its own: the M best experts of every layer, for any llama.cpp.

A GGUF has one ``expert_count`` for all layers, so all keep equally many; where experts are routed by groups, equally
many of each group, and the number of groups stays. The experts kept are renumbered in their old order.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, Keys

from edgemoe.allocation import ExpertBudget, uniform
from edgemoe.converters.copied_model import CopiedTensor, copied_tensors, provenance, with_index, write_copy
from edgemoe.converters.gguf_layout import RawValue, Value, lay_out
from edgemoe.converters.stock_model import StockModel
from edgemoe.errors import BudgetError
from edgemoe.expert_offsets import OFFSETS, STRIDES, has_offsets
from edgemoe.expert_set import ExpertLayers, ExpertSet
from edgemoe.index import ExpertIndex
from edgemoe.keep import Keep
from edgemoe.pattern import Pattern

__all__ = ["Slice", "plan_slice"]


@dataclass(frozen=True)
class Slice:
    """What a sliced file will be.

    Attributes
    ----------
    model : StockModel
        The source, open.
    chosen : ExpertSet
        Experts of it that are kept.
    metadata, tensors, alignment
        Of the new file, see `gguf_layout.lay_out`.
    """

    model: StockModel
    chosen: ExpertSet
    metadata: Mapping[str, Value | RawValue]
    tensors: tuple[CopiedTensor, ...]
    alignment: int

    @property
    def file_size(self) -> int:
        """Size of the new file in bytes."""
        infos = [tensor.info for tensor in self.tensors]
        return lay_out(self.metadata, infos, alignment=self.alignment).file_size

    def write(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Write the file.

        Raises
        ------
        ConvertError, ModelFileError
            Whatever keeps it from being written or the source from being read.
        """
        return write_copy(
            self.model,
            path,
            self.metadata,
            self.tensors,
            alignment=self.alignment,
            force=force,
            on_progress=on_progress,
        )


def plan_slice(model: StockModel, index: ExpertIndex, pattern: Pattern, keep: Keep) -> Slice:
    """Choose a task's experts and lay out the file of them.

    Parameters
    ----------
    model, index : StockModel, ExpertIndex
        The source.
    pattern : Pattern
        Of a task of this model.
    keep : Keep
        Experts kept in every layer, and active ones for each token where they are to be fewer.

    Raises
    ------
    BudgetError
        If the model cannot be cut to that many.
    ConvertError
        If expert numbers of this model cannot change.
    """
    layers = ExpertLayers.of(index)
    if keep.m > layers.n_expert or keep.m % layers.n_group:
        groups = f" in {layers.n_group} equal groups" if layers.n_group > 1 else ""
        raise BudgetError(
            f"--keep {keep} cannot be: {index.name} has {layers.n_expert} experts in a layer{groups}; give"
            + (f" a multiple of {layers.n_group}" if layers.n_group > 1 else " at most that many")
        )
    if keep.k is not None:
        layers = layers.activating(keep.k)
    chosen = uniform(pattern.rank_scores, layers, ExpertBudget(per_layer=keep.m))
    experts = dict(zip(chosen.layers, chosen.kept, strict=True))
    tensors = tuple(copied_tensors(model, index, experts))
    alignment = model.headers[0].alignment
    metadata = _metadata(model, index, keep)
    metadata[Keys.General.NAME] = Value(f"{index.name} ({pattern.task} {chosen})", GGUFValueType.STRING)
    metadata |= provenance(index, pattern, experts)
    if has_offsets(index.metadata, len(model.headers)):
        metadata = with_index(metadata, tensors, keep.m, alignment)
    return Slice(model, chosen, metadata, tensors, alignment)


def _metadata(model: StockModel, index: ExpertIndex, keep: Keep) -> dict[str, Value | RawValue]:
    """Metadata of the source with other numbers of experts, less what no longer holds."""
    metadata: dict[str, Value | RawValue] = dict(model.metadata)
    for key in (Keys.General.SIZE_LABEL, OFFSETS, STRIDES):
        metadata.pop(key, None)
    count = Keys.LLM.EXPERT_COUNT.format(arch=index.architecture)
    metadata[count] = _like(model.metadata[count], keep.m)
    used = Keys.LLM.EXPERT_USED_COUNT.format(arch=index.architecture)
    if keep.k is not None:
        own = index.metadata[used]
        fewer = [min(keep.k, k) for k in own] if isinstance(own, tuple) else min(keep.k, own)  # type: ignore[type-var]
        metadata[used] = _like(model.metadata[used], fewer)
    return metadata


def _like(raw: RawValue, value: Any) -> Value:
    """Give a value the type that another has."""
    (kind,) = struct.unpack_from("<I", raw.data)
    if kind == GGUFValueType.ARRAY:
        (element,) = struct.unpack_from("<I", raw.data, 4)
        return Value(value, GGUFValueType.ARRAY, GGUFValueType(element))
    return Value(value, GGUFValueType(kind))
