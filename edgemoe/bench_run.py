"""One cold start of one arm: in a memory cgroup, the prompt, then token after token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgemoe.bench_arm import EDGEMOE, MMAP, PLAIN, Arm, ArmError, Settings
from edgemoe.bench_machine import make_cold
from edgemoe.bench_memory import HeldMemory
from edgemoe.bench_pattern import best_experts, prompt_counts, within
from edgemoe.expert_set import ExpertLayers
from edgemoe.index import ExpertIndex
from edgemoe.memory import machine
from edgemoe.memory_cgroup import CgroupUnavailableError, MemoryCgroup, drop_page_cache, memory_cgroup
from edgemoe.plan import expert_pages
from edgemoe.routes import Ids, Routes
from edgemoe.task_mode import WARM_SHARE

__all__ = ["Cell", "Run", "Workload", "resident_run", "run_arm"]

_N = TypeVar("_N", int, float)

PATIENCE = 1800.0
"""Seconds after which an answer is not waited for."""

DECODE_LIMIT = 120.0
DECODE_LEAST = 16
"""An arm that is slower than the limit, in seconds, stops decoding once it has so many tokens."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What every arm evaluates.

    Attributes
    ----------
    prompt, decode : list of int
        Tokens: evaluated as one batch; then one by one, whatever the model would say.
    routes : Routes or None
        Where they are routed to, if it is known.
    forced : bool
        Whether they are routed there by force.
    predicted : int32 array or None
        What look-ahead is told instead of asking the next routers, shape as the ids of prompt and decode together, one
        layer ahead and two.
    """

    prompt: list[int]
    decode: list[int]
    routes: Routes | None
    forced: bool
    predicted: Ids | None = None

    @property
    def forced_bytes(self) -> int:
        """Memory that forced routes take in the child: as they are read, and as the native core holds them."""
        if not self.forced or self.routes is None:
            return 0
        ids = self.routes.prompt.nbytes + self.routes.decode.nbytes
        return 3 * (ids + (0 if self.predicted is None else self.predicted.nbytes))


@dataclass(frozen=True, slots=True)
class Cell:
    """Runs that are compared with each other.

    Attributes
    ----------
    label : str
        As the budget was asked for: ``2x``, ``6GiB``, ``fits``.
    index : ExpertIndex
        The model, its experts per token as they are run.
    settings : Settings
        With ``ram``, the budget, and ``n_ubatch``.
    limit : int
        Of the memory cgroup, bytes.
    arena_bytes : int
        Memory for experts that edgemoe's plan leaves.
    everything : int
        Budget with which all experts would fit, bytes.
    """

    label: str
    index: ExpertIndex
    settings: Settings
    limit: int
    arena_bytes: int
    everything: int


@dataclass(slots=True)
class Run:
    """What one cold start of an arm took; seconds and bytes, None where it is not known.

    Attributes
    ----------
    arm : str
        One of `edgemoe.bench_arm.ARMS`.
    failure : str or None
        Why it ended early.
    load_s, warm_s, prompt_s : float
        From the start of the process to a ready context; to have a task's experts in memory; the prompt.
    token_s : list of float
        Each decoded token.
    checksums : list of int
        Running CRC-32 of the logits before each token.
    hits, misses, bytes_read : int or None
        Of the decoded tokens: expert parts found and not found; bytes that the system fetched from the disk.
    prompt_bytes_read : int or None
        The same for the prompt.
    wait_s, busy_s : float or None
        While decoding: computation waited for experts; the disk had something to do for them.
    prompt_wait_s : float or None
        Computation of the prompt waited for experts.
    system_s, stolen_s : float or None
        While decoding, of all processors: the kernel's for this process; what a virtual machine was kept waiting for.
    peak, peak_rss : int or None
        Most memory of the cgroup, and of the process itself (VmHWM).
    times_full : int or None
        How often the cgroup's limit was met.
    details : dict
        Threads, load mode, n_ubatch, I/O mode, counters that only some arms have.
    """

    arm: str
    failure: str | None = None
    load_s: float | None = None
    warm_s: float = 0.0
    prompt_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    hits: int | None = None
    misses: int | None = None
    bytes_read: int | None = None
    prompt_bytes_read: int | None = None
    wait_s: float | None = None
    busy_s: float | None = None
    prompt_wait_s: float | None = None
    system_s: float | None = None
    stolen_s: float | None = None
    peak: int | None = None
    peak_rss: int | None = None
    times_full: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the start of the process to the first token."""
        return None if self.load_s is None or self.prompt_s is None else self.load_s + self.warm_s + self.prompt_s


def run_arm(arm: str, cell: Cell, workload: Workload, opponent: Settings | None, scratch: Path) -> Run:
    """Measure one arm from a cold start; what goes wrong with its process is in the result.

    Parameters
    ----------
    arm : str
        One of `edgemoe.bench_arm.ARMS`.
    cell, workload : Cell, Workload
        What to run.
    opponent : Settings or None
        How plain llama.cpp was found to be fastest; for `MMAP`.
    scratch : Path
        Folder for the file that carries the routes.
    """
    run = Run(arm)
    settings = cell.settings
    if arm == MMAP:
        assert opponent is not None
        settings = opponent
    tuning = arm if arm in ("plain", "blind", "lru") else "all"
    settings = replace(settings, tuning=tuning)
    cool(cell.index)
    with _machine_of(cell) as group:
        wrap: Callable[[Sequence[str]], list[str]] = list if group is None else group.command
        try:
            with Arm(PLAIN if arm == MMAP else EDGEMOE, settings, wrap, PATIENCE) as child:
                _measure(run, child, cell, workload, scratch)
        except ArmError as error:
            run.failure = str(error)
        if group is not None:
            run.peak, run.times_full = group.peak(), group.times_full()
            if run.failure and group.killed():
                run.failure = "the kernel killed it: it needed more than the limit"
    return run


