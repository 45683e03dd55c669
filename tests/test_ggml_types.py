from __future__ import annotations

import ctypes

import gguf
import pytest

from edgemoe.ggml_types import type_blocks, type_name


def test_names_are_those_of_gguf() -> None:
    for kind in gguf.GGML_QUANT_SIZES:
        assert type_name(int(kind)) == kind.name


def test_types_only_llama_cpp_knows() -> None:
    assert (type_name(42), type_blocks(42)) == ("Q2_0", (64, 18))
    assert (type_name(99), type_blocks(99)) == ("type 99", None)


def test_sizes_are_those_of_the_installed_ggml() -> None:
    ggml = pytest.importorskip("llama_cpp._ggml").libggml
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for kind in range(43):
        blocks = type_blocks(kind)
        if blocks is not None:
            assert (ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind)) == blocks, type_name(kind)
        else:
            assert ggml.ggml_blck_size(kind) == 0, "a type that was removed"
