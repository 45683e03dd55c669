"""Headers are laid out as GGUF has it, and what GGUF cannot hold is refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from gguf.constants import GGUFValueType as Kind
from test_gguf_file import F32, Q8_0, TENSORS, tensor

from edgemoe.converters.gguf_layout import RawValue, TensorInfo, Value, lay_out
from edgemoe.errors import ConvertError


def test_raw_values_are_written_as_they_are() -> None:
    value = Value([1, 2, 3], Kind.ARRAY, Kind.INT16)
    raw = RawValue(b"\x09\0\0\0" + b"\x03\0\0\0" + b"\3\0\0\0\0\0\0\0" + b"\1\0\2\0\3\0")
    assert lay_out({"k": value}, []) == lay_out({"k": raw}, [])


def test_a_stated_alignment_is_replaced_in_place() -> None:
    metadata = {"general.alignment": Value(64, Kind.UINT32), "some.number": Value(7, Kind.UINT32)}
    default = lay_out(metadata, TENSORS)
    assert default.header == lay_out({**metadata, "general.alignment": Value(32, Kind.UINT32)}, TENSORS).header
    assert all(offset % 4096 == 0 for offset in lay_out(metadata, TENSORS, alignment=4096).offsets)


@pytest.mark.parametrize(
    ("metadata", "tensors", "expected"),
    [
        ({"k": Value(-1, Kind.UINT32)}, [], "metadata key 'k' cannot be stored"),
        ({"k": Value("x", Kind.FLOAT32)}, [], "metadata key 'k' cannot be stored"),
        ({"k": Value("\ud800", Kind.STRING)}, [], "metadata key 'k' cannot be stored"),
        ({"k": Value([[1]], Kind.ARRAY, Kind.ARRAY)}, [], "metadata key 'k' cannot be stored"),
        ({}, [tensor("a", (1,)), tensor("a", (2,))], "two tensors are named 'a'"),
        ({}, [tensor("x" * 64, (1,))], "more than 63 bytes"),
        ({}, [TensorInfo("a", (), F32, 4)], "shape ()"),
        ({}, [TensorInfo("a", (2, 1, 1, 1, 1), F32, 8)], "1 to 4 extents"),
        ({}, [TensorInfo("a", (2,), F32, 4)], "is no 4 bytes of F32"),
        ({}, [TensorInfo("a", (64,), 99, 13)], "tensor 'a' has type 99, which this edgemoe does not know"),
        ({}, [TensorInfo("a", (33,), Q8_0, 34)], "is no 34 bytes of Q8_0"),
    ],
)
def test_what_gguf_cannot_hold(metadata: Mapping[str, Value], tensors: list[TensorInfo], expected: str) -> None:
    with pytest.raises(ConvertError) as caught:
        lay_out(metadata, tensors)
    assert expected in str(caught.value) and "; " in str(caught.value)
