"""llama.cpp's model and context as edgemoe builds them: tensors in the store's buffer, a graph with the native hook."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

from edgemoe.errors import BackendError
from edgemoe.llama_library import C, in_llama_cpp, internals, symbols
from edgemoe.router_tap import RouterTap
from edgemoe.store import ExpertStore

__all__ = ["built_around", "reporting"]

_EVERY_TENSOR = b"."
_BUILDING = threading.Lock()


class _BufferTypeOverride(ctypes.Structure):
    """llama.h: struct llama_model_tensor_buft_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@contextlib.contextmanager
def built_around(store: ExpertStore, tap: RouterTap, n_outputs_max: int) -> Iterator[None]:
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
        return _Context(store=store, tap=tap, **kwargs)

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

    def __init__(self, *, store: ExpertStore, tap: RouterTap, model: Any, params: Any, verbose: bool) -> None:
        session = store.session
        params.cb_eval = C.ggml_backend_sched_eval_callback(session.eval_callback())
        params.cb_eval_user_data = session.callback_data()
        params.abort_callback = C.ggml_abort_callback(session.abort_callback())
        params.abort_callback_data = session.callback_data()
        self._store = store
        self._tap = tap
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
        session.begin(batch.batch.pos[0], n_tokens)
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
        self._tap.drain()


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
def reporting(store: ExpertStore, on_progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Report the dense bytes read while llama.cpp loads; its own callback only sees tensors that it reads itself."""
    if on_progress is None:
        yield
        return
    loaded = threading.Event()

    def report() -> None:
        while not loaded.wait(0.05):
            on_progress(store.stats().dense_bytes, store.load_bytes)

    thread = threading.Thread(target=report, name="edgemoe-progress")
    thread.start()
    try:
        yield
    finally:
        loaded.set()
        thread.join()
        on_progress(store.stats().dense_bytes, store.load_bytes)
