"""Compares two GGUF models: the same tensors with the same bytes, and the same metadata where it matters.

The order of tensors, their alignment and the parts of a split model do not count. Where a tensor is stored in different
types, both are dequantized and the relative RMS error, sqrt(mean((a - b)^2) / mean(a^2)), has to stay within
`error_limit` of both types together. Where the second model says that it is made of the first one's experts
(`SOURCE_EXPERTS`: reordered or sliced), each expert is compared with the one it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod, sqrt

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from edgemoe.converters.copied_model import (
    SOURCE_EXPERTS,
    SOURCE_QUANTIZATION,
    SOURCE_ROUTER,
    CopiedTensor,
    Experts,
    copied_tensors,
)
from edgemoe.converters.gguf_layout import TensorInfo
from edgemoe.converters.stock_model import StockModel
from edgemoe.fingerprint import fingerprint
from edgemoe.ggml_types import type_blocks, type_name
from edgemoe.index import ExpertIndex, read_index

__all__ = ["KeyDifference", "TensorComparison", "Verification", "error_limit", "verify"]

Floats = npt.NDArray[np.float32]

_DEQUANTIZED_BYTES = 256 << 10  # of a's data at once, which is some megabytes as float32
# Relative errors of types that keep an exponent for each weight: half a step of their mantissa, and some room.
_FLOATS = {"F64": 1e-7, "F32": 1e-7, "F16": 1e-3, "BF16": 8e-3}


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """One tensor of either model.

    Attributes
    ----------
    name : str
        Its name.
    types : tuple of str or None
        ggml's name of its type in each model, None where it is missing.
    same : bool
        Whether it is the same: byte for byte, or within `limit` where types differ.
    found : str
        In words.
    error, limit : float or None
        Relative RMS error and what is allowed, where weights were compared.
    """

    name: str
    types: tuple[str | None, str | None]
    same: bool
    found: str
    error: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class KeyDifference:
    """A metadata key that is not the same in both; ``matters`` is False where it only describes the file."""

    key: str
    found: str
    matters: bool


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    tensors : tuple of TensorComparison
        Every tensor of either model, in the first one's order.
    keys : tuple of KeyDifference
        Metadata keys that differ.
    kept : tuple of int or None
        Experts of a layer in the second model and in the first, where they were compared by the numbers that the second
        says they had in the first; else None.
    """

    tensors: tuple[TensorComparison, ...]
    keys: tuple[KeyDifference, ...]
    kept: tuple[int, int] | None

    @property
    def same(self) -> bool:
        """Whether all tensors are the same, of the experts that were kept, and all metadata that matters."""
        return all(tensor.same for tensor in self.tensors) and not any(key.matters for key in self.keys)


def error_limit(ggml_type: int) -> float:
    """Relative RMS error that storing weights in a type may cause.

    A quantizer with b bits per weight leaves an error of about 1.8 * 2**-b of normally distributed weights; twice that
    is allowed. Weights of another tensor, or in another order, are off by 1.4. Ternary types (TQ1_0, TQ2_0) come within
    it only where the weights were trained to be ternary.

    Parameters
    ----------
    ggml_type : int
        ggml's type id.
    """
    floats = _FLOATS.get(type_name(ggml_type))
    blocks = type_blocks(ggml_type)
    if floats is not None or blocks is None:
        return floats or 0.0
    bits_per_weight: float = 8 * blocks[1] / blocks[0]
    return float(min(3.6 * 2**-bits_per_weight, 0.7))


