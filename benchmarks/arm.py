"""One arm of a comparison: a process of its own that holds a model and decodes on request.

The parent (`Arm`) and the child (`main`) exchange JSON, one object per line: the child says when its context is ready,
then answers each request. Both arms run the same code here apart from how the model is opened.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

Name = Literal["edgemoe", "llama.cpp"]
EDGEMOE: Name = "edgemoe"
PLAIN: Name = "llama.cpp"

REPOSITORY = Path(__file__).resolve().parent.parent


class ArmError(Exception):
    """The child ended before it answered; the message holds the end of what it wrote to standard error."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What both arms have in common; `ram`, bytes, and `io` are for edgemoe alone."""

    model: str
    n_ctx: int
    n_ubatch: int
    n_threads: int
    ram: int | None = None
    io: str = "auto"

    def within(self, ram: int) -> Settings:
        """The same with that budget, bytes."""
        return replace(self, ram=ram)


@dataclass(slots=True)
class Arm:
    """The parent's end. `ready` holds the child's first answer and `load_s`, the wall time since the process began."""

    name: Name
    settings: Settings
    wrap: Callable[[Sequence[str]], list[str]] = list
    ready: dict[str, Any] = field(init=False)
    _process: subprocess.Popen[str] = field(init=False)
    _errors: TextIO = field(init=False)

    def __post_init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.arm", self.name, json.dumps(asdict(self.settings))]
        started = time.perf_counter()
        self._process = subprocess.Popen(
            self.wrap(command),
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.ready["load_s"] = time.perf_counter() - started

    def prompt(self, n_tokens: int, seed: int = 0) -> dict[str, Any]:
        """Forget all tokens and evaluate `n_tokens` random ones."""
        return self._ask(do="prompt", n_tokens=n_tokens, seed=seed)

    def decode(self, n_tokens: int) -> dict[str, Any]:
        """Decode `n_tokens` greedily from where the context is; end-of-text tokens do not end it."""
        return self._ask(do="decode", n_tokens=n_tokens)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading the answer tells why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
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
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
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
        self.close()


def ask_plan(settings: Settings) -> dict[str, int]:
    """The smallest budget for these settings and the one that holds all experts, bytes."""
    command = [sys.executable, "-m", "benchmarks.arm", "plan", json.dumps(asdict(settings))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise ArmError(f"no plan could be made: {done.stderr.strip().splitlines()[-1]}")
    plan: dict[str, int] = json.loads(done.stdout)
    return plan


# ---------------------------------------------------------------- child


def open_edgemoe(settings: Settings, **changes: Any) -> Any:
    """Open a model with edgemoe, as the settings say."""
    from edgemoe.backend import Llama

    assert settings.ram is not None
    return Llama(
        settings.model,
        ram=settings.ram,
        io=settings.io,
        n_ctx=settings.n_ctx,
        n_batch=settings.n_ubatch,
        n_ubatch=settings.n_ubatch,
        n_threads=settings.n_threads,
        n_threads_batch=settings.n_threads,
        **changes,
    )


def open_plain(settings: Settings) -> Any:
    """Open a model with plain llama.cpp, as the settings say."""
    import llama_cpp
    from llama_cpp import llama_cpp as C  # noqa: N812

    # llama_cpp.Llama has no argument for it. Repacked weights are a second copy of the model, and another
    # order of additions: neither the memory nor the logits would be comparable.
    defaults = C.llama_model_default_params

    def without_repacking() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    C.llama_model_default_params = without_repacking
    return llama_cpp.Llama(
        settings.model,
        use_mmap=True,
        n_ctx=settings.n_ctx,
        n_batch=settings.n_ubatch,
        n_ubatch=settings.n_ubatch,
        n_threads=settings.n_threads,
        n_threads_batch=settings.n_threads,
        verbose=False,
    )


class _Decoder:
    def __init__(self, llama: Any) -> None:
        import numpy as np
        from llama_cpp import llama_cpp as C  # noqa: N812

        self._np, self._c = np, C
        self._llama = llama
        self._store = getattr(llama, "store", None)

    def state(self) -> dict[str, Any]:
        from edgemoe.memory import current_rss, peak_rss

        state: dict[str, Any] = {"rss": current_rss(), "peak_rss": peak_rss()}
        if self._store is not None:
            stats = self._store.stats()
            state |= {
                "hits": stats.hits,
                "misses": stats.misses,
                "bytes_read": stats.bytes_read,
                "read_s": stats.read_seconds,
                "arena_peak": stats.peak_bytes,
            }
        return state

    def prompt(self, n_tokens: int, seed: int) -> dict[str, Any]:
        tokens = self._np.random.default_rng(seed).integers(0, self._llama.n_vocab(), n_tokens).tolist()
        self._llama.reset()
        started = time.perf_counter()
        self._llama.eval(tokens)
        return {"seconds": time.perf_counter() - started, **self.state()}

    def decode(self, n_tokens: int) -> dict[str, Any]:
        import zlib

        seconds, checksum = [], 0
        for _ in range(n_tokens):
            logits = self._np.ctypeslib.as_array(
                self._c.llama_get_logits_ith(self._llama.ctx, -1), shape=(self._llama.n_vocab(),)
            )
            checksum = zlib.crc32(logits, checksum)
            token = int(logits.argmax())
            started = time.perf_counter()
            self._llama.eval([token])
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds, "logits_crc32": checksum, **self.state()}


def _budgets(settings: Settings) -> dict[str, int]:
    from edgemoe.backend import plan_model
    from edgemoe.plan import headroom_of

    plan = plan_model(settings.model, 1 << 50, settings.n_ctx, settings.n_ubatch)
    planned = plan.budget.bytes - plan.bytes_of("headroom") - plan.bytes_of("left free")
    return {"floor": plan.floor_budget, "everything": planned + headroom_of(2 * planned)}


def main() -> None:
    """Serve one model until standard input ends."""
    # Replies go to what was standard output; whatever a library prints must not come between.
    replies, sys.stdout = sys.stdout, sys.stderr

    def reply(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=replies, flush=True)

    what, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    if what == "plan":
        reply(_budgets(settings))
        return
    started = time.perf_counter()
    llama = open_edgemoe(settings) if what == EDGEMOE else open_plain(settings)
    opened = time.perf_counter() - started
    decoder = _Decoder(llama)
    ready: dict[str, Any] = {"open_s": opened, "n_ctx": llama.n_ctx(), **decoder.state()}
    if what == EDGEMOE:
        ready |= {
            "n_ubatch": llama.plan.n_ubatch,
            "prompt_mode": llama.plan.prompt_mode,
            "io": llama.store.io,
            "resident_share": llama.plan.resident_share,
            "plan": {line.name: line.bytes for line in llama.plan.lines},
        }
    reply(ready)
    for line in sys.stdin:
        request = json.loads(line)
        do = {"prompt": decoder.prompt, "decode": decoder.decode}[request.pop("do")]
        reply(do(**request))
    llama.close()


if __name__ == "__main__":
    main()
