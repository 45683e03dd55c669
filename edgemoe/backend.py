"""The only file that imports llama_cpp: a drop-in `Llama` whose experts live in an `ExpertStore`.

llama.cpp is stock. Its loader puts every tensor into the native buffer type (`tensor_buft_overrides`), its graph calls
the native hook (`cb_eval`), and its own dry run (`no_alloc`) tells the plan what caches and compute buffers will take.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgemoe.errors import BackendError, EdgemoeError
from edgemoe.index import ExpertIndex, read_index
from edgemoe.interrupts import held_interrupts
from edgemoe.memory import current_rss, parse_budget
from edgemoe.plan import DEFAULT_UBATCH, ExpertPlan, Footprint, kernel_scratch, make_plan
from edgemoe.store import ExpertStore, memory_use

LLAMA_CPP_PYTHON = "0.3.36"
"""The release whose struct layouts the native core follows."""


def _require_version() -> None:
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


_require_version()

import jinja2  # noqa: E402
import llama_cpp  # noqa: E402
from llama_cpp import _internals, _logger  # noqa: E402
from llama_cpp import llama_cpp as C  # noqa: E402, N812

_EVERY_TENSOR = b"."
_BUILDING = threading.Lock()
_GROWTH = 8 << 20
_LOG_LEVEL_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR
_BYTES_PER_TOKEN_OF_VOCABULARY = 64


class _BufferTypeOverride(ctypes.Structure):
    """llama.h: struct llama_model_tensor_buft_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@lru_cache(maxsize=1)
def _symbols() -> dict[str, int]:
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
            "ggml_set_name",
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
def _in_llama_cpp(verbose: bool, stop: Callable[[], None] | None = None) -> Iterator[list[str]]:
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
        with _in_llama_cpp(verbose=False) as errors:
            self._model = C.llama_model_load_from_file(os.fsencode(index.path), params)
        if not self._model:
            raise _refused(index, errors)
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
        with _in_llama_cpp(verbose=False) as errors:
            context = C.llama_init_from_model(self._model, params)
            if not context:
                raise _refused(self._index, errors)
            _, kv_bytes, compute_bytes = memory_use(_symbols(), ctypes.cast(context, ctypes.c_void_p).value or 0)
            C.llama_free(context)
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


