"""llama.cpp's own account of what a model and a context would allocate, and the plan made with it."""

from __future__ import annotations

import ctypes
import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

from edgemoe.errors import BackendError
from edgemoe.index import ExpertIndex, read_index
from edgemoe.llama_library import LLAMA_CPP_PYTHON, C, PlainLlama, in_llama_cpp, symbols
from edgemoe.memory import current_rss, parse_budget
from edgemoe.plan import BYTES_PER_CELL, DEFAULT_UBATCH, ExpertPlan, Footprint, PlanLine, kernel_scratch, make_plan
from edgemoe.store import memory_use, return_freed_memory
from edgemoe.threads import default_threads

__all__ = ["DryRun", "check_options", "n_outputs_max", "plan_for", "plan_model", "refused"]

# What a process grows by once it runs: Python's own allocations, and the sampler's arrays over the vocabulary.
_GROWTH = 8 << 20
_BYTES_PER_TOKEN_OF_VOCABULARY = 64

_BYTES_PER_THREAD = 32 << 10  # a stack's first pages, and what the C library keeps for it

# Values that mean something; llama_cpp takes 0 context and 0 threads for its default.
_TOKENS, _THREADS = 1 << 24, 512
_RANGES = {
    "n_ctx": (0, _TOKENS),
    "n_batch": (1, _TOKENS),
    "n_ubatch": (1, _TOKENS),
    "n_threads": (0, _THREADS),
    "n_threads_batch": (0, _THREADS),
}


class DryRun:
    """llama.cpp's own account of what a context would allocate; no weights are read.

    Parameters
    ----------
    index : ExpertIndex
        The model.
    context_options : dict
        Fields of llama_context_params that change memory: ``type_k``, ``type_v``, ``flash_attn_type`` and so on.
    logits_all : bool
        Whether logits of all tokens are kept.

    Raises
    ------
    BackendError
        With llama.cpp's reason, when it refuses the model.
    """

    def __init__(self, index: ExpertIndex, context_options: dict[str, Any], logits_all: bool = False) -> None:
        self._index = index
        self._options = context_options
        self._logits_all = logits_all
        params = C.llama_model_default_params()
        params.load_mode = C.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = False
        params.no_alloc = True
        C.llama_backend_init()
        with in_llama_cpp(verbose=False) as errors:
            self._model = C.llama_model_load_from_file(os.fsencode(index.path), params)
        if not self._model:
            raise refused(index, errors)
        self._known: dict[tuple[int, int], Footprint] = {}

    def footprint(self, n_ctx: int, n_ubatch: int) -> Footprint:
        """Bytes for a context of `n_ctx` tokens and physical batches of `n_ubatch`."""
        if (n_ctx, n_ubatch) not in self._known:
            self._known[n_ctx, n_ubatch] = self._measure(n_ctx, n_ubatch)
        return self._known[n_ctx, n_ubatch]

    def _measure(self, n_ctx: int, n_ubatch: int) -> Footprint:
        params = C.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = max(n_ubatch, DEFAULT_UBATCH)
        params.n_ubatch = n_ubatch
        for name, value in self._options.items():
            setattr(params, name, value)
        with in_llama_cpp(verbose=False) as errors:
            context = C.llama_init_from_model(self._model, params)
            if not context:
                raise refused(self._index, errors)
            _, kv_bytes, compute_bytes = memory_use(symbols(), ctypes.cast(context, ctypes.c_void_p).value or 0)
            C.llama_free(context)
        kv_bytes += BYTES_PER_CELL * n_ctx
        flash = params.flash_attn_type == C.LLAMA_FLASH_ATTN_TYPE_ENABLED
        scratch = kernel_scratch(self._index, n_ctx, n_ubatch, flash)
        logits = self._index.n_vocab * 4 * (2 * n_ctx if self._logits_all else 2)
        return Footprint(n_ctx, n_ubatch, kv_bytes, compute_bytes, scratch + logits)

    def close(self) -> None:
        """Free llama.cpp's model object."""
        if self._model:
            C.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> DryRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refused(index: ExpertIndex, errors: list[str]) -> BackendError:
    """Say in one sentence that, and why, llama.cpp does not take a model."""
    reason = "; ".join(errors[:2]) or "it gave no reason"
    return BackendError(
        f"llama.cpp (llama-cpp-python {LLAMA_CPP_PYTHON}) refused {index.path}: {reason}; check the file with"
        f" `edgemoe inspect`, or convert it again"
    )


