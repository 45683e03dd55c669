"""A drop-in `Llama` whose experts live in an `ExpertStore`.

llama.cpp is stock. Its loader puts every tensor into the native buffer type (`tensor_buft_overrides`), its graph calls
the native hook (`cb_eval`), and its own dry run (`no_alloc`) tells the plan what caches and compute buffers will take.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

import jinja2

from edgemoe.conditions import Conditions
from edgemoe.dry_run import check_options, n_outputs_max, plan_for, plan_model, refused
from edgemoe.errors import BackendError
from edgemoe.index import read_index
from edgemoe.llama_library import C, PlainLlama, in_llama_cpp
from edgemoe.memory import machine
from edgemoe.plan import DEFAULT_UBATCH, ExpertPlan, PlanLine
from edgemoe.residency import Residency
from edgemoe.routed_shares import RoutedShares, place_of
from edgemoe.router_tap import RouterTap, trace_memory
from edgemoe.served_model import ServedLlama, Use, built_around, reporting
from edgemoe.store import ExpertStore, Tuning, forget_libraries, return_freed_memory
from edgemoe.threads import default_threads

if TYPE_CHECKING:
    from edgemoe.matcher import Match
    from edgemoe.task_mode import TaskMode

__all__ = ["MOST_SKIPPED", "Llama", "plan_model"]

MOST_SKIPPED = 0.5
"""Of a token's router weights in a layer: the heaviest expert is always kept."""