def verify(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare two models; some megabytes of each are in memory at a time.

    Parameters
    ----------
    first, second : path
        GGUF files, or the first parts of split models.
    on_progress : callable, optional
        Takes the bytes of the second model that were compared and their total.

    Raises
    ------
    ModelFileError
        If either cannot be read or is unsound.
    """
    with StockModel(first) as a, StockModel(second) as b:
        experts = _experts(first, a, b)
        if experts is None:
            copies = [CopiedTensor(tensor) for tensor in a.tensors.values()]
        else:
            copies = copied_tensors(a, *experts)
        total, done = sum(tensor.n_bytes for tensor in b.tensors.values()), 0
        compared = []
        for copy in copies:
            compared.append(_compare(copy, a, b))
            if copy.source.name in b.tensors:
                done += b.tensors[copy.source.name].n_bytes
                if on_progress is not None:
                    on_progress(done, total)
        compared += [
            TensorComparison(name, (None, type_name(tensor.ggml_type)), False, "missing in the first")
            for name, tensor in b.tensors.items()
            if name not in a.tensors
        ]
        kept = None if experts is None else (len(next(iter(experts[1].values()))), experts[0].n_expert)
        return Verification(tuple(compared), tuple(_keys(a, b, kept and kept[0])), kept)


def _experts(path: str | os.PathLike[str], a: StockModel, b: StockModel) -> tuple[ExpertIndex, Experts] | None:
    """Numbers that b's experts have in a, if b was made of a."""
    numbers = b.integers(SOURCE_EXPERTS)
    if numbers is None:
        return None
    index = read_index(path)
    source, stated = fingerprint(index), b.headers[0].metadata
    if (source.router, source.quantization) != (stated.get(SOURCE_ROUTER), stated.get(SOURCE_QUANTIZATION)):
        return None
    n_layers = len(index.moe_layers)
    if not numbers or len(numbers) % n_layers or not all(0 <= number < index.n_expert for number in numbers):
        return None
    n_kept = len(numbers) // n_layers
    return index, {layer: numbers[i * n_kept : (i + 1) * n_kept] for i, layer in enumerate(index.moe_layers)}


def _compare(copy: CopiedTensor, a: StockModel, b: StockModel) -> TensorComparison:
    mine, name = copy.info, copy.source.name
    my_type = type_name(mine.ggml_type)
    if name not in b.tensors:
        return TensorComparison(name, (my_type, None), False, "missing in the second")
    other = b.tensors[name]
    types = my_type, type_name(other.ggml_type)
    if mine.shape != other.shape:
        return TensorComparison(name, types, False, f"shape {list(mine.shape)} and {list(other.shape)}")
    theirs = TensorInfo(name, other.shape, other.ggml_type, other.n_bytes)
    if mine == theirs and all(x == y for x, y in _pieces(copy, theirs, a, b)):
        return TensorComparison(name, types, True, "equal")
    error = _relative_error(copy, theirs, a, b)
    if mine.ggml_type == theirs.ggml_type:
        return TensorComparison(name, types, False, "other bytes", error)
    if error is None:
        return TensorComparison(name, types, False, "types or weights that cannot be compared")
    limit = error_limit(mine.ggml_type) + error_limit(theirs.ggml_type)
    within = error <= limit
    found = "within the quantization error" if within else "beyond the quantization error"
    return TensorComparison(name, types, within, found, error, limit)


def _pieces(
    copy: CopiedTensor, theirs: TensorInfo, a: StockModel, b: StockModel, most: int = 4 << 20
) -> Iterator[tuple[bytes, bytes]]:
    """Read the same weights of both, in pieces of whole rows."""
    my_bytes, at = copy.info.n_bytes, 0
    for start, n_bytes in copy.pieces(most):
        # Both sizes count the same blocks, so the division leaves nothing.
        place, size = at * theirs.n_bytes // my_bytes, n_bytes * theirs.n_bytes // my_bytes
        yield a.read(theirs.name, start, n_bytes), b.read(theirs.name, place, size)
        at += n_bytes


def _relative_error(copy: CopiedTensor, theirs: TensorInfo, a: StockModel, b: StockModel) -> float | None:
    """Relative RMS error; None where types cannot be read or weights are not finite numbers."""
    squares, of_difference = 0.0, 0.0
    for mine, other in _pieces(copy, theirs, a, b, _DEQUANTIZED_BYTES):
        x, y = _weights(mine, copy.info), _weights(other, theirs)
        if x is None or y is None or not (np.isfinite(x).all() and np.isfinite(y).all()):
            return None
        difference = x - y
        squares += float(np.dot(x, x))
        of_difference += float(np.dot(difference, difference))
    return sqrt(of_difference / max(squares, np.finfo(np.float64).tiny))


def _weights(data: bytes, info: TensorInfo) -> npt.NDArray[np.float64] | None:
    """Weights of whole rows, float64 [n]; None for types that the gguf package cannot read."""
    row_bytes = info.n_bytes // prod(info.shape[1:])
    raw = np.frombuffer(data, np.uint8)
    # An expert's share of a row (one bias) is not a whole one.
    rows = raw.reshape(-1, row_bytes) if raw.size % row_bytes == 0 else raw[None]
    try:
        kind = gguf.GGMLQuantizationType(info.ggml_type)
        if kind == gguf.GGMLQuantizationType.F32:
            weights = rows.view("<f4")
        elif kind == gguf.GGMLQuantizationType.F16:
            weights = rows.view("<f2")
        else:
            weights = gguf.dequantize(rows, kind)
    except (NotImplementedError, ValueError):
        return None
    with np.errstate(invalid="ignore"):  # a NaN may be of a kind that casts warn of
        return np.asarray(weights, np.float64).ravel()


def _keys(a: StockModel, b: StockModel, n_kept: int | None) -> Iterator[KeyDifference]:
    """Keys whose values differ; byte for byte, so that a number of another type is another value."""
    count = Keys.LLM.EXPERT_COUNT.format(arch=a.headers[0].metadata.get(Keys.General.ARCHITECTURE))
    for key in dict.fromkeys([*a.metadata, *b.metadata]):
        mine, theirs = a.metadata.get(key), b.metadata.get(key)
        sliced = key == count and n_kept is not None and b.headers[0].metadata.get(key) == n_kept
        if mine == theirs or sliced:
            continue
        if mine is None or theirs is None:
            found = f"missing in the {'first' if mine is None else 'second'}"
        else:
            found = f"{_show(a, key)} and {_show(b, key)}"
        yield KeyDifference(key, found, _matters(key))


def _matters(key: str) -> bool:
    """Whether llama.cpp's answers may depend on a key: all but those that describe the file."""
    return key == Keys.General.ARCHITECTURE or not key.startswith(("general.", "edgemoe.", "split.", "quantize."))


def _show(model: StockModel, key: str) -> str:
    text = str(model.headers[0].metadata[key])
    return ascii(text if len(text) <= 60 else text[:57] + "...")[1:-1]
