"""A stock GGUF model, split or not, as one file that suits reading single experts.

Every tensor starts on a page. Dense tensors come first, then the expert tensors of layer after layer, so that both are
read in one sweep. The metadata carry the index of expert offsets (`edgemoe.expert_offsets`). The file remains a valid
GGUF: ``general.alignment`` is GGUF's own way to say it.

What cannot be had: experts of a tensor lie one after the other without a gap, and GGUF has no way to say another
stride. Where an expert's share of a tensor is no multiple of a page, only some of the experts start on one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from edgemoe.converters.copied_model import CopiedTensor, Experts, copied_tensors, provenance, with_index, write_copy
from edgemoe.converters.gguf_layout import RawValue, Value
from edgemoe.converters.stock_model import StockModel
from edgemoe.errors import ConvertError
from edgemoe.expert_offsets import EXPERT_NAME, has_offsets
from edgemoe.expert_set import ExpertLayers
from edgemoe.fingerprint import fingerprint
from edgemoe.index import ExpertIndex, read_index
from edgemoe.memory import page_size
from edgemoe.pattern import Pattern, renumbered

__all__ = ["ALIGNMENT", "align", "hot_first", "renumbered_pattern"]

ALIGNMENT = max(16384, page_size())
"""Bytes. The same file serves machines with pages of 4 KiB and of 16 KiB (Raspberry Pi 5, Apple), for at most 16 KiB of
padding for each tensor; larger only where the machine's own pages are."""


def align(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    pattern: Pattern | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExpertIndex:
    """Write an aligned copy of a model.

    Parameters
    ----------
    source : path
        A GGUF file, or the first part of a split model.
    output : path
        The file to write.
    pattern : Pattern, optional
        Of a task of this model, whose best experts are to lie side by side: see `hot_first`. The answers stay the
        same, up to the last bits of a softmax, which adds the same numbers in another order.
    force : bool
        Whether to replace an existing file.
    on_progress : callable, optional
        Takes the bytes done and their total.

    Returns
    -------
    ExpertIndex
        Of the file written.

    Raises
    ------
    ConvertError
        If there is nothing to gain, experts cannot be renumbered, or the output cannot be written.
    ModelFileError
        If the source is no sound Mixture-of-Experts model.
    """
    index = read_index(source)
    with StockModel(source) as model:
        if (
            pattern is None
            and has_offsets(index.metadata, len(model.headers))
            and model.headers[0].alignment % ALIGNMENT == 0
        ):
            raise ConvertError(
                f"{index.path} starts every tensor on a page of {ALIGNMENT:,} bytes and has an index of its experts"
                " already; use it as it is, or give --order"
            )
        experts = None if pattern is None else hot_first(pattern, ExpertLayers.of(index))
        tensors = sorted(copied_tensors(model, index, experts), key=_place)
        metadata: dict[str, Value | RawValue] = dict(model.metadata)
        if pattern is not None and experts is not None:
            metadata |= provenance(index, pattern, experts)
        metadata = with_index(metadata, tensors, index.n_expert, ALIGNMENT)
        write_copy(model, output, metadata, tensors, alignment=ALIGNMENT, force=force, on_progress=on_progress)
    return read_index(output)


def hot_first(pattern: Pattern, layers: ExpertLayers) -> Experts:
    """Order the experts of each layer from best to worst; where they are routed by groups, within each group."""
    size = layers.n_expert // layers.n_group
    order = {}
    for layer, ranking in zip(layers.numbers, pattern.rankings.astype(np.intp), strict=True):
        # A stable sort by group keeps the ranking within each.
        order[layer] = tuple(ranking[np.argsort(ranking // size, kind="stable")].tolist())
    return order


def renumbered_pattern(pattern: Pattern, before: ExpertIndex, after: ExpertIndex) -> Pattern:
    """Give a pattern the numbers that `align` gave the experts when it ordered them by this pattern.

    Parameters
    ----------
    pattern : Pattern
        Of the model before.
    before, after : ExpertIndex
        The model, and what `align` made of it.

    Raises
    ------
    ModelFileError
        If the new file cannot be read.
    """
    order = hot_first(pattern, ExpertLayers.of(before))
    return renumbered(pattern, np.array([order[layer] for layer in before.moe_layers]), fingerprint(after))


def _place(tensor: CopiedTensor) -> int:
    """Dense tensors first, then the layers; a stable sort leaves the rest as it is."""
    found = EXPERT_NAME.fullmatch(tensor.source.name)
    return int(found[1]) if found else -1
