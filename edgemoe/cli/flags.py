"""The package names options as Python does; the command line says them as its flags."""

from __future__ import annotations

import re

__all__ = ["in_flags"]

_FLAGS = {
    "ram": "--ram",
    "n_ctx": "--ctx",
    "n_ubatch": "--ubatch",
    "n_threads": "--threads",
    "io": "--io",
    "experts": "--experts",
    "keep": "--keep",
    "task": "--task",
    "skip_mass": "--skip-mass",
}
# Not within a path. Alone, the others are words of the language.
_GIVEN = re.compile(rf"(?<![\w/.-])({'|'.join(_FLAGS)})=")
_ALONE = re.compile(r"(?<![\w/.-])(n_ctx|n_ubatch|n_threads|skip_mass)(?![\w/=-]|\.\w)")


def in_flags(sentence: str) -> str:
    """Say a sentence about ``ram=6GiB`` and ``n_ctx`` with ``--ram 6GiB`` and ``--ctx``."""
    given = _GIVEN.sub(lambda found: f"{_FLAGS[found[1]]} ", sentence)
    return _ALONE.sub(lambda found: _FLAGS[found[1]], given)
