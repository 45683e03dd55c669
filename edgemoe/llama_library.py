"""The only file that imports llama_cpp: the library, checked, with what edgemoe needs of it.

`C` is the ctypes face of llama.h. The rest of the package uses llama-cpp-python through the names of this file.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.errors import BackendError
from edgemoe.interrupts import held_interrupts

LLAMA_CPP_PYTHON = "0.3.36"
"""The release whose struct layouts the native core follows."""


def require_version() -> None:
    """Refuse to run on another release of llama-cpp-python.

    Raises
    ------
    BackendError
        Names the release to install.
    """
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise BackendError(
            f"llama-cpp-python is not installed; run: pip install llama-cpp-python=={LLAMA_CPP_PYTHON}"
        ) from None
    if found != LLAMA_CPP_PYTHON:
        raise BackendError(
            f"llama-cpp-python {found} is installed, but edgemoe's native core follows the memory layout of"
            f" {LLAMA_CPP_PYTHON}; run: pip install llama-cpp-python=={LLAMA_CPP_PYTHON}"
        )


require_version()

# OpenMP's threads wait for each other by spinning for milliseconds, longer than any barrier takes. While one of them
# waits for an expert, those who read it need the processor. libgomp reads these when it is loaded; processes that this
# one starts are not told.
_untold = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
if _untold:
    os.environ["GOMP_SPINCOUNT"] = "3000"

from llama_cpp import Llama as PlainLlama  # noqa: E402
from llama_cpp import _internals, _logger  # noqa: E402
from llama_cpp import llama_cpp as C  # noqa: E402, N812

if _untold:
    del os.environ["GOMP_SPINCOUNT"]

__all__ = [
    "LLAMA_CPP_PYTHON",
    "C",
    "PlainLlama",
    "in_llama_cpp",
    "internals",
    "quantize_rows",
    "require_version",
    "symbols",
]

internals = _internals
"""llama_cpp's own wrappers of a model and a context."""

_LOG_LEVEL_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR


@lru_cache(maxsize=1)
def symbols() -> dict[str, int]:
    """Addresses in the libllama that llama_cpp has loaded, by the names the native core asks for."""
    names = {
        name: name
        for name in (
            "ggml_backend_buffer_init",
            "ggml_nbytes",
            "ggml_init",
            "ggml_free",
            "ggml_new_tensor_3d",
            "ggml_mul_mat_id",
            "ggml_get_rows",
            "ggml_set_name",
            "ggml_row_size",
            "ggml_get_type_traits_cpu",
            "ggml_custom_4d",
        )
    }
    # A C++ function of llama-ext.h, hence the mangled name.
    names["llama_get_memory_breakdown"] = "_Z26llama_get_memory_breakdownPK13llama_context"
    try:
        return {name: ctypes.cast(C._lib[symbol], ctypes.c_void_p).value or 0 for name, symbol in names.items()}
    except AttributeError as error:
        raise BackendError(
            f"the libllama of llama-cpp-python {LLAMA_CPP_PYTHON} lacks a function ({error}); reinstall it with:"
            f" pip install --force-reinstall llama-cpp-python=={LLAMA_CPP_PYTHON}"
        ) from error


@lru_cache(maxsize=1)
def _quantize_chunk() -> Any:
    from llama_cpp._ggml import libggml

    function = libggml.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


def quantize_rows(ggml_type: int, rows: npt.NDArray[np.float32], row_bytes: int) -> npt.NDArray[np.uint8]:
    """Quantize weights with llama.cpp's own quantizer (`ggml_quantize_chunk`); threads may do so at once.

    Parameters
    ----------
    ggml_type : int
        A type that needs no importance matrix and whose blocks fit the rows.
    rows : float32 [n_rows, n_weights]
        Contiguous.
    row_bytes : int
        Size of a row of that type.

    Returns
    -------
    uint8 [n_rows, row_bytes]
    """
    assert rows.dtype == np.float32 and rows.flags.c_contiguous, f"{rows.dtype} rows {rows.strides} bytes apart"
    n_rows, n_weights = rows.shape
    packed = np.empty((n_rows, row_bytes), np.uint8)
    written = _quantize_chunk()(ggml_type, rows.ctypes.data, packed.ctypes.data, 0, n_rows, n_weights, None)
    assert written == packed.nbytes, f"ggml wrote {written} of {packed.nbytes} bytes"
    return packed


class _Listener:
    """Takes llama.cpp's log while it is in the list of listeners."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.errors: list[str] = []


_listeners: list[_Listener] = []


@C.llama_log_callback  # type: ignore[untyped-decorator]
def _listen(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Hand llama.cpp's errors to whoever listens; when nobody does, llama-cpp-python prints as it likes."""
    if not _listeners:
        _logger.llama_log_callback(level, text, user_data)
        return
    line = text.decode("utf-8", "replace")
    if any(listener.verbose for listener in _listeners):
        print(line, end="", file=sys.stderr, flush=True)
    if level == _LOG_LEVEL_ERROR:
        for listener in _listeners:
            listener.errors.append(line.strip())


# Set once and for all: a callback that came and went could be freed while another thread is in it.
C.llama_log_set(_listen, ctypes.c_void_p(0))


@contextlib.contextmanager
def in_llama_cpp(verbose: bool, stop: Callable[[], None] | None = None) -> Iterator[list[str]]:
    """Collect llama.cpp's error lines (with `verbose`, print its whole log), and hold Ctrl-C.

    KeyboardInterrupt would be lost in `_listen`, which C calls; `stop` asks the C code to end.
    """
    listener = _Listener(verbose)
    with held_interrupts(stop):
        _listeners.append(listener)
        try:
            yield listener.errors
        finally:
            _listeners.remove(listener)
