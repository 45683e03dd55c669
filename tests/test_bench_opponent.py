"""The opponent's threads and load mode are those that were fastest in a trial."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from plain_llama import TINY_MOE

from edgemoe import bench_opponent
from edgemoe.bench_arm import Settings
from edgemoe.bench_opponent import best_opponent
from edgemoe.bench_run import Cell, Run, Workload
from edgemoe.index import read_index

SETTINGS = Settings(str(TINY_MOE), 96, n_ubatch=32, n_threads=7, ram=1 << 27)
WORKLOAD = Workload([1] * 64, [2] * 32, None, forced=False)


def trials_of(limit: int, seconds: dict[tuple[int, str], float], monkeypatch: pytest.MonkeyPatch) -> tuple:
    asked: list[Workload] = []

    def run_arm(arm: str, cell: Cell, workload: Workload, opponent: Settings, scratch: Path) -> Run:
        asked.append(workload)
        second = seconds.get((opponent.n_threads, opponent.load_mode))
        return Run(arm, failure="killed") if second is None else Run(arm, token_s=[second] * len(workload.decode))

    monkeypatch.setattr(bench_opponent, "run_arm", run_arm)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    cell = Cell("", read_index(TINY_MOE), SETTINGS, limit, 0, 0)
    return *best_opponent(cell, WORKLOAD, Path(), lambda _: None), asked


def test_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {(1, "MMAP"): 0.3, (2, "MMAP"): 0.2, (1, "NONE"): 0.1, (2, "NONE"): 0.4, (2, "DIRECT_IO"): 0.5}
    best, trials, asked = trials_of(1 << 30, seconds, monkeypatch)
    assert (best.n_threads, best.n_threads_batch, best.load_mode, best.ram) == (1, 2, "NONE", SETTINGS.ram)
    speeds = {(trial.n_threads, trial.load_mode): trial.tokens_per_s for trial in trials}
    assert speeds == {key: 1 / value for key, value in seconds.items()} | {(1, "DIRECT_IO"): None}
    assert [trial.failure for trial in trials if trial.tokens_per_s is None] == ["killed"]
    assert {(len(workload.prompt), len(workload.decode)) for workload in asked} == {(16, 16)}


def test_a_model_that_does_not_fit_is_only_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    best, trials, asked = trials_of(1 << 20, {(1, "MMAP"): 2.0, (2, "MMAP"): 3.0}, monkeypatch)
    assert (best.n_threads, best.load_mode) == (1, "MMAP") and len(trials) == 2
    assert {(len(workload.prompt), len(workload.decode)) for workload in asked} == {(1, 4)}


def test_all_trials_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    best, trials, _ = trials_of(1 << 20, {}, monkeypatch)
    assert best.load_mode == "MMAP" and all(trial.failure for trial in trials)
