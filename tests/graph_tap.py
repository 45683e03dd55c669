"""An independent look into llama.cpp's graph: plain llama.cpp with an eval callback in Python that copies nodes."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as C  # noqa: N812
from plain_llama import plain_llama

Array = npt.NDArray[Any]


class Tensor(ctypes.Structure):
    """ggml.h: struct ggml_tensor."""


Tensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
)

_NUMBERS = {0: np.dtype(np.float32), 26: np.dtype(np.int32)}  # enum ggml_type


def copied(tensor: Tensor) -> Array:
    """The tensor's numbers, last dimension of ggml first: [ne2, ne1, ne0]."""
    shape = tuple(tensor.ne[i] for i in (2, 1, 0))
    strides = tuple(tensor.nb[i] for i in (2, 1, 0))
    dtype = _NUMBERS[tensor.type]
    if 0 in shape:
        return np.zeros(shape, dtype)
    n_bytes = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + dtype.itemsize
    memory = (ctypes.c_char * n_bytes).from_address(tensor.data)
    return np.ndarray(shape, dtype, memory, strides=strides).copy()


class GraphTap:
    """A plain model whose nodes of the given names are copied, and their second operands as ``<name>.src1``.

    ``tap.rows("ffn_moe_topk", 3)`` is what ``ffn_moe_topk-3`` was; rows of several graphs follow each other.
    """

    def __init__(self, path: Path, names: tuple[str, ...], **options: Any) -> None:
        self._names = names
        self._seen: defaultdict[tuple[str, int], list[Array]] = defaultdict(list)
        self._callback = C.ggml_backend_sched_eval_callback(self._on_node)
        defaults = C.llama_context_default_params

        def with_callback() -> Any:
            params = defaults()
            params.cb_eval = self._callback
            return params

        with mock.patch.object(C, "llama_context_default_params", with_callback):
            self.llama = plain_llama(path, **options)
        self._seen.clear()

    def _on_node(self, node: int, ask: bool, _: object) -> bool:
        tensor = Tensor.from_address(node)
        name, _, layer = tensor.name.decode().rpartition("-")
        if name in self._names and layer.isdigit():
            if not ask:
                self._seen[name, int(layer)].append(copied(tensor))
                if tensor.src[1] and tensor.src[1].contents.type in _NUMBERS:
                    self._seen[f"{name}.src1", int(layer)].append(copied(tensor.src[1].contents))
            return True
        return not ask

    def has(self, name: str, layer: int) -> bool:
        """Whether the graph has such a node."""
        return (name, layer) in self._seen

    def rows(self, name: str, layer: int, every: int = 1) -> Array:
        """Of a node with a row for each token, all tokens so far: [n_tokens, ne0].

        `every` 2 takes the first of two nodes of that name in each graph.
        """
        return np.concatenate([part[0] for part in self._seen[name, layer][::every]])

    def slots(self, name: str, layer: int, every: int = 1) -> Array:
        """Of a node with a row for each token and each of its experts: [n_tokens, n_expert_used, ne0]."""
        return np.concatenate(self._seen[name, layer][::every])

    def close(self) -> None:
        """Free the model."""
        self.llama.close()
