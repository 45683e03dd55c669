"""Builds GGUF files byte by byte from the format's description, unsound ones included; what a header must promise."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from edgemoe.gguf_header import GGUFHeader

# Value types of the format.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "?",
    U64: "Q",
    I64: "q",
    F64: "d",
}
# Tensor types: (weights, bytes) per block.
TYPE_F32, TYPE_F16, TYPE_Q8_0, TYPE_Q2_0 = 0, 1, 8, 42
TYPE_FUTURE = 99  # made up
BLOCKS = {TYPE_F32: (1, 4), TYPE_F16: (1, 2), TYPE_Q8_0: (32, 34), TYPE_Q2_0: (64, 18), TYPE_FUTURE: (64, 13)}


@dataclass(frozen=True)
class Raw:
    """A metadata value of a type of your choice, as the bytes after the type."""

    kind: int
    data: bytes


@dataclass(frozen=True)
class TensorBytes:
    """A tensor to write; what is not given follows from the rest."""

    name: str | bytes
    shape: Sequence[int]
    kind: int = TYPE_F32
    data: bytes | None = None
    offset: int | None = None


Metadata = Mapping[str, object]


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def number(kind: int, value: float) -> Raw:
    return Raw(kind, struct.pack("<" + CODES[kind], value))


def array(kind: int, items: Sequence[float | str]) -> Raw:
    if kind == STRING:
        body = b"".join(string(str(item)) for item in items)
    else:
        body = struct.pack(f"<{len(items)}{CODES[kind]}", *items)
    return Raw(ARRAY, struct.pack("<IQ", kind, len(items)) + body)


def value(item: object) -> bytes:
    """A typed value: int is uint32, float is float32, a list is an array of int32 or strings."""
    match item:
        case Raw():
            raw = item
        case bool():
            raw = number(BOOL, item)
        case int():
            raw = number(U32, item)
        case float():
            raw = number(F32, item)
        case str():
            raw = Raw(STRING, string(item))
        case list():
            raw = array(STRING if any(isinstance(i, str) for i in item) else I32, item)
        case _:
            raise TypeError(item)
    return struct.pack("<I", raw.kind) + raw.data


def n_bytes(tensor: TensorBytes) -> int:
    block, size = BLOCKS[tensor.kind]
    return prod(tensor.shape) // block * size


def gguf_bytes(
    metadata: Metadata,
    tensors: Sequence[TensorBytes] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    """A whole file. Data that is not given is zero; `alignment` is used, not written into the metadata."""
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(metadata) if n_keys is None else n_keys,
    )
    head += b"".join(string(key) + value(item) for key, item in metadata.items())
    body = b""
    for tensor in tensors:
        data = bytes(n_bytes(tensor)) if tensor.data is None else tensor.data
        offset = len(body) if tensor.offset is None else tensor.offset
        head += string(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        head += struct.pack("<IQ", tensor.kind, offset)
        body += data + bytes(-len(data) % alignment)
    return head + (bytes(-len(head) % alignment) if tensors else b"") + body


def moe_metadata(arch: str = "qwen3moe", **changes: object) -> dict[str, object]:
    """Keys of a small MoE model: 3 layers, 4 experts, 2 used. A change of None takes the key away."""
    keys: dict[str, object] = {
        "block_count": 3,
        "context_length": 128,
        "embedding_length": 64,
        "expert_count": 4,
        "expert_used_count": 2,
    }
    keys = {f"{arch}.{key}": item for key, item in (keys | changes).items() if item is not None}
    return {"general.architecture": arch, "general.name": "small"} | keys


def moe_tensors(
    layers: Sequence[int] = (1, 2),
    parts: Sequence[str] = ("gate", "up", "down"),
    n_expert: int = 4,
    kind: int = TYPE_F32,
) -> list[TensorBytes]:
    """A dense embedding and the expert tensors of some layers, every expert filled with a byte of its own."""
    tensors = [TensorBytes("token_embd.weight", (64, 10))]
    for layer in layers:
        tensors.append(TensorBytes(f"blk.{layer}.ffn_gate_inp.weight", (64, n_expert)))
        for number_of_part, part in enumerate(parts):
            rows = (64, 128 if part == "gate_up" else 64)
            shape = (*rows, n_expert)
            slab = n_bytes(TensorBytes("", rows, kind))
            data = b"".join(bytes([expert_byte(layer, number_of_part, i)]) * slab for i in range(n_expert))
            tensors.append(TensorBytes(f"blk.{layer}.ffn_{part}_exps.weight", shape, kind, data))
    return tensors


def expert_byte(layer: int, part: int, expert: int) -> int:
    """What fills one expert's slab in `moe_tensors`; part counts within its layer."""
    return 1 + layer * 40 + part * 10 + expert


def check_sound(header: GGUFHeader) -> None:
    """What every header must promise, whatever was in the file."""
    end = header.data_offset
    for tensor in header.tensors:
        assert tensor.offset % header.alignment == header.data_offset % header.alignment == 0
        assert tensor.offset >= end and tensor.n_bytes > 0
        end = tensor.offset + tensor.n_bytes
        assert end <= header.file_size
    assert len({t.name for t in header.tensors}) == len(header.tensors)
