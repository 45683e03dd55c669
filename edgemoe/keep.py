"""The notation ``k/M``: k experts active per token of M kept in every layer; ``M`` alone leaves k as it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgemoe.errors import BudgetError

__all__ = ["Keep"]

_KEEP = re.compile(r"(?:(\d{1,5})\s*/\s*)?(\d{1,5})", re.ASCII)
_EXAMPLES = "write 8/64 for 8 active of 64 kept in every layer, or 64 to leave the active ones as they are"


@dataclass(frozen=True, slots=True)
class Keep:
    """How many experts of a layer are active and kept.

    Attributes
    ----------
    k : int or None
        Experts per token, None for the model's own number.
    m : int
        Experts kept per layer.
    """

    k: int | None
    m: int

    def __post_init__(self) -> None:
        shown = str(self)
        if self.m < 1 or (self.k is not None and self.k < 1):
            raise BudgetError(f"{shown} keeps or activates no expert at all; {_EXAMPLES}")
        if self.k is not None and self.k > self.m:
            raise BudgetError(f"{shown} activates more experts than it keeps; {_EXAMPLES}")

    def __str__(self) -> str:
        """``8/64`` or ``64``, which `parse` reads back."""
        return str(self.m) if self.k is None else f"{self.k}/{self.m}"

    @classmethod
    def parse(cls, text: str) -> Keep:
        """Read ``k/M`` or ``M``; blanks around the numbers are ignored.

        Raises
        ------
        BudgetError
            If it is neither, a number is zero, or k is larger than M.
        """
        found = _KEEP.fullmatch(text.strip())
        if found is None:
            raise BudgetError(f"{text[:40]!r} is no number of experts to keep; {_EXAMPLES}")
        return cls(int(found[1]) if found[1] else None, int(found[2]))
