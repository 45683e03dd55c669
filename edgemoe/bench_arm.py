"""One arm of a comparison: a process of its own that holds a model and evaluates tokens on request.

The parent's end is here, the child's in `edgemoe.bench_child`. They exchange JSON, one object per line: the child says
when its context is ready, then answers each request. All arms run the same code there apart from how a model is opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, TextIO

import numpy as np
import numpy.typing as npt

from edgemoe.errors import EdgemoeError

__all__ = [
    "ARMS",
    "EDGEMOE",
    "MMAP",
    "PLAIN",
    "USUAL_ARMS",
    "Arm",
    "ArmError",
    "Name",
    "Settings",
    "ask_plan",
    "ask_text",
]

Name = Literal["edgemoe", "llama.cpp"]
EDGEMOE: Name = "edgemoe"
PLAIN: Name = "llama.cpp"

MMAP = "mmap"
ARMS = (MMAP, "plain", "blind", "lru", "all", "auto", "task")
"""Plain llama.cpp; edgemoe as the control, without look-ahead, with the least recently used leaving, with all it has,
with a task's experts first, with these alone."""
USUAL_ARMS = tuple(arm for arm in ARMS if arm not in ("blind", "lru"))
"""Those of a bench that asks for none."""

_CHILD = [sys.executable, "-m", "edgemoe.bench_child"]
_LEAVE_SECONDS = 60


def _plain_environment() -> dict[str, str]:
    """Tell libgomp what it does by itself, lest `edgemoe.llama_library` tell it otherwise."""
    told = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    return {**os.environ} if told else {**os.environ, "GOMP_SPINCOUNT": "300000"}


class ArmError(EdgemoeError):
    """A child ended, or took too long, before it answered; the message holds the end of what it said."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How an arm opens its model.

    Attributes
    ----------
    model : str
        GGUF file.
    n_ctx, n_threads : int
        Tokens; threads.
    n_ubatch : int or None
        Physical batch; None, when a plan is asked for, leaves it to the plan.
    ram : int or None
        Budget of edgemoe, bytes.
    io : str
        How edgemoe reads experts.
    tuning : str
        What edgemoe does: ``all`` it has, ``plain``, the control (least recently used, no overlap, no look-ahead),
        ``blind``, all but look-ahead, or ``lru``, all but that the least recently used leaves.
    load_mode : str
        How plain llama.cpp loads: ``MMAP``, ``NONE`` or ``DIRECT_IO`` of its enum llama_load_mode.
    n_batch, n_threads_batch : int or None
        Logical batch, n_ubatch by default; threads for a prompt, n_threads by default.
    n_expert_used : int or None
        Experts per token, instead of the model's own number.
    forced_bytes : int
        Memory that the routes take which will be forced, bytes; 0 for natural routing.
    """

    model: str
    n_ctx: int
    n_ubatch: int | None
    n_threads: int
    ram: int | None = None
    io: str = "auto"
    tuning: str = "all"
    load_mode: str = "MMAP"
    n_batch: int | None = None
    n_threads_batch: int | None = None
    n_expert_used: int | None = None
    forced_bytes: int = 0

    def within(self, ram: int) -> Settings:
        """Give the same with that budget, bytes."""
        return replace(self, ram=ram)


@dataclass(slots=True)
class Arm:
    """The parent's end.

    Attributes
    ----------
    name : str
        Whether edgemoe or plain llama.cpp holds the model.
    settings : Settings
        How it is opened.
    wrap : callable
        Makes the child's command line another one, which runs it in a cgroup.
    patience : float or None
        Seconds that one answer may take.
    ready : dict
        The child's first answer and ``load_s``, the wall time since the process began.

    Raises
    ------
    ArmError
        When the child cannot open the model.
    """

    name: Name
    settings: Settings
    wrap: Callable[[Sequence[str]], list[str]] = list
    patience: float | None = None
    ready: dict[str, Any] = field(init=False)
    _process: subprocess.Popen[str] = field(init=False)
    _errors: TextIO = field(init=False)

    def __post_init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        started = time.perf_counter()
        self._process = subprocess.Popen(
            self.wrap([*_CHILD, self.name, json.dumps(asdict(self.settings))]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_plain_environment() if self.name == PLAIN else None,
        )
        try:
            self.ready = self._answer()
        except BaseException:
            self._process.kill()
            self.close()
            raise
        self.ready["load_s"] = time.perf_counter() - started

    def prompt(self, n_tokens: int, seed: int = 0) -> dict[str, Any]:
        """Forget all tokens and evaluate `n_tokens` random ones."""
        return self.prompt_of(np.random.default_rng(seed).integers(0, self.ready["n_vocab"], n_tokens).tolist())

    def prompt_of(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Forget all tokens and evaluate these."""
        return self.ask(do="prompt", tokens=list(tokens))

    def decode(self, n_tokens: int) -> dict[str, Any]:
        """Decode `n_tokens` greedily from where the context is; end-of-text tokens do not end it."""
        return self.ask(do="decode", n_tokens=n_tokens)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request to `edgemoe.bench_child`; gives its answer.

        Raises
        ------
        ArmError
            When the child ends or takes too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading the answer tells why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self.patience)[0]:
            self._process.kill()
            raise ArmError(f"{self.name} gave no answer for {self.patience:.0f} s and was ended; give it more --ram")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last_words = self._errors.read().strip().splitlines()[-3:]
            raise ArmError(f"{self.name} ended with status {status}: {' / '.join(last_words) or 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the child and wait for it."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it is dead, and never read the last request
                self._process.stdin.close()
        try:
            self._process.wait(timeout=_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Arm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()  # it may be in the middle of a batch that takes minutes
        self.close()


def ask_plan(settings: Settings) -> dict[str, int]:
    """Ask a process of its own, as a plan counts what the process holds: bytes and tokens.

    Returns
    -------
    dict
        ``floor``, the smallest budget for these settings; ``everything``, the one that holds all experts; and of the
        budget ``ram`` (or everything): ``arena``, bytes for experts, and ``n_ubatch``.

    Raises
    ------
    ArmError
        When there is no plan: the reason as edgemoe words it.
    """
    plan: dict[str, int] = _ask_once("plan", settings)
    return plan


def ask_text(settings: Settings, n_tokens: int) -> tuple[list[int], npt.NDArray[np.int32] | None]:
    """Ask a process of its own for text in the model's tokens and for its natural routes.

    Returns
    -------
    tokens : list of int
    ids : int32 [n_tokens, layers, k] or None
        The experts that they are routed to, None where the architecture does not show them.

    Raises
    ------
    ArmError
        When the model cannot be opened.
    """
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        answer = _ask_once("text", settings, str(n_tokens), file.name)
        return answer["tokens"], np.load(file.name) if answer["routed"] else None


def _ask_once(what: str, settings: Settings, *more: str) -> Any:
    command = [*_CHILD, what, json.dumps(asdict(settings)), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ArmError((done.stderr.strip().splitlines() or [f"{what}: the process said nothing; run it again"])[-1])
    return json.loads(done.stdout)