def _refused(index: ExpertIndex, errors: list[str]) -> BackendError:
    reason = "; ".join(errors[:2]) or "it gave no reason"
    return BackendError(
        f"llama.cpp (llama-cpp-python {LLAMA_CPP_PYTHON}) refused {index.path}: {reason}; check the file with"
        f" `edgemoe inspect`, or convert it again"
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
    return _plan(read_index(model_path), ram, n_ctx, n_ubatch, context_options)


def _plan(
    index: ExpertIndex, ram: str | int, n_ctx: int | None, n_ubatch: int | None, options: dict[str, Any]
) -> ExpertPlan:
    # What llama_cpp.Llama makes of these options.
    on, off = C.LLAMA_FLASH_ATTN_TYPE_ENABLED, C.LLAMA_FLASH_ATTN_TYPE_DISABLED
    fields: dict[str, Any] = {"flash_attn_type": on if options.get("flash_attn") else off}
    fields |= {name: options[name] for name in ("type_k", "type_v", "swa_full") if options.get(name) is not None}
    fields["n_outputs_max"] = _n_outputs_max(options)
    if options.get("embedding"):
        fields |= {"embeddings": True, "n_seq_max": C.llama_max_parallel_sequences(), "kv_unified": True}
    with DryRun(index, fields, bool(options.get("logits_all"))) as dry_run:
        budget = parse_budget(ram)
        process = current_rss() + _GROWTH + _BYTES_PER_TOKEN_OF_VOCABULARY * index.n_vocab
        return make_plan(index, budget, dry_run.footprint, process, n_ctx, n_ubatch)


def _n_outputs_max(options: dict[str, Any]) -> int:
    """Tokens of one batch whose logits `llama_cpp.Llama` asks for: the last, or any number (0).

    llama.cpp otherwise sets memory aside for the logits of a whole batch, 297 MiB at 512 x 151,936.
    """
    every = options.get("logits_all") or options.get("embedding") or options.get("draft_model")
    return 0 if every else 1


class Llama(llama_cpp.Llama):
    """`llama_cpp.Llama` within a RAM budget: same methods, same answers, experts served from disk.

    Parameters
    ----------
    model_path : str
        GGUF file of a Mixture-of-Experts model, the first part of a split one.
    ram : str or int
        Budget for the whole process: bytes, ``"6GiB"``, ``"50%"`` or ``"auto"``.
    io : str
        ``auto``, ``direct``, ``mmap`` or ``pread``.
    n_ctx : int, optional
        Context in tokens. None takes what fits the budget, 0 the model's own.
    n_batch, n_ubatch : int, optional
        Logical and physical batch, 512 unless the experts of such a batch do not fit.
    on_plan : callable, optional
        ``on_plan(plan)`` before anything is loaded.
    on_progress : callable, optional
        ``on_progress(done, total)`` in bytes, from another thread, while the dense weights load.
    **kwargs
        Everything else that `llama_cpp.Llama` takes. GPU offload and mlock contradict the budget and are refused.

    Attributes
    ----------
    index : ExpertIndex
    plan : ExpertPlan
    store : ExpertStore

    Raises
    ------
    EdgemoeError
        ModelFileError, BudgetError, StoreError or BackendError; while generating, StoreError.
    """

    def __init__(
        self,
        model_path: str,
        *,
        ram: str | int = "auto",
        io: str = "auto",
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_ubatch: int | None = None,
        on_plan: Callable[[ExpertPlan], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()
        for name in ("n_gpu_layers", "use_mlock", "vocab_only"):
            if kwargs.get(name):
                raise BackendError(
                    f"{name}={kwargs[name]} contradicts a RAM budget; leave it out, or use llama_cpp.Llama"
                )
        self.ram = ram
        self.index = read_index(Path(model_path))
        # A common override: more or fewer experts for each token than the file says.
        top_k = (kwargs.get("kv_overrides") or {}).get(f"{self.index.architecture}.expert_used_count")
        if top_k is not None:
            self.index = replace(self.index, n_expert_used=(int(top_k),) * self.index.n_layer)
        if n_ctx == 0:
            n_ctx = self.index.context_length
        # An n_ubatch that nobody asked for is the plan's to choose, within n_batch.
        if n_ubatch is not None or n_batch < DEFAULT_UBATCH:
            n_ubatch = min(n_ubatch or n_batch, n_batch)
        self.plan = _plan(self.index, ram, n_ctx, n_ubatch, kwargs)
        if on_plan is not None:
            on_plan(self.plan)
        self.store = ExpertStore(self.index, self.plan.arena_bytes, io)
        kwargs.setdefault("verbose", False)
        # Both are settled: weights go to the expert buffer, and the prompt batch is what the plan counted with.
        kwargs.pop("use_mmap", None)
        try:
            with _in_llama_cpp(kwargs["verbose"]) as errors, _reporting(self.store, self.index, on_progress):
                try:
                    with _built_around(self.store, _n_outputs_max(kwargs)):
                        super().__init__(
                            str(model_path),
                            use_mmap=False,
                            n_ctx=self.plan.n_ctx,
                            n_batch=n_batch,
                            n_ubatch=self.plan.n_ubatch,
                            **kwargs,
                        )
                except ValueError as error:
                    errors[:0] = filter(None, [self.store.session.load_failure()])
                    raise _refused(self.index, errors or [str(error)]) from error
                except jinja2.TemplateError as error:
                    raise BackendError(
                        f"the chat template in {self.index.path} cannot be read ({error});"
                        " use another GGUF of this model"
                    ) from error
            self.store.forget_page_cache()
        except BaseException:
            self.close()
            raise

    def eval(self, tokens: Any) -> None:
        """Evaluate tokens, as `llama_cpp.Llama.eval`; after a failure the context is as before the failing batch."""
        try:
            super().eval(tokens)
        except BaseException:
            # A recurrent state cannot be cut back to an earlier token.
            if self._is_recurrent or self._is_hybrid:
                self.reset()
            raise

    def interrupt(self) -> None:
        """Stop the running evaluation from another thread; it raises KeyboardInterrupt there."""
        self.store.session.interrupt()

    def close(self) -> None:
        """Free the model, then the store. May be called twice."""
        stack = getattr(self, "_stack", None)
        if stack is not None:
            stack.close()
        store: ExpertStore | None = getattr(self, "store", None)
        if store is not None:
            store.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        del state["use_mmap"], state["use_mlock"], state["vocab_only"]
        return state | {"ram": self.ram, "io": self.store.io}


@contextlib.contextmanager
def _built_around(store: ExpertStore, n_outputs_max: int) -> Iterator[None]:
    """Let `llama_cpp.Llama.__init__`, which builds model and context in one go, build ours.

    Only in this thread: a plain Llama that another thread builds meanwhile gets the plain classes.
    """
    owner = threading.get_ident()
    plain_model, plain_context = _internals.LlamaModel, _internals.LlamaContext

    def model(**kwargs: Any) -> Any:
        return _Model(store=store, **kwargs) if threading.get_ident() == owner else plain_model(**kwargs)

    def context(**kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return plain_context(**kwargs)
        kwargs["params"].n_outputs_max = n_outputs_max
        return _Context(store=store, **kwargs)

    with _BUILDING:
        _internals.LlamaModel, _internals.LlamaContext = model, context
        try:
            yield
        finally:
            _internals.LlamaModel, _internals.LlamaContext = plain_model, plain_context


class _Model(_internals.LlamaModel):
    """A model whose every tensor is allocated by the native buffer type."""

    def __init__(self, *, store: ExpertStore, path_model: str, params: Any, verbose: bool) -> None:
        store.attach(_symbols())
        self._overrides = (_BufferTypeOverride * 2)(
            _BufferTypeOverride(_EVERY_TENSOR, store.session.buffer_type()), _BufferTypeOverride(None, None)
        )
        params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        params.load_mode = C.LLAMA_LOAD_MODE_NONE
        # Repacked weights are a second copy in another layout.
        params.use_extra_bufts = False
        # verbose=True only keeps llama_cpp from closing stderr, where the progress bar is; the log is already caught.
        super().__init__(path_model=path_model, params=params, verbose=True)
        self.verbose = verbose
        store.session.restore_names()


class _Context(_internals.LlamaContext):
    """A context whose graph calls the native hook, and whose prompt batches can be interrupted."""

    def __init__(self, *, store: ExpertStore, model: Any, params: Any, verbose: bool) -> None:
        session = store.session
        params.cb_eval = C.ggml_backend_sched_eval_callback(session.eval_callback())
        params.cb_eval_user_data = session.callback_data()
        params.abort_callback = C.ggml_abort_callback(session.abort_callback())
        params.abort_callback_data = session.callback_data()
        self._store = store
        self._prompt_thread: ThreadPoolExecutor | None = None
        super().__init__(model=model, params=params, verbose=verbose)

    def decode(self, batch: Any) -> None:
        self._run(super().decode, batch)

    def encode(self, batch: Any) -> None:
        self._run(super().encode, batch)

    def _run(self, compute: Callable[[Any], None], batch: Any) -> None:
        session = self._store.session
        n_tokens = batch.n_tokens()
        if self.params.n_outputs_max == 1 and sum(batch.batch.logits[i] for i in range(n_tokens)) > 1:
            raise BackendError("logits of more than one token were asked for; open the model with logits_all=True")
        session.begin()
        with _in_llama_cpp(self.verbose, session.interrupt) as errors:
            try:
                # Python sees Ctrl-C only between C calls, and a prompt batch can take minutes: the main thread waits
                # for another one. A single token is not worth the detour.
                if n_tokens > 1 and threading.current_thread() is threading.main_thread():
                    if self._prompt_thread is None:
                        self._prompt_thread = ThreadPoolExecutor(1, "edgemoe-prompt")
                    self._prompt_thread.submit(compute, batch).result()
                else:
                    compute(batch)
            except RuntimeError as error:
                self._store.raise_failure()
                if session.interrupted():
                    raise KeyboardInterrupt from None
                reason = "; ".join([str(error), *errors])
                raise BackendError(
                    f"llama.cpp could not evaluate the batch: {reason}; is it longer than the context?"
                ) from error
        self._store.raise_failure()

    def close(self) -> None:
        if self._prompt_thread is not None:
            self._prompt_thread.shutdown()
            self._prompt_thread = None
        super().close()


@contextlib.contextmanager
def _reporting(
    store: ExpertStore, index: ExpertIndex, on_progress: Callable[[int, int], None] | None
) -> Iterator[None]:
    """Report the dense bytes read while llama.cpp loads; its own callback only sees tensors that it reads itself."""
    if on_progress is None:
        yield
        return
    loaded = threading.Event()

    def report() -> None:
        while not loaded.wait(0.05):
            on_progress(store.stats().dense_bytes, index.dense_bytes)

    thread = threading.Thread(target=report, name="edgemoe-progress")
    thread.start()
    try:
        yield
    finally:
        loaded.set()
        thread.join()
        on_progress(store.stats().dense_bytes, index.dense_bytes)


__all__ = ["LLAMA_CPP_PYTHON", "DryRun", "EdgemoeError", "Llama", "plan_model"]
