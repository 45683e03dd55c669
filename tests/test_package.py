"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edgemoe


def test_every_public_name_is_there() -> None:
    assert set(edgemoe.__all__) <= set(dir(edgemoe))
    for name in edgemoe.__all__:
        assert getattr(edgemoe, name).__name__ == name
    assert set(edgemoe._HOME) == set(edgemoe.__all__)


def test_a_conversation_needs_public_names_only() -> None:
    assert edgemoe.ChatSession.__init__.__annotations__["sampling"] == "Sampling"
    assert "Sampling" in edgemoe.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        edgemoe.Lama  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, edgemoe; print(*sorted({'numpy', 'llama_cpp', 'gguf', 'rich', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
