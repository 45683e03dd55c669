"""The best that plain llama.cpp can do in a cell: thread counts and load modes tried in the same run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from edgemoe.bench_arm import MMAP, Settings
from edgemoe.bench_run import Cell, Workload, run_arm

__all__ = ["Trial", "best_opponent"]

_PROMPT, _TOKENS = 16, 16
_SLOW_PROMPT, _SLOW_TOKENS = 1, 4
"""Tokens of a trial, and where the model does not fit: there one token may take ten seconds."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to run plain llama.cpp.

    Attributes
    ----------
    n_threads, load_mode : int, str
        See `Settings`.
    tokens_per_s : float or None
        Of the few tokens decoded; None when it failed.
    failure : str or None
        Why.
    """

    n_threads: int
    load_mode: str
    tokens_per_s: float | None
    failure: str | None = None


def best_opponent(
    cell: Cell, workload: Workload, scratch: Path, say: Callable[[str], Any]
) -> tuple[Settings, list[Trial]]:
    """Try every number of threads with every load mode; gives the fastest decoder's settings, and all trials.

    A prompt has all cores in any case. Modes that hold the whole model in anonymous memory are tried only where the
    limit holds it.
    """
    fits = cell.index.file_bytes < cell.limit
    n_prompt, n_tokens = (_PROMPT, _TOKENS) if fits else (_SLOW_PROMPT, _SLOW_TOKENS)
    few = replace(workload, prompt=workload.prompt[:n_prompt], decode=workload.decode[:n_tokens])
    trials = []
    n_cores = len(os.sched_getaffinity(0))
    for load_mode in ("MMAP", "NONE", "DIRECT_IO") if fits else ("MMAP",):
        for n_threads in range(1, n_cores + 1):
            settings = replace(cell.settings, load_mode=load_mode, n_threads=n_threads, n_threads_batch=n_cores)
            run = run_arm(MMAP, cell, few, settings, scratch)
            speed = 1 / median(run.token_s) if run.token_s and not run.failure else None
            trials.append(Trial(n_threads, load_mode, speed, run.failure))
            result = run.failure if speed is None else f"{speed:.2f} tok/s"
            say(f"{cell.label:>6}  llama.cpp, {n_threads} threads, {load_mode}: {result}")
    best = max(trials, key=lambda trial: trial.tokens_per_s or 0.0)
    settings = replace(cell.settings, load_mode=best.load_mode, n_threads=best.n_threads, n_threads_batch=n_cores)
    return settings, trials