def resident_run(cell: Cell, workload: Workload, scratch: Path) -> Run:
    """Measure edgemoe with every expert in memory, the same tokens having been evaluated before.

    Raises
    ------
    ArmError
        When the process ends early.
    """
    run = Run("resident")
    with Arm(EDGEMOE, cell.settings.within(cell.everything), patience=PATIENCE) as child:
        _measure(Run("resident"), child, cell, workload, scratch)
        _measure(run, child, cell, workload, scratch)
    return run


def cool(index: ExpertIndex) -> None:
    """Drop the model, and where the right to do so is there everything else, from the page cache."""
    drop_page_cache()
    for path in index.files:
        make_cold(path)


@contextlib.contextmanager
def _machine_of(cell: Cell) -> Iterator[MemoryCgroup | None]:
    """Give a memory cgroup of the cell's size, with memory held for it; None where none can be made."""
    with contextlib.ExitStack() as stack:
        group: MemoryCgroup | None = None
        with contextlib.suppress(CgroupUnavailableError):
            group = stack.enter_context(memory_cgroup(cell.limit))
            wanted = min(cell.limit, cell.everything, machine().available)
            stack.enter_context(HeldMemory(wanted, group.used))
        yield group


def _measure(run: Run, child: Arm, cell: Cell, workload: Workload, scratch: Path) -> None:
    ready = child.ready
    run.load_s = ready["load_s"]
    run.details = {"n_threads": child.settings.n_threads, "n_ubatch": ready.get("n_ubatch", child.settings.n_ubatch)}
    run.details |= {"load_mode": child.settings.load_mode} if child.name == PLAIN else {"io": ready["io"]}
    routes = workload.routes
    if run.arm in ("auto", "task"):
        assert routes is not None
        pattern = _pattern(run.arm, cell, routes, ready["plan"]["expert arena"])
        if run.arm == "task" and workload.forced:
            counts = prompt_counts(routes.prompt, routes.n_expert)
            routes = replace(
                routes,
                prompt=within(routes.prompt, counts, pattern["kept"]),
                decode=within(routes.decode, counts, pattern["kept"]),
            )
        run.warm_s = child.ask(do="hold", **pattern, only=run.arm == "task" and not workload.forced)["seconds"]
    if workload.forced:
        assert routes is not None
        child.ask(do="force", path=str(_written(routes, workload.predicted, cell.index, scratch)))
    before = child.ask(do="state")
    prompt = child.prompt_of(workload.prompt)
    run.prompt_s = prompt["seconds"]
    run.prompt_bytes_read = _less(prompt["disk_bytes"], before["disk_bytes"])
    after = child.ask(
        do="decode", n_tokens=len(workload.decode), tokens=workload.decode, limit_s=DECODE_LIMIT, least=DECODE_LEAST
    )
    run.token_s, run.checksums = after["seconds"], after["checksums"]
    run.bytes_read = _less(after["disk_bytes"], prompt["disk_bytes"])
    run.peak_rss = after["peak_rss"]
    run.system_s, run.stolen_s = (_less(after[what], prompt[what]) for what in ("system_s", "stolen_s"))
    if child.name == EDGEMOE:
        run.hits, run.misses = (after[what] - prompt[what] for what in ("hits", "misses"))
        run.wait_s = after["read_s"] - prompt["read_s"]
        run.prompt_wait_s = prompt["read_s"] - before["read_s"]
        if "busy_s" in after:
            run.busy_s = after["busy_s"] - prompt["busy_s"]
            run.details |= {
                what: after[what] - prompt[what] for what in ("prefetched_bytes", "wasted_bytes", "retries")
            }


def _pattern(arm: str, cell: Cell, routes: Routes, arena_bytes: int) -> dict[str, Any]:
    """Experts of the prompt's pattern as the task mode would hold them."""
    counts = prompt_counts(routes.prompt, routes.n_expert)
    share = 1.0 if arm == "task" else WARM_SHARE
    layers = replace(ExpertLayers.of(cell.index), expert_bytes=expert_pages(cell.index))
    chosen = best_experts(counts, layers, arena_bytes, share)
    return {"layers": chosen.layers, "kept": chosen.kept}


def _written(routes: Routes, predicted: Ids | None, index: ExpertIndex, scratch: Path) -> Path:
    """Write the routes for a child, which reads them before it answers."""
    path = scratch / "forced.npz"
    more = {} if predicted is None else {"predicted": predicted}
    ids = np.concatenate([routes.prompt, routes.decode])
    with path.open("wb") as file:
        np.savez(file, layers=np.array(index.moe_layers, np.int32), ids=ids, **more)  # type: ignore[arg-type]
    return path


def _less(after: _N | None, before: _N | None) -> _N | None:
    return None if after is None or before is None else after - before
