"""The child's end of an arm: opens a model with edgemoe or plain llama.cpp, then serves requests.

Run by `edgemoe.bench_arm` as ``python -m edgemoe.bench_child edgemoe|llama.cpp|plan SETTINGS``, or as
``... text SETTINGS N_TOKENS FILE``; the last two answer once and end.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.bench_arm import EDGEMOE, PLAIN, Settings
from edgemoe.errors import EdgemoeError, StoreError, TraceError
from edgemoe.llama_library import C, PlainLlama, internals
from edgemoe.memory import current_rss, peak_rss

# The rest of edgemoe is imported where it is used: loading plain llama.cpp should not take longer for it.
if TYPE_CHECKING:
    from edgemoe.backend import Llama
    from edgemoe.plan import ExpertPlan, PlanLine
    from edgemoe.routes import Ids
    from edgemoe.store import RouteForcer
    from edgemoe.trace import RouterTrace

__all__ = ["Evaluator", "open_edgemoe", "open_plain"]

_HUGE = 1 << 50
_BYTES_PER_TOKEN = 16
"""More text than any vocabulary puts into a token on average."""


def open_edgemoe(settings: Settings, **changes: Any) -> Llama:
    """Open a model with edgemoe, as the settings say."""
    from edgemoe.backend import Llama
    from edgemoe.store import Tuning

    tunings = {
        "all": Tuning(),
        "plain": Tuning.plain(),
        "blind": Tuning(look_ahead=False),
        "lru": Tuning(forecast=False),
    }
    changes["tuning"] = tunings[settings.tuning]
    changes["reserved"] = _reserved(settings)
    ram = "auto" if settings.ram is None else settings.ram
    return Llama(settings.model, ram=ram, io=settings.io, **_shared(settings), **changes)


def _reserved(settings: Settings) -> list[PlanLine]:
    from edgemoe.plan import PlanLine

    if not settings.forced_bytes:
        return []
    return [PlanLine("forced routes", settings.forced_bytes, "where tokens are routed to")]


def open_plain(settings: Settings, forcer: RouteForcer | None = None) -> Any:
    """Open a model with plain llama.cpp, as the settings say; with a forcer, its graph's routes can be forced."""
    plain_model, plain_context = internals.LlamaModel, internals.LlamaContext

    # llama_cpp.Llama has arguments for none of this. Repacked weights are a second copy of the model, and another
    # order of additions: neither the memory nor the logits would be comparable.
    def model(**kwargs: Any) -> Any:
        kwargs["params"].load_mode = getattr(C, f"LLAMA_LOAD_MODE_{settings.load_mode}")
        kwargs["params"].use_extra_bufts = False
        return plain_model(**kwargs)

    def context(**kwargs: Any) -> Any:
        if forcer is not None:
            kwargs["params"].cb_eval = C.ggml_backend_sched_eval_callback(forcer.eval_callback())
            kwargs["params"].cb_eval_user_data = forcer.callback_data()
        return plain_context(**kwargs)

    internals.LlamaModel, internals.LlamaContext = model, context
    try:
        return PlainLlama(settings.model, verbose=False, **_shared(settings))
    finally:
        internals.LlamaModel, internals.LlamaContext = plain_model, plain_context


def _shared(settings: Settings) -> dict[str, Any]:
    """Give what both arms pass to their `Llama`."""
    return {
        "n_ctx": settings.n_ctx,
        "n_batch": max(settings.n_batch or 0, settings.n_ubatch or 0),
        "n_ubatch": settings.n_ubatch,
        "n_threads": settings.n_threads,
        "n_threads_batch": settings.n_threads_batch or settings.n_threads,
        "kv_overrides": _top_k(settings),
    }


def _top_k(settings: Settings) -> dict[str, int] | None:
    if settings.n_expert_used is None:
        return None
    from edgemoe.index import read_index

    return {f"{read_index(settings.model).architecture}.expert_used_count": settings.n_expert_used}