class Llama(ServedLlama):
    """`llama_cpp.Llama` within a RAM budget: same methods, same answers, experts served from disk.

    One thread at a time computes: until its answer has ended or its stream was closed, others get a BackendError, from
    all but the vocabulary (`tokenize` and the like). `close` waits for what other threads are in the middle of.

    Parameters
    ----------
    model_path : str
        GGUF file of a Mixture-of-Experts model, the first part of a split one.
    ram : str or int
        Budget for the whole process: bytes, ``"6GiB"``, ``"50%"`` or ``"auto"``.
    io : str
        ``auto``, ``direct``, ``mmap`` or ``pread``.
    experts : str
        ``all``; ``task``: route within the set of the task that a prompt is matched to; ``auto``: every expert, with
        the task's in memory first. See `edgemoe.task_mode`.
    keep : str, optional
        With ``task``, ``k/M`` or ``M``: experts active per token, of M kept per layer on average. By default what the
        budget holds.
    task : str, optional
        The task to use, whatever the prompts are about.
    tasks : path-like, optional
        Folder of the model's patterns, instead of the user's own.
    n_ctx : int, optional
        Context in tokens. None takes what fits the budget, 0 the model's own.
    n_batch, n_ubatch : int, optional
        Logical and physical batch, 512 unless the experts of such a batch do not fit.
    n_threads, n_threads_batch : int, optional
        Threads that compute a token, and a prompt batch: by default one for each physical core that may be used.
    skip_mass : float
        While an answer is decoded, leave out experts that would have to be read, the lightest first, up to this share
        of a token's router weights in each layer: 0 (exact) to 0.5. The same prompt and settings give the same answer.
    reserved : sequence of PlanLine
        Memory that the caller itself will hold: the plan leaves it free.
    tuning : Tuning, optional
        For measuring: what of the store's work beyond reading on demand is on, by default all of it.
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
    conditions : Conditions
        What slows answers down besides the disk.
    tap : RouterTap
        Watches what the routers say.
    residency : Residency
        Limits or prefers experts.
    task_mode : TaskMode or None
        Tasks, unless ``experts`` is ``all``.

    Raises
    ------
    EdgemoeError
        ModelFileError, BudgetError, StoreError or BackendError; while generating, StoreError; BackendError from every
        call after `close`, or while another thread has the context.
    """

    def __init__(
        self,
        model_path: str,
        *,
        ram: str | int = "auto",
        io: str = "auto",
        experts: str = "all",
        keep: str | None = None,
        task: str | None = None,
        tasks: str | os.PathLike[str] | None = None,
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        skip_mass: float = 0.0,
        reserved: Sequence[PlanLine] = (),
        tuning: Tuning | None = None,
        on_plan: Callable[[ExpertPlan], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self._use = Use()
        self._stack = contextlib.ExitStack()
        self._said = ""
        self._skip_mass = 0.0
        self._given = {
            "ram": ram,
            "io": io,
            "experts": experts,
            "keep": keep,
            "task": task,
            "tasks": tasks,
            "reserved": reserved,
            "tuning": tuning,
        }
        threads = {"n_threads": n_threads, "n_threads_batch": n_threads_batch}
        check_options({"n_ctx": n_ctx, "n_batch": n_batch, "n_ubatch": n_ubatch, **threads, **kwargs}, Llama)
        if tuning is not None and not isinstance(tuning, Tuning):
            raise BackendError(f"tuning={tuning!r} is no edgemoe.store.Tuning; leave it out, or give one")
        for name in ("n_gpu_layers", "use_mlock", "vocab_only"):
            if kwargs.get(name):
                raise BackendError(
                    f"{name}={kwargs[name]} contradicts a RAM budget; leave it out, or use llama_cpp.Llama"
                )
        _check_skip_mass(skip_mass)
        if skip_mass and experts == "task":
            raise BackendError(
                f"a skip mass of {skip_mass} leaves out experts that would have to be read, but those of a task alone"
                " are all in memory; leave one of the two out"
            )
        self.ram = ram
        self.index = read_index(Path(model_path))
        self.task_mode: TaskMode | None = None
        if (experts, keep, task) != ("all", None, None):
            # Before the plan, which counts what this process holds.
            from edgemoe.task_mode import open_tasks

            self.task_mode = open_tasks(self.index, experts, keep, task, tasks)
            assert self.task_mode is not None
            reserved = (*reserved, trace_memory(self.index, n_batch))
            if self.task_mode.k is not None:
                override = {f"{self.index.architecture}.expert_used_count": self.task_mode.k}
                kwargs["kv_overrides"] = {**(kwargs.get("kv_overrides") or {}), **override}
        # A common override: more or fewer experts for each token than the file says.
        top_k = (kwargs.get("kv_overrides") or {}).get(f"{self.index.architecture}.expert_used_count")
        if top_k is not None:
            self.index = self.index.using(int(top_k))
        if n_ctx == 0:
            n_ctx = self.index.context_length
        # An n_ubatch that nobody asked for is the plan's to choose, within n_batch.
        if n_ubatch is not None or n_batch < DEFAULT_UBATCH:
            n_ubatch = min(n_ubatch or n_batch, n_batch)

        def plan_within(budget: str | int) -> ExpertPlan:
            return plan_for(self.index, budget, n_ctx, n_ubatch, {**threads, **kwargs}, reserved)

        self.plan = plan_within(ram)
        if on_plan is not None:
            on_plan(self.plan)
        if self.task_mode is not None:
            self.task_mode.settle(self.plan, plan_within)
        # The dry run is freed by now; the load needs the same memory again.
        return_freed_memory()
        if machine().cgroup_limit is not None:
            forget_libraries()
        self.store = ExpertStore(self.index, self.plan.arena_bytes, io, tuning, self.plan.rows_bytes)
        self.conditions = Conditions(faults_tell=self.store.io != "mmap")
        self.tap = RouterTap(self.store, self.index)
        self.residency = Residency(self.store, self.index)
        kwargs.setdefault("verbose", False)
        # Both are settled: weights go to the expert buffer, and the prompt batch is what the plan counted with.
        kwargs.pop("use_mmap", None)
        try:
            interrupt = self.store.session.interrupt
            with in_llama_cpp(kwargs["verbose"], interrupt) as errors, reporting(self.store, on_progress):
                try:
                    with built_around(self.store, self.tap, self._use, n_outputs_max(kwargs)):
                        super().__init__(
                            str(model_path),
                            use_mmap=False,
                            n_ctx=self.plan.n_ctx,
                            n_batch=n_batch,
                            n_ubatch=self.plan.n_ubatch,
                            n_threads=n_threads or default_threads(),
                            n_threads_batch=n_threads_batch or default_threads(),
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
            # A task's experts fit the arena, whose slots may be divided otherwise among layers of several sizes.
            if experts != "task":
                self.store.use_slots(self.plan.spared_bytes, self.plan.lent_bytes)
            if skip_mass:
                self.skip_mass = skip_mass
            if self.task_mode is not None:
                self.task_mode.attach(self.residency)
                if task is not None:
                    self.task_mode.pin(task)
        except BaseException:
            self.close()
            raise

    def create_chat_completion(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Answer a conversation, as `llama_cpp.Llama.create_chat_completion`."""
        # The template's own words are the same whatever the topic: the task is told by what was said.
        said = messages[-1].get("content") if messages else None
        self._said = said if isinstance(said, str) else ""
        return PlainLlama.create_chat_completion(self, messages, *args, **kwargs)

    @property
    def skip_mass(self) -> float:
        """Largest share of a token's router weights that is left out in a layer; a conversation starts when it is set.

        Raises
        ------
        BackendError
            When it is set to something else than 0 to 0.5.
        """
        return self._skip_mass

    @skip_mass.setter
    def skip_mass(self, mass: float) -> None:
        _check_skip_mass(mass)
        with self._use.computing(anew=True):
            self._skip_mass = mass
            self.store.skip(mass, self.plan.nominal_arena_bytes)
            self.reset()

    def reusable(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's first tokens `generate` need not evaluate again.

        What is skipped depends on all that a conversation has routed. So that a prompt has one answer, it goes on from
        what was computed only if it contains all of that.
        """
        known: int = self.longest_token_prefix(self.input_ids[: self.n_tokens].tolist(), list(prompt[:-1]))
        return 0 if self.skip_mass and known < self.n_tokens else known

    def _generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        """Generate tokens after the prompt has been matched to a task."""
        if self.skip_mass and kwargs.get("reset", True) and not self.reusable(tokens):
            self.reset()
        if self.task_mode is not None and not self.task_mode.pinned and kwargs.get("reset", True):
            self._match(self.task_mode, list(tokens), self._said)
        self._said = ""
        yield from super()._generate(tokens, *args, **kwargs)

    def match(self, tokens: Sequence[int], said: str = "", *, first: bool = False) -> Match:
        """Say which task a text belongs to; the context is empty afterwards.

        Parameters
        ----------
        tokens : sequence of int
            The text; what the context cannot hold is left out.
        said : str
            The part of it that counts: what was said, without the words of a chat template. All by default.
        first : bool
            Hear the first router alone, which needs no expert.

        Raises
        ------
        BackendError
            When the model was opened with ``experts="all"``.
        """
        if self.task_mode is None:
            raise BackendError('the model knows no tasks; open it with experts="auto" or "task"')
        layers = () if first else self.index.running_layers
        layers = layers or self.index.moe_layers[:1]
        with self._use.computing(anew=True):
            heard = self._hear(self.task_mode, tokens[: self._n_ctx], 0, layers, said, cut=True)
            self._rewind(0)
        return self.task_mode.match_of(heard)

    def _match(self, mode: TaskMode, tokens: list[int], said: str) -> None:
        """Match a prompt's new tokens; another task than before comes into force before the answer begins.

        The first router alone is asked, before any expert is read: it goes by words, whatever was spoken of before. A
        conversation's first prompt is then evaluated, and all routers, which are surer where there is no before, may
        correct the choice. A recurrent state cannot go back from a later prompt: there the answer alone is the task's.
        """
        start = self.longest_token_prefix(self.input_ids[: self.n_tokens].tolist(), tokens)
        if start == len(tokens) == self.n_tokens or len(tokens) > self._n_ctx:
            return
        # The last token is evaluated again where all of them are there already. A recurrent state cannot be cut.
        start = min(start, len(tokens) - 1)
        cuttable = not (self._is_recurrent or self._is_hybrid)
        if start < self.n_tokens and not cuttable:
            start = 0
        go_back = cuttable or start == 0
        mode.consider(self._hear(mode, tokens, start, self.index.moe_layers[:1], said, cut=go_back))
        if go_back:
            self._rewind(start)
        if start > 0 or not self.index.running_layers:
            return
        heard = self._hear(mode, tokens, start, self.index.running_layers, said)
        if mode.consider(heard) and mode.mode == "task":
            # What was computed belongs to other experts.
            self._rewind(start)

    def _hear(
        self,
        mode: TaskMode,
        tokens: Sequence[int],
        start: int,
        layers: Sequence[int],
        said: str = "",
        *,
        cut: bool = False,
    ) -> RoutedShares:
        """Evaluate the tokens from `start` on, counting where these layers route those of what was said, or all."""
        asked = self.tokenize(said.encode("utf-8"), add_bos=False, special=True) if said else []
        heard = RoutedShares(layers, self.index.n_expert, mode.k_a, place_of(asked, tokens[start:]))
        self._rewind(start)
        with self.tap.watch(heard.add, layers, cut=cut):
            self.eval(tokens[start:])
        return heard

    def _rewind(self, n_tokens: int) -> None:
        """Forget the tokens from there on; `eval` cuts the KV cache, `reset` a recurrent state."""
        if n_tokens == 0:
            self.reset()
        self.n_tokens = n_tokens
        self._requires_eval = True

    def ends_with(self, token: int) -> bool:
        """Whether the model means to say no more: its end of text, of a turn, or of a message."""
        with self._use.held():
            return bool(C.llama_vocab_is_eog(self._model.vocab, token))

    def n_ctx(self) -> int:
        """Context in tokens, as planned; llama.cpp itself rounds it up."""
        return self.plan.n_ctx

    def interrupt(self) -> None:
        """Stop the evaluation or the answer under way, from any thread; KeyboardInterrupt comes up where it runs."""
        with self._use.held():
            self._use.interrupt()
            self.store.session.interrupt()

    def close(self) -> None:
        """Free the model, then the store, when other threads are done with what they are in. May be called twice.

        Raises
        ------
        BackendError
            In a callback from the model's own computation.
        """
        if "_use" not in vars(self) or self._use.forked:
            return  # never opened, or not here
        with self._use.closing():
            self._stack.close()
            if "store" in vars(self):
                self.store.close()

    def __enter__(self) -> Llama:
        with self._use.held():
            return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        del state["use_mmap"], state["use_mlock"], state["vocab_only"]
        return state | self._given | {"skip_mass": self._skip_mass}


def _check_skip_mass(mass: object) -> None:
    if not (isinstance(mass, SupportsFloat) and 0 <= float(mass) <= MOST_SKIPPED):
        raise BackendError(
            f"a skip mass of {mass!r} is no share of the router's weights that can be left out;"
            f" give 0 to {MOST_SKIPPED}"
        )
