"""A bench's budgets, the order of its runs, and where its compute time comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench_models import made_up_run
from plain_llama import TINY_MOE

from edgemoe import bench
from edgemoe.bench import budget_of, run_bench
from edgemoe.bench_arm import ArmError, Settings
from edgemoe.bench_run import Cell, Run, Workload
from edgemoe.errors import BudgetError
from edgemoe.index import read_index
from edgemoe.memory import machine

MIB = 1 << 20


def test_budgets() -> None:
    index = read_index(TINY_MOE)
    assert budget_of("fits", index) is None
    assert budget_of("2x", index) == round(index.file_bytes / 2)
    assert budget_of("0.25x", index) == 4 * index.file_bytes
    assert budget_of("96MiB", index) == 96 * MIB
    assert budget_of(f"{index.file_bytes}x", index) == 1
    nothing = ("1000000000x", f"{index.file_bytes + 1}x", f"0.{'0' * 323}5x", f"1{'0' * 400}x")
    for nonsense in ("0x", "x", "-2x", "lots", "2 x", *nothing):
        with pytest.raises(BudgetError, match=r"2x|6GiB"):
            budget_of(nonsense, index)


class Stage:
    """Runs that are made up; remembers what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[tuple[str, str]] = []
        self.resident: list[int | None] = []
        self.resident_fails = False
        self.resident_token_s = [0.04]  # of each round
        self.fails: str | None = None
        self.n_tokens: dict[str, int] = {}
        index = read_index(TINY_MOE)

        def run_arm(arm: str, cell: Cell, workload: Workload, opponent: Settings | None, scratch: Path) -> Run:
            assert (opponent is not None) == (arm == "mmap" or opponent is not None)
            self.order.append((cell.label, arm))
            failure = "it ended" if arm == self.fails else None
            return replace(made_up_run(arm, n_tokens=self.n_tokens.get(arm, 16)), failure=failure)

        def resident_run(cell: Cell, workload: Workload, scratch: Path) -> Run:
            self.resident.append(cell.settings.n_ubatch)
            if self.resident_fails:
                raise ArmError("it ended")
            turn = (len(self.resident) - 1) % len(self.resident_token_s)
            return replace(made_up_run("resident", self.resident_token_s[turn]), prompt_s=1.5)

        def ask_plan(settings: Settings) -> dict[str, int]:
            small = settings.ram == round(index.file_bytes / 8)
            return {"floor": 3 * MIB, "everything": 200 * MIB, "arena": 8 * MIB, "n_ubatch": 16 if small else 32}

        for name, made_up in (("run_arm", run_arm), ("resident_run", resident_run), ("ask_plan", ask_plan)):
            monkeypatch.setattr(bench, name, made_up)
        monkeypatch.setattr(bench, "best_opponent", lambda cell, *_: (cell.settings, []))
        monkeypatch.setattr(bench, "disk_bandwidth", lambda _: 1e9)

    def run(self, budgets: tuple[str, ...], arms: tuple[str, ...], rounds: int = 1) -> bench.BenchResult:
        said: Callable[[str], None] = lambda _: None  # noqa: E731
        return run_bench(TINY_MOE, budgets, "uniform", arms, 32, 16, rounds, 2, None, said)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def test_another_arm_begins_each_round(stage: Stage) -> None:
    stage.run(("2x",), ("mmap", "plain", "all"), rounds=4)
    first = [arm for _, arm in stage.order[::3]]
    assert first == ["mmap", "plain", "all", "mmap"]
    assert all({arm for _, arm in stage.order[i : i + 3]} == {"mmap", "plain", "all"} for i in range(0, 12, 3))


def test_an_arm_that_is_far_too_slow_runs_once(stage: Stage) -> None:
    stage.n_tokens = {"mmap": 3, "plain": 4}
    stage.run(("2x",), ("mmap", "plain"), rounds=3)
    assert [arm for _, arm in stage.order] == ["mmap", "plain", "plain", "plain"]


def test_an_arm_that_failed_is_tried_again(stage: Stage) -> None:
    stage.n_tokens, stage.fails = {"mmap": 0}, "mmap"
    stage.run(("2x",), ("mmap", "all"), rounds=2)
    assert sorted(arm for _, arm in stage.order) == ["all", "all", "mmap", "mmap"]


def test_compute_time_is_that_with_everything_in_memory(stage: Stage) -> None:
    result = stage.run(("fits", "4x", "8x"), ("plain", "all"))
    assert stage.resident == [32, 32, 16]  # beside the arms that it is compared with
    for cell in result.cells:
        assert cell.compute_from == "resident" and cell.roofline is not None
        assert cell.roofline.compute_s == pytest.approx(0.04) and cell.roofline.prompt_compute_s == 1.5


def test_compute_time_is_measured_anew_in_each_round(stage: Stage) -> None:
    stage.resident_token_s = [0.07, 0.03, 0.05]
    (cell,) = stage.run(("4x",), ("all",), rounds=3).cells
    assert len(stage.resident) == 3
    assert cell.roofline is not None and cell.roofline.compute_s == pytest.approx(0.05)


def test_else_it_is_that_of_an_arm_less_its_waiting(stage: Stage) -> None:
    stage.resident_fails = True
    (cell,) = stage.run(("4x",), ("mmap", "all")).cells
    assert cell.compute_from == "plain" and cell.roofline is not None
    assert cell.roofline.compute_s == pytest.approx(0.05) and cell.roofline.prompt_compute_s == 2.5


def test_no_arm_shows_it(stage: Stage) -> None:
    stage.resident_fails = True
    (cell,) = stage.run(("4x",), ("mmap",)).cells
    assert cell.roofline is None and cell.figures[0].of_belady is None


def test_a_machine_that_does_not_hold_it_is_not_asked_to(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(machine(), available=100 * MIB)
    monkeypatch.setattr(bench, "machine", lambda: here)
    (cell,) = stage.run(("4x",), ("all",)).cells
    assert stage.resident == [] and cell.compute_from == "plain"


def test_without_a_disk_s_speed_there_is_no_roofline(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "disk_bandwidth", lambda _: None)
    assert stage.run(("4x",), ("all",)).cells[0].roofline is None


def test_a_budget_that_is_too_small_is_refused_as_it_was_given(stage: Stage) -> None:
    with pytest.raises(BudgetError) as refused:
        stage.run(("fits", "16x"), ("all",))
    found = str(refused.value)
    assert found.startswith("--ram 16x (1.95 MiB) is too small for tiny-moe-q4_k_m.gguf with a prompt and tokens of 48")
    assert found.endswith("; give --ram 4MiB, or fewer of --prompt and --tokens") and "--ctx" not in found
    assert not stage.order


def test_what_cannot_be_described_is_known_before_the_first_round(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Path) -> dict[str, object]:
        raise OSError("no such machine")

    monkeypatch.setattr(bench, "describe", fails)
    with pytest.raises(OSError, match="no such machine"):
        stage.run(("2x",), ("all",))
    assert not stage.order


def test_what_a_cell_says_of_itself(stage: Stage) -> None:
    result = stage.run(("fits", "8x"), ("all",))
    fits, small = result.cells
    file_bytes = read_index(TINY_MOE).file_bytes
    assert (fits.ram, fits.n_ubatch, small.n_ubatch, small.ram) == (200 * MIB, 32, 16, round(file_bytes / 8))
    assert small.ratio == pytest.approx(8) and fits.bandwidths == [1e9]
    assert (result.routing, result.forced, result.n_prompt, result.n_decode) == ("uniform", True, 32, 16)
