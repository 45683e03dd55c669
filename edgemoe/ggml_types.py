"""ggml's tensor types: names and block sizes, from the gguf package, corrected to the pinned llama.cpp."""

from __future__ import annotations

import functools

__all__ = ["type_blocks", "type_name"]

# Where gguf 0.19 differs from the pinned ggml: id -> (name, weights per block, bytes per block). Q8_1 lost
# 4 bytes when its sums became half floats; Q2_0 is newer than the package.
_CORRECTIONS = {9: ("Q8_1", 32, 36), 42: ("Q2_0", 64, 18)}


def type_name(ggml_type: int) -> str:
    """Name ggml gives a tensor type (``"Q4_K"``), or ``"type 99"`` for an id nobody here knows.

    Parameters
    ----------
    ggml_type : int
        ggml's type id.
    """
    known = _table().get(ggml_type)
    return known[0] if known else f"type {ggml_type}"


def type_blocks(ggml_type: int) -> tuple[int, int] | None:
    """Weights per block and bytes per block of a tensor type; None for an id nobody here knows.

    Parameters
    ----------
    ggml_type : int
        ggml's type id.
    """
    known = _table().get(ggml_type)
    return known[1:] if known else None


@functools.cache
def _table() -> dict[int, tuple[str, int, int]]:
    from gguf.constants import GGML_QUANT_SIZES  # here because it takes numpy along, a quarter of a second

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()} | _CORRECTIONS