def check_options(options: Mapping[str, Any], taker: Callable[..., Any]) -> None:
    """Refuse options that llama_cpp.Llama would overlook, and numbers that it would hand on to C code.

    Parameters
    ----------
    options : Mapping of str to Any
        By name, as given or by default.
    taker : callable
        Who takes them, besides those of llama_cpp.Llama.

    Raises
    ------
    BackendError
        Names the first that is unknown, and what is close to it, or that is no such number.
    """
    known = {name for callee in (PlainLlama, taker) for name in inspect.signature(callee).parameters}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            step = f"did you mean {close[0]}?" if close else "leave it out"
            raise BackendError(f"there is no option {name}; {step}")
    for name, (least, most) in _RANGES.items():
        value = options.get(name)
        whole = isinstance(value, SupportsIndex) and not isinstance(value, bool)
        if value is not None and not (whole and least <= value.__index__() <= most):
            raise BackendError(
                f"{name}={value!r} cannot be; give a whole number from {least} to {most}, or leave it out"
            )


def plan_model(
    model_path: str | os.PathLike[str],
    ram: str | int = "auto",
    n_ctx: int | None = None,
    n_ubatch: int | None = None,
    **context_options: Any,
) -> ExpertPlan:
    """Say where every byte of a budget would go; no weights are loaded.

    Parameters
    ----------
    model_path : path
        GGUF file, the first part of a split one.
    ram : str or int
        Budget as `edgemoe.memory.parse_budget` reads it.
    n_ctx, n_ubatch : int, optional
        As in `edgemoe.plan.make_plan`.
    **context_options
        ``flash_attn``, ``type_k``, ``type_v``, ``swa_full``, ``embedding``, ``logits_all`` of `llama_cpp.Llama`.

    Raises
    ------
    EdgemoeError
        ModelFileError, BudgetError or BackendError.
    """
    check_options({"n_ctx": n_ctx, "n_ubatch": n_ubatch, **context_options}, plan_model)
    return plan_for(read_index(model_path), ram, n_ctx, n_ubatch, context_options)


def plan_for(
    index: ExpertIndex,
    ram: str | int,
    n_ctx: int | None,
    n_ubatch: int | None,
    options: dict[str, Any],
    reserved: Sequence[PlanLine] = (),
) -> ExpertPlan:
    """As `plan_model`, for a header that has been read; `options` are those of `llama_cpp.Llama`."""
    # What llama_cpp.Llama makes of these options.
    on, off = C.LLAMA_FLASH_ATTN_TYPE_ENABLED, C.LLAMA_FLASH_ATTN_TYPE_DISABLED
    fields: dict[str, Any] = {"flash_attn_type": on if options.get("flash_attn") else off}
    fields |= {name: options[name] for name in ("type_k", "type_v", "swa_full") if options.get(name) is not None}
    fields["n_outputs_max"] = n_outputs_max(options)
    if options.get("embedding"):
        fields |= {"embeddings": True, "n_seq_max": C.llama_max_parallel_sequences(), "kv_unified": True}
    with DryRun(index, fields, bool(options.get("logits_all"))) as dry_run:
        budget = parse_budget(ram)
        return_freed_memory()
        threads = max(options.get(name) or default_threads() for name in ("n_threads", "n_threads_batch"))
        process = current_rss() + _GROWTH + _BYTES_PER_TOKEN_OF_VOCABULARY * index.n_vocab + _BYTES_PER_THREAD * threads
        return make_plan(index, budget, dry_run.footprint, process, n_ctx, n_ubatch, reserved)


def n_outputs_max(options: dict[str, Any]) -> int:
    """Tokens of one batch whose logits `llama_cpp.Llama` asks for: the last, or any number (0).

    llama.cpp otherwise sets memory aside for the logits of a whole batch, 297 MiB at 512 x 151,936.
    """
    every = options.get("logits_all") or options.get("embedding") or options.get("draft_model")
    return 0 if every else 1
