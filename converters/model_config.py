"""The numbers in a checkpoint's config.json, read strictly, under the names that releases of transformers gave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["ModelConfig"]

_MISSING: Any = object()
_INT32_MAX = (1 << 31) - 1
_FLOAT32_MAX = 3.4e38


class ModelConfig:
    """Typed access to a model's configuration.

    Every getter takes one or more names, the first that is there (and not null) counts, and raises a `ConvertError`
    that names the key when there is none and no default, or its value is of another kind.

    Parameters
    ----------
    path : Path
        ``config.json``, for messages.
    values : Mapping
        Its content. The ``text_config`` of a model that sees or hears as well counts as if it were at the top.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        text = values.get("text_config")
        self._values = {**values, **text} if isinstance(text, dict) else dict(values)
        self.classes = tuple(map(str, values.get("architectures") or ()))
        rope = self._values.get("rope_parameters") or self._values.get("rope_scaling")
        if isinstance(rope, dict):
            self._rope = rope
        else:
            self._rope = {}

    def refuse(self, reason: str) -> NoReturn:
        """Raise a `ConvertError` about this config; `reason` ends with the next step."""
        raise ConvertError(f"{self.path} {reason}")

    def integer(self, *names: str, default: int | None = _MISSING, low: int = 1, high: int = _INT32_MAX) -> Any:
        """Get a whole number from `low` to `high`."""
        value = self._find(names, default)
        if value is default:
            return value
        # Some configs write 1000000.0.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(f"has {names[0]} {show(str(value))}, expected a whole number from {low} to {high}; correct it")
        return value

    def number(self, *names: str, default: float | None = _MISSING) -> Any:
        """Get a number."""
        value = self._find(names, default)
        if value is default:
            return value
        if not _is_number(value) or not abs(value) <= _FLOAT32_MAX:
            self.refuse(f"has {names[0]} {show(str(value))}, expected a number; correct it")
        return float(value)

    def flag(self, name: str, default: bool = _MISSING) -> bool:
        """Get true or false."""
        value = self._find((name,), default)
        if not isinstance(value, bool):
            self.refuse(f"has {name} {show(str(value))}, expected true or false; correct it")
        return value

    def text(self, name: str, default: str = _MISSING) -> str:
        """Get a text."""
        value = self._find((name,), default)
        if not isinstance(value, str):
            self.refuse(f"has {name} {show(str(value))}, expected a text; correct it")
        return value

    def texts(self, name: str, length: int) -> list[str]:
        """Get a list of `length` texts."""
        value = self._values.get(name)
        if not isinstance(value, list) or len(value) != length or not all(isinstance(item, str) for item in value):
            self.refuse(f"has no list of {length} texts as {name}; give the config that belongs to the weights")
        return value

    def says(self, name: str, default: bool = False) -> bool:
        """Say whether a value of any kind is there that is not null, false, 0 or empty."""
        return bool(self._values.get(name, default))

    def demand(self, name: str, allowed: object, default: object = _MISSING) -> None:
        """Refuse every value but the one that llama.cpp computes with."""
        value = self._find((name,), default)
        if value != allowed:
            self.refuse(f"has {name} {show(str(value))}, but llama.cpp computes {allowed} only; it cannot be converted")

    @property
    def rope_type(self) -> str:
        """How rotary positions are stretched: ``"default"``, ``"linear"``, ``"yarn"``, ``"llama3"``, ..."""
        return str(self._rope.get("rope_type") or self._rope.get("type") or "default")

    def rope(self, name: str, default: float | None = _MISSING, high: float = _FLOAT32_MAX) -> Any:
        """Get a number of the rotary positions, above 0, wherever this release keeps it."""
        value = self._rope.get(name)
        if value is None:
            value = self._find((name,), default)
        if value is default:
            return value
        if not _is_number(value) or not 0 < value <= high:
            self.refuse(f"has {name} {show(str(value))}, expected a number above 0; correct it")
        return float(value)

    def rope_flag(self, name: str, default: bool) -> bool:
        """Get true or false of the rotary positions."""
        value = self._rope.get(name, default)
        if not isinstance(value, bool):
            self.refuse(f"has {name} {show(str(value))}, expected true or false; correct it")
        return value

    def _find(self, names: Sequence[str], default: Any) -> Any:
        for name in names:
            if self._values.get(name) is not None:
                return self._values[name]
        if default is _MISSING:
            self.refuse(f"does not say {names[0]}; give the config that belongs to the weights")
        return default


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