class Evaluator:
    """Evaluates tokens on an open model and times it.

    Parameters
    ----------
    llama : Llama
        Of edgemoe or plain.
    forcer : RouteForcer or None
        Of a plain one whose routes are to be forced.
    """

    def __init__(self, llama: Any, forcer: RouteForcer | None = None) -> None:
        self._llama = llama
        self._forcer = forcer
        self._store = getattr(llama, "store", None)

    def state(self) -> dict[str, Any]:
        """Counters since the process began: seconds, bytes, slabs."""
        state: dict[str, Any] = {"rss": current_rss(), "peak_rss": peak_rss(), "disk_bytes": _disk_bytes()}
        state |= {"system_s": os.times().system, "stolen_s": _stolen_s()}
        if self._store is not None:
            stats = self._store.stats()
            state |= {
                "hits": stats.hits,
                "misses": stats.misses,
                "bytes_read": stats.bytes_read,
                "read_s": stats.read_seconds,
                "busy_s": stats.busy_seconds,
                "arena_peak": stats.peak_bytes,
                "prefetched_bytes": stats.prefetched_bytes,
                "wasted_bytes": stats.wasted_bytes,
                "retries": stats.retries,
            }
        return state

    def prompt(self, tokens: list[int]) -> dict[str, Any]:
        """Forget all tokens and evaluate these, at least one."""
        self._llama.reset()
        return {"seconds": self._eval(tokens), **self.state()}

    def decode(
        self, n_tokens: int, tokens: Sequence[int] | None = None, limit_s: float | None = None, least: int = 0
    ) -> dict[str, Any]:
        """Evaluate tokens one by one: those given, else greedily chosen ones.

        After `limit_s` seconds no more than `least` tokens are evaluated. Only `eval` is timed. ``checksums`` holds
        one running CRC-32 for each token, over the logits that came before it.
        """
        seconds: list[float] = []
        checksums, checksum = [], 0
        began = time.perf_counter()
        for number in range(n_tokens):
            if limit_s is not None and number >= least and time.perf_counter() - began > limit_s:
                break
            logits = np.ctypeslib.as_array(C.llama_get_logits_ith(self._llama.ctx, -1), shape=(self._llama.n_vocab(),))
            checksum = zlib.crc32(logits.data, checksum)
            checksums.append(checksum)
            token = int(logits.argmax()) if tokens is None else tokens[number]
            seconds.append(self._eval([token]))
        return {"seconds": seconds, "logits_crc32": checksum, "checksums": checksums, **self.state()}

    def _eval(self, tokens: list[int]) -> float:
        started = time.perf_counter()
        self._llama.eval(tokens)
        seconds = time.perf_counter() - started
        if self._forcer is not None and (failure := self._forcer.failure()):
            raise StoreError(failure)
        return seconds

    def force(self, path: str) -> dict[str, Any]:
        """Route as an .npz file says from the next token on.

        It holds ``layers`` int32 [L], ``ids`` int32 [n_tokens, L, k], and maybe ``predicted``, the same for look-ahead,
        one layer ahead, then two.
        """
        with np.load(path) as file:
            layers, ids = file["layers"].tolist(), file["ids"]
            if self._forcer is not None:
                self._forcer.force(layers, ids)
                return {}
            assert self._store is not None
            self._store.session.force_routes(layers, ids)
            if "predicted" in file:
                self._store.session.force_predictions(file["predicted"])
        return {}

    def hold(self, layers: list[int], kept: list[list[int]], only: bool) -> dict[str, Any]:
        """Have experts of each layer in memory now, and count them as likelier, or route within them only."""
        from edgemoe.expert_set import ExpertSet

        residency, index = self._llama.residency, self._llama.index
        chosen = ExpertSet(tuple(layers), index.n_expert, max(index.n_expert_used), tuple(map(tuple, kept)))
        return {"seconds": (residency.restrict if only else residency.prefer)(chosen).seconds}


def _disk_bytes() -> int | None:
    """Bytes that the system fetched from disks for this process, page faults included; None where it keeps no count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def _stolen_s() -> float | None:
    """Processor seconds that a virtual machine wanted and did not get; None where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else None


def _forcer() -> RouteForcer:
    from edgemoe.store import RouteForcer

    return RouteForcer()


def _plan(settings: Settings) -> dict[str, int]:
    from edgemoe.dry_run import plan_for
    from edgemoe.index import read_index
    from edgemoe.plan import headroom_of

    index = read_index(settings.model)
    if settings.n_expert_used is not None:
        index = index.using(settings.n_expert_used)

    def plan_within(ram: int) -> ExpertPlan:
        return plan_for(index, ram, settings.n_ctx, settings.n_ubatch, {}, _reserved(settings))

    huge = plan_within(_HUGE)
    planned = huge.budget.bytes - huge.bytes_of("headroom") - huge.bytes_of("left free")
    everything = planned + headroom_of(2 * planned)
    plan = plan_within(everything if settings.ram is None else settings.ram)
    return {
        "floor": plan.floor_budget,
        "everything": everything,
        "arena": plan.arena_bytes + plan.spared_bytes + plan.lent_bytes,  # while tokens are decoded
        "n_ubatch": plan.n_ubatch,
    }


def _text(settings: Settings, n_tokens: int, path: Path) -> dict[str, Any]:
    """Give tokens of this package's own source, which is text that is always there; their routes go to a file."""
    routed: list[Ids] = []

    def keep(trace: RouterTrace) -> None:
        assert trace.outputs is not None
        routed.append(trace.outputs.ids.transpose(1, 0, 2))

    with open_edgemoe(settings, logits_all=True) as llama:
        text = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
        tokens = llama.tokenize(text[: _BYTES_PER_TOKEN * n_tokens])
        tokens = (tokens * -(-n_tokens // len(tokens)))[:n_tokens]
        try:
            with llama.tap.watch(keep, outputs=True):
                llama.eval(tokens)
        except TraceError:
            return {"tokens": tokens, "routed": False}
    np.save(path, np.concatenate(routed).astype(np.int32))
    return {"tokens": tokens, "routed": True}


def main() -> None:
    """Serve one model until standard input ends."""
    # Replies go to what was standard output; whatever a library prints must not come between.
    replies, sys.stdout = sys.stdout, sys.stderr

    def reply(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=replies, flush=True)

    what, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    if what == "plan":
        reply(_plan(settings))
        return
    if what == "text":
        reply(_text(settings, int(sys.argv[3]), Path(sys.argv[4])))
        return
    forcer = _forcer() if what == PLAIN and settings.forced_bytes else None
    started = time.perf_counter()
    llama = open_plain(settings, forcer) if what == PLAIN else open_edgemoe(settings)
    opened = time.perf_counter() - started
    evaluator = Evaluator(llama, forcer)
    ready: dict[str, Any] = {
        "open_s": opened,
        "n_ctx": llama.n_ctx(),
        "n_vocab": llama.n_vocab(),
        **evaluator.state(),
    }
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
        reply(getattr(evaluator, request.pop("do"))(**request))
    llama.close()


if __name__ == "__main__":
    try:
        main()
    except EdgemoeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
