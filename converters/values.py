"""Python values as GGUF metadata values."""

from __future__ import annotations

from typing import Any

from gguf.constants import GGUFValueType

from edgemoe.converters.gguf_file import Value

__all__ = ["array", "f32", "flag", "text", "u32"]


def u32(value: int) -> Value:
    """Encode a whole number."""
    return Value(value, GGUFValueType.UINT32)


def f32(value: float) -> Value:
    """Encode a number."""
    return Value(value, GGUFValueType.FLOAT32)


def flag(value: bool) -> Value:
    """Encode true or false."""
    return Value(value, GGUFValueType.BOOL)


def text(value: str) -> Value:
    """Encode a text."""
    return Value(value, GGUFValueType.STRING)


def array(values: list[Any], element: GGUFValueType) -> Value:
    """Encode a list."""
    return Value(values, GGUFValueType.ARRAY, element)
