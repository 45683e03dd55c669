"""llama.cpp's model and context as edgemoe builds them: tensors in the store's buffer, a graph with the native hook.

C code follows a pointer to what is freed, and two threads in one context end the process: `Use` refuses both before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from edgemoe.errors import BackendError
from edgemoe.llama_library import C, PlainLlama, in_llama_cpp, internals, symbols
from edgemoe.router_tap import RouterTap
from edgemoe.store import ExpertStore

__all__ = ["ServedLlama", "Use", "built_around", "reporting"]

_EVERY_TENSOR = b"."
_BUILDING = threading.Lock()


class Use:
    """Who uses a model: any thread reads its vocabulary, one at a time its context, and nobody once it is closed."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._left = threading.Condition(self._lock)
        self._inside: dict[object, int] = {}  # each use under way, and its thread
        self._computing: set[object] = set()  # those of the context, all by one thread
        self._answer: object | None = None  # the latest, while it is unfinished
        self._thread = 0  # whose that is
        self._closed = False
        self._interrupted = False
        self._process = os.getpid()

    def interrupt(self) -> None:
        """Have what computes, or the answer that is unfinished, end with its next batch at the latest."""
        with self._lock:
            self._interrupted = self._under_way()

    def take_interrupt(self) -> bool:
        """Whether `interrupt` was called and nobody has asked since."""
        with self._lock:
            interrupted, self._interrupted = self._interrupted, False
            return interrupted

    def _under_way(self) -> bool:
        return bool(self._computing) or self._answer is not None

    def _forget_late_interrupt(self) -> None:
        # What it was for has ended by itself.
        self._interrupted = self._interrupted and self._under_way()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the model open for the block.

        Raises
        ------
        BackendError
            When it is closed, or this process is a fork of the one that opened it.
        """
        if self.forked:
            raise BackendError("the model was opened by another process, of which this is a fork; open it here")
        use, me = object(), threading.get_ident()
        # Entered within `try`, and left by name: wherever KeyboardInterrupt comes up, nothing stays behind.
        try:
            with self._lock:
                # What was begun before another thread closed the model is finished.
                if self._closed and me not in self._inside.values():
                    raise BackendError("the model is closed; open it again")
                self._inside[use] = me
            yield
        finally:
            with self._lock:
                self._inside.pop(use, None)
                self._left.notify_all()

    @contextlib.contextmanager
    def computing(self, answer: object | None = None, *, anew: bool = False) -> Iterator[None]:
        """Have the context for the block, as the thread that has it already, or to go on with that answer.

        An answer that is unfinished cannot go on after a block that leaves `anew` another context.

        Raises
        ------
        BackendError
            When the model is closed, or another thread computes or has not finished an answer.
        """
        use, me = object(), threading.get_ident()
        with self.held():
            try:
                with self._lock:
                    taken = self._computing or self._answer not in (None, answer)
                    if taken and self._thread != me:
                        raise BackendError(
                            "the model is in use by another thread; call it when that one's answer has ended,"
                            " or its stream was closed"
                        )
                    if anew and not self._computing:
                        self._answer = None
                    self._thread = me
                    self._computing.add(use)
                yield
            finally:
                with self._lock:
                    self._computing.discard(use)
                    self._forget_late_interrupt()

    def answer(self, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        """Take steps that compute, and keep other threads out in between; any thread may take the next one.

        Raises
        ------
        BackendError
            As `computing`, and when the same thread used the context for something else meanwhile.
        """
        if self._computing and self._thread == threading.get_ident():
            # A part of the answer whose step this is.
            yield from steps
            return
        answer, sent = object(), None
        try:
            with self.computing():
                self._answer = answer
            while True:
                with self.computing(answer):
                    if self._answer is not answer:
                        raise BackendError("the model has evaluated something else since; ask for this answer again")
                    try:
                        piece = steps.send(sent)
                    except StopIteration:
                        return
                sent = yield piece
        finally:
            with self._lock:
                if self._answer is answer:
                    self._answer = None
                self._forget_late_interrupt()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that opened the model, whose threads stayed there."""
        return os.getpid() != self._process

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Let nobody begin any more, and have the block run when all other threads are done.

        Raises
        ------
        BackendError
            When this thread is itself in the middle of a use, as in a callback.
        """
        with self._lock:
            if threading.get_ident() in self._inside.values():
                raise BackendError("the model is computing in this very call; close it afterwards")
            self._closed = True
            self._left.wait_for(lambda: not self._inside)
            yield


def _computing(method: Callable[..., Any], *, anew: bool = True) -> Callable[..., Any]:
    """Have a method of `ServedLlama` compute in one thread at a time."""

    @functools.wraps(method)
    def alone(self: ServedLlama, *args: Any, **kwargs: Any) -> Any:
        with self._use.computing(anew=anew):
            return method(self, *args, **kwargs)

    return alone


class ServedLlama(PlainLlama):
    """`llama_cpp.Llama` whose uses are told by a `Use`: those of the context here, those of the vocabulary below."""

    _use: Use

    reset = _computing(PlainLlama.reset)
    sample = _computing(PlainLlama.sample, anew=False)
    save_state = _computing(PlainLlama.save_state, anew=False)
    load_state = _computing(PlainLlama.load_state)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens, as `llama_cpp.Llama.eval`; after a failure the context is as before the failing batch.

        Raises
        ------
        BackendError
            When they do not fit into the context, or one is not of the vocabulary.
        """
        with self._use.computing(anew=True):
            if self.n_tokens + len(tokens) > self._n_ctx:
                raise BackendError(
                    f"{len(tokens)} tokens after {self.n_tokens} are more than the context of {self._n_ctx};"
                    " give fewer, or open the model with a larger n_ctx"
                )
            self._check_tokens(tokens)
            try:
                super().eval(tokens)
            except BaseException:
                # A recurrent state cannot be cut back to an earlier token.
                if self._is_recurrent or self._is_hybrid:
                    self.reset()
                raise

    def detokenize(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> bytes:
        """Give the text of tokens, as `llama_cpp.Llama.detokenize`.

        Raises
        ------
        BackendError
            When one is not of the vocabulary.
        """
        self._check_tokens(tokens)
        text: bytes = super().detokenize(tokens, *args, **kwargs)
        return text

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        strange = next((token for token in tokens if not 0 <= token < self._n_vocab), None)
        if strange is not None:
            raise BackendError(
                f"{strange} is no token of {self.model_path}; give numbers from 0 to {self._n_vocab - 1},"
                " as `tokenize` does"
            )

    def embed(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """Embed texts, as `llama_cpp.Llama.embed`.

        Raises
        ------
        BackendError
            When one is empty.
        """
        if not input or not all(input):
            raise BackendError("there is nothing to embed in an empty text; leave it out")
        with self._use.computing(anew=True):
            return super().embed(input, *args, **kwargs)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        """Generate tokens, as `llama_cpp.Llama.generate`."""
        return self._use.answer(self._generate(tokens, *args, **kwargs))

    def _generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        yield from super().generate(tokens, *args, **kwargs)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Generator[Any, Any, None]:
        # All of a completion, probabilities that are read when its tokens are complete included.
        return self._use.answer(super()._create_completion(*args, **kwargs))

    @property
    def ctx(self) -> Any:
        """The llama_context."""
        with self._use.held():
            return self._ctx.ctx

    @property
    def model(self) -> Any:
        """The llama_model."""
        with self._use.held():
            return self._model.model


def _while_open(plain: type) -> Callable[[type], type]:
    """Have the class keep its model open in each method that it inherits from llama_cpp's."""

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def held(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self._use.held():
                return method(self, *args, **kwargs)

        return held

    def guard(served: type) -> type:
        for name, method in vars(plain).items():
            if inspect.isfunction(method) and not name.startswith("_") and name not in ("close", *vars(served)):
                setattr(served, name, guarded(method))
        return served

    return guard


class _BufferTypeOverride(ctypes.Structure):
    """llama.h: struct llama_model_tensor_buft_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@contextlib.contextmanager
def built_around(store: ExpertStore, tap: RouterTap, use: Use, n_outputs_max: int) -> Iterator[None]:
    """Let `llama_cpp.Llama.__init__`, which builds model and context in one go, build ours.

    Only in this thread: a plain Llama that another thread builds meanwhile gets the plain classes.
    """
    owner = threading.get_ident()
    plain_model, plain_context = internals.LlamaModel, internals.LlamaContext

    def model(**kwargs: Any) -> Any:
        return _Model(store=store, use=use, **kwargs) if threading.get_ident() == owner else plain_model(**kwargs)

    def context(**kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return plain_context(**kwargs)
        kwargs["params"].n_outputs_max = n_outputs_max
        return _Context(store=store, tap=tap, use=use, **kwargs)

    with _BUILDING:
        internals.LlamaModel, internals.LlamaContext = model, context
        try:
            yield
        finally:
            internals.LlamaModel, internals.LlamaContext = plain_model, plain_context


@_while_open(internals.LlamaModel)
class _Model(internals.LlamaModel):
    """A model whose every tensor is allocated by the native buffer type."""

    def __init__(self, *, store: ExpertStore, use: Use, path_model: str, params: Any, verbose: bool) -> None:
        self._use = use
        self._session = store.session  # its buffers go first, even where the model was built by half
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


@_while_open(internals.LlamaContext)
class _Context(internals.LlamaContext):
    """A context whose graph calls the native hook, and whose prompt batches can be interrupted."""

    def __init__(self, *, store: ExpertStore, tap: RouterTap, use: Use, model: Any, params: Any, verbose: bool) -> None:
        session = store.session
        params.cb_eval = C.ggml_backend_sched_eval_callback(session.eval_callback())
        params.cb_eval_user_data = session.callback_data()
        params.abort_callback = C.ggml_abort_callback(session.abort_callback())
        params.abort_callback_data = session.callback_data()
        self._store = store
        self._tap = tap
        self._use = use
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
        self._store.begin(batch.batch.pos[0], n_tokens)
        # `begin` forgets what came between two batches.
        if self._use.take_interrupt():
            raise KeyboardInterrupt
        with in_llama_cpp(self.verbose, session.interrupt) as errors:
            try:
                with _interruptible(self._store):
                    compute(batch)
            except RuntimeError as error:
                self._store.raise_failure()
                if session.interrupted():
                    self._use.take_interrupt()
                    raise KeyboardInterrupt from None
                reason = "; ".join([str(error), *errors])
                raise BackendError(
                    f"llama.cpp could not evaluate the batch: {reason}; reset the model and begin again"
                ) from error
        self._store.raise_failure()
        # Stopped after llama.cpp's last look at the flag: it reports success for a graph that was cut short.
        if session.interrupted():
            self._use.take_interrupt()
            raise KeyboardInterrupt
        self._tap.drain()


@contextlib.contextmanager
def _interruptible(store: ExpertStore) -> Iterator[None]:
    """Have SIGINT stop the C code at once; Python, which gets to know of it only afterwards, then raises as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        store.session.watch_interrupts()
        yield
    finally:
        store.session.ignore_interrupts()


@contextlib.contextmanager
def reporting(store: ExpertStore, on_progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Report the dense bytes read while llama.cpp loads; its own callback only sees tensors that it reads itself.

    Raises
    ------
    Exception
        What `on_progress` raised, which ends the loading.
    """
    if on_progress is None:
        yield
        return
    loaded = threading.Event()
    raised: list[Exception] = []

    def report() -> None:
        try:
            while not loaded.wait(0.05):
                on_progress(store.stats().dense_bytes, store.load_bytes)
        except Exception as error:
            raised.append(error)
            store.session.interrupt()

    thread = threading.Thread(target=report, name="edgemoe-progress")
    thread.start()
    try:
        yield
    finally:
        loaded.set()
        thread.join()
        if raised:
            raise raised[0]
        on_progress(store.stats().dense_bytes, store.load_bytes)
