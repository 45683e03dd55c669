"""The index of expert offsets that ``edgemoe convert`` stores in a file's metadata.

A GGUF says where each tensor starts; that expert tensors are stacked, and in which steps, one has to know. These keys
say it for every expert, so that other programs can read single experts without knowing the layouts of llama.cpp:

- ``edgemoe.experts.offsets``, array of uint64: one for each expert tensor, in the file's order (all tensors named
  ``blk.<layer>.ffn_{gate,up,down,gate_up}_exps.weight``); where its first expert starts, in bytes from the start of
  the data section, as GGUF counts its tensors' own offsets.
- ``edgemoe.experts.strides``, array of uint64: one for each of them; bytes from one expert to the next, which is also
  the size of one.

Expert i of tensor t lies at ``offsets[t] + i * strides[t]``. Counted from the data section the index survives a change
of other metadata. A split file has none that holds: each part counts its own offsets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from edgemoe.errors import ModelFileError
from edgemoe.gguf_header import ArraySummary, GGUFHeader, Value

__all__ = ["EXPERT_NAME", "OFFSETS", "STRIDES", "check_offsets", "expert_offsets", "has_offsets"]

OFFSETS = "edgemoe.experts.offsets"
STRIDES = "edgemoe.experts.strides"

EXPERT_NAME = re.compile(r"blk\.(0|[1-9]\d{0,3})\.ffn_(gate|up|down|gate_up)_exps\.weight", re.ASCII)
"""Name of a tensor that holds one matrix of all experts of a layer: its layer and which matrix."""


def expert_offsets(
    names: Sequence[str], starts: Sequence[int], n_bytes: Sequence[int], n_expert: int
) -> list[list[int]]:
    """Give offsets and strides of the expert tensors among tensors.

    Parameters
    ----------
    names : sequence of str
        All tensors of a file, in its order.
    starts, n_bytes : sequence of int
        Where each starts, counted from the data section, and its size; bytes.
    n_expert : int
        Experts of a layer.

    Returns
    -------
    list of two lists of int
        What `OFFSETS` and `STRIDES` are to hold.
    """
    experts = [i for i, name in enumerate(names) if EXPERT_NAME.fullmatch(name)]
    return [[starts[i] for i in experts], [n_bytes[i] // n_expert for i in experts]]


def has_offsets(metadata: Mapping[str, Value], n_files: int) -> bool:
    """Whether a model of so many files, with this metadata in the first, carries an index that is to hold."""
    return n_files == 1 and not metadata.keys().isdisjoint((OFFSETS, STRIDES))


def check_offsets(header: GGUFHeader, n_expert: int) -> None:
    """Compare a stored index with the tensor table.

    Raises
    ------
    ModelFileError
        If they disagree: then nobody can say where the experts are.
    """
    tensors = header.tensors
    expected = expert_offsets(
        [tensor.name for tensor in tensors],
        [tensor.offset - header.data_offset for tensor in tensors],
        [tensor.n_bytes for tensor in tensors],
        n_expert,
    )
    for key, numbers in zip((OFFSETS, STRIDES), expected, strict=True):
        found = header.metadata.get(key)
        if found == tuple(numbers):
            continue
        if isinstance(found, ArraySummary):
            what = f"has {found.length} items"
        elif not isinstance(found, tuple):
            what = "is missing" if found is None else "is no array"
        elif len(found) != len(numbers):
            what = f"has {len(found)} items"
        else:
            number = next(i for i, pair in enumerate(zip(found, numbers, strict=True)) if pair[0] != pair[1])
            what = f"says {found[number]} for expert tensor {number + 1}, where the tensor table says {numbers[number]}"
        raise ModelFileError(
            f"{header.path} has an index of experts that disagrees with its {len(numbers)} expert tensors: {key}"
            f" {what}; the file is damaged, or another program rewrote it and has to leave {OFFSETS} and {STRIDES} out"
        )
