"""The header of a GGUF file (version 3; format: ggml's gguf.md) and the places of its tensors."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION, GGUFValueType, Keys

from edgemoe.errors import ConvertError
from edgemoe.ggml_types import type_blocks, type_name
from edgemoe.gguf_header import scalar_layouts, show

__all__ = ["Layout", "Metadata", "RawValue", "TensorInfo", "Value", "lay_out"]

_MAX_NAME_BYTES = 63  # GGML_MAX_NAME - 1


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value and how it is stored.

    Attributes
    ----------
    value : Any
        A number, a bool, a str or the bytes of one; for arrays a sequence of these.
    type : GGUFValueType
        Type it is stored as.
    element : GGUFValueType or None
        For arrays, the type of their items.
    """

    value: Any
    type: GGUFValueType
    element: GGUFValueType | None = None


@dataclass(frozen=True, slots=True)
class RawValue:
    """A metadata value as another file stores it: its type and all that follows, byte for byte."""

    data: bytes


Metadata = dict[str, Value]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor to be written.

    Attributes
    ----------
    name : str
        Tensor name, at most 63 bytes.
    shape : tuple of int
        Extents in ggml order, ne[0] (the contiguous one) first; 1 to 4 of them.
    ggml_type : int
        ggml's type id.
    n_bytes : int
        Size of its data in bytes.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes.

    Attributes
    ----------
    header : bytes
        All that comes before the data, padding included.
    offsets : tuple of int
        Start of each tensor's data in the file, in bytes.
    file_size : int
        Size of the whole file in bytes.
    """

    header: bytes
    offsets: tuple[int, ...]
    file_size: int


def lay_out(
    metadata: Mapping[str, Value | RawValue], tensors: Sequence[TensorInfo], *, alignment: int = GGUF_DEFAULT_ALIGNMENT
) -> Layout:
    """Encode a header and place the tensors, one after the other in the order given.

    Parameters
    ----------
    metadata : Mapping
        Keys and values in order. ``general.alignment`` is set where `alignment` is not GGUF's default.
    tensors : sequence of TensorInfo
        All tensors.
    alignment : int
        A power of two: tensors start at multiples of it, in bytes.

    Raises
    ------
    ConvertError
        If GGUF has no way to store a value, a name or a tensor.
    """
    keys = dict(metadata)
    if alignment != GGUF_DEFAULT_ALIGNMENT or Keys.General.ALIGNMENT in keys:
        keys[Keys.General.ALIGNMENT] = Value(alignment, GGUFValueType.UINT32)
    parts = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(tensors), len(keys))]
    for key, value in keys.items():
        try:
            parts += [_string(key), value.data if isinstance(value, RawValue) else _encode(value)]
        except (struct.error, TypeError, UnicodeError) as error:
            raise ConvertError(f"metadata key {show(key)} cannot be stored in a GGUF: {error}; correct it") from None
    starts = list(accumulate((_padded(tensor.n_bytes, alignment) for tensor in tensors), initial=0))
    _check(tensors)
    for tensor, start in zip(tensors, starts, strict=False):
        n_dims = len(tensor.shape)
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{n_dims}QIQ", n_dims, *tensor.shape, tensor.ggml_type, start))
    header = b"".join(parts)
    header += bytes(_padded(len(header), alignment) - len(header))
    return Layout(header, tuple(len(header) + start for start in starts[:-1]), len(header) + starts[-1])


def _check(tensors: Sequence[TensorInfo]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        name, blocks = show(tensor.name), type_blocks(tensor.ggml_type)
        if tensor.name in seen:
            raise ConvertError(f"two tensors are named {name}, which a GGUF cannot hold; correct the conversion")
        seen.add(tensor.name)
        if not 0 < len(tensor.name.encode()) <= _MAX_NAME_BYTES:
            raise ConvertError(f"tensor {name} has a name of more than {_MAX_NAME_BYTES} bytes; shorten it")
        if not 0 < len(tensor.shape) <= 4 or 0 in tensor.shape:
            raise ConvertError(f"tensor {name} has shape {tensor.shape}, expected 1 to 4 extents above 0; correct it")
        if blocks is None:
            # Its size was guessed from where the next tensor starts.
            raise ConvertError(
                f"tensor {name} has {type_name(tensor.ggml_type)}, which this edgemoe does not know; use a newer one"
            )
        rows, block = prod(tensor.shape[1:]), blocks[0]
        if tensor.shape[0] % block or rows * (tensor.shape[0] // block) * blocks[1] != tensor.n_bytes:
            raise ConvertError(
                f"tensor {name} of shape {tensor.shape} is no {tensor.n_bytes} bytes of {type_name(tensor.ggml_type)};"
                " use another type"
            )


def _encode(value: Value) -> bytes:
    kind = struct.pack("<I", value.type)
    if value.type == GGUFValueType.STRING:
        return kind + _string(value.value)
    if value.type != GGUFValueType.ARRAY:
        return kind + scalar_layouts()[value.type][1].pack(value.value)
    element, items = value.element, value.value
    if element == GGUFValueType.STRING:
        body = b"".join(map(_string, items))
    elif element in scalar_layouts():
        body = struct.pack(f"<{len(items)}{scalar_layouts()[element][1].format[-1]}", *items)
    else:
        raise TypeError(f"an array of {element}")
    return kind + struct.pack("<IQ", element, len(items)) + body


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else bytes(text)
    return struct.pack("<Q", len(data)) + data


def _padded(n_bytes: int, alignment: int) -> int:
    return n_bytes + -n_bytes % alignment
