"""A drop-in `Llama` whose experts live in an `ExpertStore`.

llama.cpp is stock. Its loader puts every tensor into the native buffer type (`tensor_buft_overrides`), its graph calls
the native hook (`cb_eval`), and its own dry run (`no_alloc`) tells the plan what caches and compute buffers will take.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from edgemoe.dry_run import n_outputs_max, plan_for, plan_model, refused
from edgemoe.errors import BackendError
from edgemoe.index import ExpertIndex, read_index
from edgemoe.llama_library import C, PlainLlama, in_llama_cpp, internals, symbols
from edgemoe.memory import machine
from edgemoe.plan import DEFAULT_UBATCH, ExpertPlan
from edgemoe.store import ExpertStore, forget_libraries, return_freed_memory

__all__ = ["Llama", "plan_model"]

_EVERY_TENSOR = b"."
_BUILDING = threading.Lock()


class _BufferTypeOverride(ctypes.Structure):
    """llama.h: struct llama_model_tensor_buft_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


class Llama(PlainLlama):
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
        self.plan = plan_for(self.index, ram, n_ctx, n_ubatch, kwargs)
        if on_plan is not None:
            on_plan(self.plan)
        # The dry run is freed by now; the load needs the same memory again.
        return_freed_memory()
        if machine().cgroup_limit is not None:
            forget_libraries()
        self.store = ExpertStore(self.index, self.plan.arena_bytes, io)
        kwargs.setdefault("verbose", False)
        # Both are settled: weights go to the expert buffer, and the prompt batch is what the plan counted with.
        kwargs.pop("use_mmap", None)
        try:
            interrupt = self.store.session.interrupt
            with in_llama_cpp(kwargs["verbose"], interrupt) as errors, _reporting(self.store, self.index, on_progress):
                try:
                    with _built_around(self.store, n_outputs_max(kwargs)):
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
                    raise refused(self.index, errors or [str(error)]) from error
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
    plain_model, plain_context = internals.LlamaModel, internals.LlamaContext

    def model(**kwargs: Any) -> Any:
        return _Model(store=store, **kwargs) if threading.get_ident() == owner else plain_model(**kwargs)

    def context(**kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return plain_context(**kwargs)
        kwargs["params"].n_outputs_max = n_outputs_max
        return _Context(store=store, **kwargs)

    with _BUILDING:
        internals.LlamaModel, internals.LlamaContext = model, context
        try:
            yield
        finally:
            internals.LlamaModel, internals.LlamaContext = plain_model, plain_context


class _Model(internals.LlamaModel):
    """A model whose every tensor is allocated by the native buffer type."""

    def __init__(self, *, store: ExpertStore, path_model: str, params: Any, verbose: bool) -> None:
        store.attach(symbols())
        self._overrides = (_BufferTypeOverride * 2)(
            _BufferTypeOverride(_EVERY_TENSOR, store.session.buffer_type()), _BufferTypeOverride(None, None)
        )
        params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        params.load_mode = C.LLAMA_LOAD_MODE_NONE
        # Repacked weights are a second copy in another layout.
        params.use_extra_bufts = False
        # verbose=True only keeps llama_cpp from closing stderr, where the progress bar is; the log is already caught.
        with _interruptible(store):
            super().__init__(path_model=path_model, params=params, verbose=True)
        self.verbose = verbose
        store.session.restore_names()


class _Context(internals.LlamaContext):
    """A context whose graph calls the native hook, and whose prompt batches can be interrupted."""

    def __init__(self, *, store: ExpertStore, model: Any, params: Any, verbose: bool) -> None:
        session = store.session
        params.cb_eval = C.ggml_backend_sched_eval_callback(session.eval_callback())
        params.cb_eval_user_data = session.callback_data()
        params.abort_callback = C.ggml_abort_callback(session.abort_callback())
        params.abort_callback_data = session.callback_data()
        self._store = store
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
        with in_llama_cpp(self.verbose, session.interrupt) as errors:
            try:
                with _interruptible(self._store):
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
        # Stopped after llama.cpp's last look at the flag: it reports success for a graph that was cut short.
        if session.interrupted():
            raise KeyboardInterrupt


@contextlib.contextmanager
def _interruptible(store: ExpertStore) -> Iterator[None]:
    """Have SIGINT stop the C code at once; Python, which gets to know of it only afterwards, then raises as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    store.session.watch_interrupts()
    try:
        yield
    finally:
        store.session.ignore_interrupts()


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
