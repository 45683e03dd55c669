"""edgemoe beside plain llama.cpp and its own control arm: rounds of cold starts, in turn, at several budgets."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from edgemoe.bench_arm import MMAP, ArmError, Settings, ask_plan
from edgemoe.bench_figures import Figures, figures_of, median_of
from edgemoe.bench_machine import describe, disk_bandwidth
from edgemoe.bench_opponent import Trial, best_opponent
from edgemoe.bench_roofline import BOUNDS, Roofline, roofline
from edgemoe.bench_run import Cell, Run, Workload, resident_run, run_arm
from edgemoe.bench_workload import MEASURED, NATURAL, departures, make_workload
from edgemoe.errors import BudgetError, TraceError
from edgemoe.index import ExpertIndex, read_index
from edgemoe.memory import format_bytes, machine, parse_budget
from edgemoe.memory_cgroup import CgroupUnavailableError, memory_cgroup
from edgemoe.plan import safe_mebibytes
from edgemoe.route_statistics import statistics

__all__ = ["FITS", "BenchResult", "CellResult", "run_bench"]

FITS = "fits"
"""The budget that holds every expert."""

_RATIO = re.compile(r"(\d+(?:\.\d+)?)x")


@dataclass(frozen=True)
class CellResult:
    """What was measured at one budget.

    Attributes
    ----------
    label : str
        The budget as it was asked for.
    ram, arena_bytes, n_ubatch : int
        Budget, memory for experts in it, tokens of a physical batch.
    ratio : float
        Size of the model's file over the budget.
    in_cgroup : bool
        Whether a memory cgroup of that size held each arm.
    trials : list of Trial
        How plain llama.cpp was tried.
    bandwidths : list of float
        Of the disk before each round, bytes per second.
    roofline : Roofline or None
        None where routes are not known, no arm shows what computing takes, or the disk's speed cannot be measured.
    compute_from : str
        Where its compute time is from: ``resident`` (every expert in memory), or ``plain`` (edgemoe's
        arms plain and all, less their waiting).
    runs : list of Run
        All, in the order of time.
    figures : list of Figures
        For each arm.
    """

    label: str
    ram: int
    arena_bytes: int
    n_ubatch: int
    ratio: float
    in_cgroup: bool
    trials: list[Trial]
    bandwidths: list[float]
    roofline: Roofline | None
    compute_from: str
    runs: list[Run]
    figures: list[Figures]

    def document(self) -> dict[str, Any]:
        """Give everything as JSON types, but for the checksums, which the figures sum up."""
        document = asdict(self)
        if self.roofline is not None:
            document["roofline"] |= {name: getattr(self.roofline, name) for name in BOUNDS}
        for run in document["runs"]:
            del run["checksums"]
            run["token_s"] = [round(second, 5) for second in run["token_s"]]
        return document


@dataclass(frozen=True)
class BenchResult:
    """A bench's cells, and what they depend on.

    Attributes
    ----------
    about : dict
        Machine, disk, commit, date and model, see `edgemoe.bench_machine.describe`.
    routing : str
        The routes' name.
    forced : bool
        Whether they were forced.
    n_prompt, n_decode, rounds : int
        Tokens; cold starts of each arm.
    recall : float or None
        Of the emulated look-ahead.
    statistics : dict of str to float
        How local and how skewed the decoded tokens' routes are (`edgemoe.route_statistics`); empty where there are
        too few, or they are not known.
    departures : list of str or None
        Which of them differ from those of the trace that the routes were fitted to; None where there is none.
    cells : list of CellResult
        One for each budget.
    """

    about: dict[str, Any]
    routing: str
    forced: bool
    n_prompt: int
    n_decode: int
    rounds: int
    recall: float | None
    statistics: dict[str, float]
    departures: list[str] | None
    cells: list[CellResult]

    def document(self) -> dict[str, Any]:
        """Give everything as JSON types."""
        head = {name: value for name, value in asdict(self).items() if name not in ("about", "cells")}
        return {"benchmark": "bench", **self.about, **head, "cells": [cell.document() for cell in self.cells]}


def run_bench(
    model: Path,
    budgets: Sequence[str],
    routing: str,
    arms: Sequence[str],
    n_prompt: int,
    n_decode: int,
    rounds: int,
    n_threads: int,
    recall: float | None,
    say: Callable[[str], Any],
) -> BenchResult:
    """Measure a model.

    Parameters
    ----------
    model : Path
        GGUF file.
    budgets : sequence of str
        Sizes as ``--ram`` takes them, ratios of the file to the memory (``4x``), or ``fits``.
    routing : str
        See `edgemoe.bench_workload.make_workload`.
    arms : sequence of str
        Of `edgemoe.bench_arm.ARMS`.
    n_prompt, n_decode, rounds : int
        Tokens of the prompt, tokens after it, cold starts of each arm.
    n_threads : int
        Compute threads of edgemoe; plain llama.cpp's are chosen by trial.
    recall : float or None
        See `edgemoe.bench_workload.make_workload`.
    say : callable
        Takes a line for people on what goes on.

    Raises
    ------
    EdgemoeError
        If a budget is none or too small, the model or the routes cannot be used, or the plan's process fails.
    """
    index = read_index(model)
    settings = Settings(str(model.resolve()), n_prompt + n_decode, None, n_threads, n_batch=n_prompt)
    wanted = [budget_of(text, index) for text in budgets]
    workload, index = make_workload(routing, index, settings, n_prompt, n_decode, recall)
    if workload.routes is None and {"auto", "task"} & set(arms):
        raise TraceError(f"{model} does not show its routes, which auto and task need; give --arms mmap,plain,all")
    n_used = workload.routes.n_used if workload.forced and workload.routes else None
    settings = replace(settings, n_expert_used=n_used, forced_bytes=workload.forced_bytes)
    whole = ask_plan(settings)
    cells = [_cell(text, ram, index, settings, whole) for text, ram in zip(budgets, wanted, strict=True)]
    about = describe(model)  # nothing that may fail is left for when hours of measurements are done
    with tempfile.TemporaryDirectory(prefix="edgemoe-bench-") as scratch:
        results = [_measure(cell, workload, arms, rounds, Path(scratch), say) for cell in cells]
    name, routes = NATURAL, workload.routes
    measured, departed = {}, None
    if routes is not None:
        name = routes.name
        if n_decode >= MEASURED:
            found = statistics(routes, MEASURED)
            measured, departed = dict(found.shares()), departures(routes, found)
    return BenchResult(about, name, workload.forced, n_prompt, n_decode, rounds, recall, measured, departed, results)


def budget_of(text: str, index: ExpertIndex) -> int | None:
    """Bytes of a budget as `run_bench` takes it; None for ``fits``.

    Raises
    ------
    BudgetError
        If it is none.
    """
    if text == FITS:
        return None
    ratio = _RATIO.fullmatch(text)
    if ratio is None:
        return parse_budget(text).bytes
    ram = index.file_bytes / float(ratio[1]) if float(ratio[1]) else math.inf
    if not 1 <= ram < math.inf:
        raise BudgetError(f"--ram {text} is no ratio of the model's size to the memory; give 2x, 4x or 8x")
    return round(ram)


def _cell(label: str, ram: int | None, index: ExpertIndex, settings: Settings, whole: dict[str, int]) -> Cell:
    """Ask for the plan of one budget; `whole` is the one of everything.

    Raises
    ------
    BudgetError
        When the budget is too small, with the one that would do.
    ArmError
        When there is no plan for another reason.
    """
    if ram is not None and ram < whole["floor"]:
        raise BudgetError(
            f"--ram {label} ({format_bytes(ram)}) is too small for {index.path.name} with a prompt and tokens of"
            f" {settings.n_ctx} together; give --ram {safe_mebibytes(whole['floor'])}MiB, or fewer of --prompt and"
            " --tokens",
            needed=whole["floor"],
        )
    plan = whole if ram is None else ask_plan(replace(settings, ram=ram))
    return Cell(
        label=label,
        index=index,
        settings=replace(settings, ram=plan["everything"] if ram is None else ram, n_ubatch=plan["n_ubatch"]),
        # Where everything fits, the cgroup only counts; llama.cpp may need more than edgemoe.
        limit=machine().total if ram is None else ram,
        arena_bytes=plan["arena"],
        everything=plan["everything"],
    )


def _far_too_slow(run: Run, workload: Workload) -> bool:
    """Whether not even a quarter of the tokens was decoded before the time was over."""
    return run.failure is None and len(run.token_s) < len(workload.decode) / 4


def _measure(
    cell: Cell,
    workload: Workload,
    arms: Sequence[str],
    rounds: int,
    scratch: Path,
    say: Callable[[str], Any],
) -> CellResult:
    in_cgroup = _can_limit(cell, say)
    opponent, trials = best_opponent(cell, workload, scratch, say) if MMAP in arms else (None, [])
    runs: list[Run] = []
    residents: list[Run] = []
    bandwidths: list[float] = []
    for number in range(rounds):
        bandwidths += filter(None, [disk_bandwidth(cell.index.largest_file)])
        turn = number % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            if any(run.arm == arm and _far_too_slow(run, workload) for run in runs):
                continue  # it takes minutes, and says no more in another round
            runs.append(run_arm(arm, cell, workload, opponent, scratch))
            say(_line(cell, number, runs[-1]))
        residents += _resident(cell, workload, number, scratch, say)
    compute, prompt_compute, source = _compute(runs, residents)
    bound = None
    if workload.routes is not None and compute is not None and prompt_compute is not None and bandwidths:
        sizes = [cell.index.expert_size(layer) for layer in cell.index.moe_layers]
        n_ubatch = cell.settings.n_ubatch or len(workload.prompt)
        bandwidth = median(bandwidths)
        bound = roofline(workload.routes, sizes, cell.arena_bytes, n_ubatch, bandwidth, compute, prompt_compute)
    assert cell.settings.ram is not None and cell.settings.n_ubatch is not None
    return CellResult(
        label=cell.label,
        ram=cell.settings.ram,
        arena_bytes=cell.arena_bytes,
        n_ubatch=cell.settings.n_ubatch,
        ratio=cell.index.file_bytes / cell.settings.ram,
        in_cgroup=in_cgroup,
        trials=trials,
        bandwidths=bandwidths,
        roofline=bound,
        compute_from=source,
        runs=runs,
        figures=figures_of(runs, len(workload.prompt), bound),
    )


def _can_limit(cell: Cell, say: Callable[[str], Any]) -> bool:
    """Find out whether the arms run within a memory cgroup; says so where they do not."""
    try:
        with memory_cgroup(cell.limit):
            return True
    except CgroupUnavailableError as error:
        say(f"{cell.label:>6}  no limit but edgemoe's own holds: {error}")
        return False


def _resident(cell: Cell, workload: Workload, number: int, scratch: Path, say: Callable[[str], Any]) -> list[Run]:
    """Run once with every expert in memory; not at all where there is no room for that.

    Every round of every cell has its own: within minutes a machine's own speed may change more than what is measured.
    """
    if cell.everything >= machine().available:
        return []
    try:
        run = resident_run(cell, workload, scratch)
    except ArmError as error:
        say(f"{cell.label:>6}  with everything in memory: {error}")
        return []
    say(_line(cell, number, run))
    return [run]


def _compute(runs: Sequence[Run], residents: Sequence[Run]) -> tuple[float | None, float | None, str]:
    """Give the seconds of a token, and of the prompt, that computing alone takes, and where they are from."""
    if residents:
        token = median_of(residents, lambda run: sum(run.token_s) / len(run.token_s))
        return token, median_of(residents, lambda run: run.prompt_s), "resident"
    done = [run for run in runs if run.arm in ("plain", "all") and run.token_s]
    token = median_of(
        done, lambda run: None if run.wait_s is None else (sum(run.token_s) - run.wait_s) / len(run.token_s)
    )
    return token, median_of(done, _prompt_without_waiting), "plain"


def _prompt_without_waiting(run: Run) -> float | None:
    return None if run.prompt_s is None or run.prompt_wait_s is None else run.prompt_s - run.prompt_wait_s


def _line(cell: Cell, number: int, run: Run) -> str:
    if run.failure or not run.token_s:
        return f"{cell.label:>6}  round {number + 1}  {run.arm:8}  {run.failure or 'nothing was decoded'}"
    memory = "" if run.peak is None else f", peak {format_bytes(run.peak)}"
    return (
        f"{cell.label:>6}  round {number + 1}  {run.arm:8}  {1 / median(run.token_s):8.2f} tok/s over"
        f" {len(run.token_s)} tokens, prompt {run.prompt_s:.2f} s{memory}"
    )
