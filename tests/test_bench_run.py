"""Cold starts of arms in a memory cgroup, and what becomes of those that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench_models import coolable_model

from edgemoe import bench_run
from edgemoe.bench_arm import ARMS, ArmError, Settings
from edgemoe.bench_run import Cell, Workload, resident_run, run_arm
from edgemoe.bench_workload import make_workload
from edgemoe.index import read_index
from edgemoe.memory_cgroup import CgroupUnavailableError, memory_cgroup

MIB = 1 << 20
N_PROMPT, N_DECODE = 24, 20


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, Workload]:
    model = coolable_model(tmp_path_factory.mktemp("model"))
    settings = Settings(str(model), N_PROMPT + N_DECODE, n_ubatch=44, n_threads=1, ram=96 * MIB)
    index = read_index(model)
    workload = make_workload("fitted", index, settings, N_PROMPT, N_DECODE, None)[0]
    settings = replace(settings, forced_bytes=workload.forced_bytes)
    return Cell("96MiB", index, settings, 96 * MIB, 20 * MIB, 130 * MIB), workload


@pytest.fixture(scope="module")
def cell(both: tuple[Cell, Workload]) -> Cell:
    return both[0]


@pytest.fixture(scope="module")
def workload(both: tuple[Cell, Workload]) -> Workload:
    return both[1]


@pytest.fixture
def cgroup() -> None:
    try:
        with memory_cgroup(96 * MIB):
            pass
    except CgroupUnavailableError as error:
        pytest.skip(str(error))


def test_every_arm_evaluates_the_same(cell: Cell, workload: Workload, tmp_path: Path) -> None:
    runs = {arm: run_arm(arm, cell, workload, cell.settings, tmp_path) for arm in ("mmap", "plain", "all", "auto")}
    for arm, run in runs.items():
        assert run.failure is None, run.failure
        assert len(run.token_s) == N_DECODE and run.arm == arm
        assert run.checksums == runs["mmap"].checksums
        assert run.first_token_s is not None and run.prompt_s is not None and run.load_s is not None
        assert run.first_token_s >= run.load_s + run.prompt_s
        assert run.prompt_bytes_read is None or run.prompt_bytes_read >= 0
    slabs = 3 * sum(cell.index.n_expert_used[layer] for layer in cell.index.moe_layers) * N_DECODE
    assert runs["mmap"].hits is None and runs["mmap"].prompt_wait_s is None
    for arm in ("plain", "all", "auto"):
        waited, took = runs[arm].prompt_wait_s, runs[arm].prompt_s
        assert waited is not None and took is not None and 0 < waited < took
    assert all((runs[arm].hits or 0) + (runs[arm].misses or 0) == slabs for arm in ("plain", "all", "auto"))
    assert runs["auto"].warm_s > 0 == runs["all"].warm_s
    assert runs["mmap"].details["load_mode"] == "MMAP" and "io" in runs["all"].details


def test_each_arm_has_its_tuning(
    cell: Cell, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def fails(name: str, settings: Settings, *_: object) -> None:
        opened.append(settings.tuning)
        raise ArmError("it is not needed")

    monkeypatch.setattr(bench_run, "Arm", fails)
    for arm in ARMS:
        run_arm(arm, cell, workload, cell.settings, tmp_path)
    assert dict(zip(ARMS, opened, strict=True)) == {
        "mmap": "all", "plain": "plain", "blind": "blind", "lru": "lru", "all": "all", "auto": "all", "task": "all",
    }  # fmt: skip


def test_the_task_arm_misses_nothing(cell: Cell, workload: Workload, tmp_path: Path) -> None:
    forced = run_arm("task", cell, workload, None, tmp_path)
    assert forced.failure is None and forced.misses == 0
    natural = make_workload("natural", cell.index, cell.settings, N_PROMPT, N_DECODE, None)[0]
    assert run_arm("task", cell, natural, None, tmp_path).misses == 0


def test_with_everything_in_memory(cell: Cell, workload: Workload, tmp_path: Path) -> None:
    run = resident_run(cell, workload, tmp_path)
    assert (run.failure, run.misses, len(run.token_s)) == (None, 0, N_DECODE)
    assert run.checksums == run_arm("plain", cell, workload, None, tmp_path).checksums


def test_memory_is_that_of_the_cgroup(cell: Cell, workload: Workload, tmp_path: Path, cgroup: None) -> None:
    run = run_arm("all", cell, workload, None, tmp_path)
    assert run.peak is not None and 30 * MIB < run.peak <= 96 * MIB
    assert run.peak_rss is not None and run.peak_rss > 30 * MIB


def test_an_arm_that_the_kernel_kills(cell: Cell, workload: Workload, tmp_path: Path, cgroup: None) -> None:
    # All of the model in anonymous memory, and a limit that does not hold it.
    opponent = replace(cell.settings, load_mode="NONE")
    run = run_arm("mmap", replace(cell, limit=40 * MIB), workload, opponent, tmp_path)
    assert run.failure == "the kernel killed it: it needed more than the limit"
    assert run.token_s == [] and run.peak is not None


def test_an_arm_that_fails_is_no_exception(cell: Cell, workload: Workload, tmp_path: Path) -> None:
    run = run_arm("all", replace(cell, settings=cell.settings.within(30 * MIB)), workload, None, tmp_path)
    assert run.failure is not None and "ended with status 1" in run.failure and "MiB" in run.failure


def test_an_arm_that_takes_too_long(
    cell: Cell, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "PATIENCE", 0.01)
    run = run_arm("all", cell, workload, None, tmp_path)
    assert run.failure is not None and "no answer" in run.failure


def test_slow_arms_decode_fewer_tokens(
    cell: Cell, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "DECODE_LIMIT", 0.0)
    run = run_arm("all", cell, workload, None, tmp_path)
    assert len(run.token_s) == bench_run.DECODE_LEAST < N_DECODE
