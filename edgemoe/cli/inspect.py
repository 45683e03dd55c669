"""``edgemoe inspect``: what the header of a model says; nothing is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli import options

if TYPE_CHECKING:
    from edgemoe.index import ExpertIndex, ExpertTensor, Tensor


@click.command("inspect")
@options.MODEL
@click.option("--experts", is_flag=True, help="Also print where every expert lies.")
@options.JSON
def command(model: Path, experts: bool, json: bool) -> None:
    """Show what is in a model: layers, experts, sizes.

    Only the header of MODEL (a GGUF file, the first part of a split one) is read.
    """
    from edgemoe.cli import ui
    from edgemoe.index import read_index

    index = read_index(model)
    description = summary(index)
    if experts:
        description["expert_offsets"] = ui.expert_document(index)
    if json:
        ui.show_json(description)
    else:
        ui.show(ui.out(), *ui.inspection(description))


def summary(index: ExpertIndex) -> dict[str, Any]:
    """Sum up an index as plain JSON types.

    Parameters
    ----------
    index : ExpertIndex
        A model.

    Returns
    -------
    dict
        Names, counts, and sizes in bytes; ``types`` counts tensors by ggml type.
    """
    from edgemoe.memory import page_size

    used = [index.n_expert_used[layer] for layer in index.moe_layers]
    sizes = [index.expert_size(layer) for layer in index.moe_layers]
    return {
        "path": str(index.path),
        "files": [str(file) for file in index.files],
        "architecture": index.architecture,
        "name": index.name,
        "quantization": index.quantization,
        "context_length": index.context_length,
        "n_vocab": index.n_vocab,
        "n_embd": index.n_embd,
        "n_layer": index.n_layer,
        "moe_layers": list(index.moe_layers),
        "leading_dense_layers": index.leading_dense,
        "n_expert": index.n_expert,
        "n_expert_used": used[0] if len(set(used)) == 1 else used,
        "n_expert_shared": index.n_expert_shared,
        "n_expert_group": index.n_expert_group,
        "n_group_used": index.n_group_used,
        "types": {"dense": _count_types(index.tensors), "experts": _count_types(index.experts)},
        "file_bytes": index.file_bytes,
        "dense_bytes": index.dense_bytes,
        "expert_bytes": index.expert_bytes,
        "one_expert_bytes": {"min": min(sizes), "max": max(sizes)},
        "token_cycle_bytes": index.token_cycle_bytes,
        "page_size": page_size(),
        "aligned_slabs": index.aligned_slabs,
        "skipped_tensors": list(index.skipped),
        "has_chat_template": index.has_chat_template,
    }


def _count_types(tensors: Iterable[Tensor | ExpertTensor]) -> dict[str, int]:
    return dict(Counter(tensor.type_name for tensor in tensors).most_common())
