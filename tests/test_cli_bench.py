"""``edgemoe bench`` as a command."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import click.testing
import pytest
from bench_models import coolable_model

from edgemoe.cli import main
from edgemoe.figures import can_plot

SHORT = ("--ram", "96MiB", "--prompt", "24", "--tokens", "20", "--rounds", "1", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coolable_model(tmp_path_factory.mktemp("model"))


def run(model: Path, *flags: str | Path) -> click.testing.Result:
    result = click.testing.CliRunner().invoke(main, ["bench", str(model), *SHORT, *map(str, flags)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_every_arm_with_natural_routes(model: Path) -> None:
    result = run(model, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    document = json.loads(result.stdout)
    (cell,) = document["cells"]
    figures = {row["arm"]: row for row in cell["figures"]}
    assert list(figures) == ["mmap", "plain", "all", "auto", "task"]
    assert [figures[arm]["same_logits"] for arm in ("mmap", "plain", "all", "auto")] == [True] * 4
    assert all(row["n_tokens"] == 20 and row["tokens_per_s"] > 0 and not row["failures"] for row in figures.values())
    assert figures["task"]["hit_rate"] == 1.0
    assert figures["mmap"]["prompt_wait_s"] is None
    for arm in ("plain", "all", "auto", "task"):
        assert 0 <= figures[arm]["prompt_wait_s"] <= figures[arm]["prompt_s"]
        if cell["roofline"]:
            assert figures[arm]["prompt_eaten_by"] in ("compute", "waiting", "other")
    assert document["routing"] == "natural" and not document["forced"]
    assert {trial["load_mode"] for trial in cell["trials"]} == {"MMAP", "NONE", "DIRECT_IO"}
    assert "round 1  mmap" in result.stderr


def test_forced_routes_with_files(model: Path, tmp_path: Path) -> None:
    flags = ["--routes", "switch", "--recall", "0.8", "--arms", "plain,all", "--csv", tmp_path / "bench.csv"]
    if can_plot():
        flags += ["--plot", tmp_path / "plots"]
    result = run(model, *flags)
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "task switch routes, forced" in result.stdout
    assert [line.split()[0] for line in lines if line.startswith(("plain ", "all "))] == ["plain", "all"] * 3
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["routing"], row["same_logits"]) for row in rows] == [
        ("plain", "task switch", "True"),
        ("all", "task switch", "True"),
    ]
    if rows[0]["roofline_lru_hit_rate"]:
        # The control arm is the cache that is replayed, in an arena that was planned a little differently.
        assert float(rows[0]["hit_rate"]) == pytest.approx(float(rows[0]["roofline_lru_hit_rate"]), abs=0.03)
    if can_plot():
        assert (tmp_path / "plots" / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ram", "50x"), "MiB"),
        (("--ram", "lots"), "is not a memory size"),
        (("--arms", "all,fast"), "'fast' is none of mmap, plain, blind, lru, all, auto, task"),
        (("--routes", "missing.csv"), "missing.csv cannot be read as a routing trace"),
        (("--recall", "0.5"), "needs forced routes"),
        (("--recall", "1.5"), "not in the range"),
        (("--csv", "/nowhere/at/all.csv"), "give a file in an existing folder"),
    ],
)
def test_bad_input_is_one_sentence(model: Path, flags: tuple[str, ...], said: str) -> None:
    arguments = ["bench", str(model), "--arms", "all", "--prompt", "8", "--tokens", "4", "--rounds", "1", *flags]
    result = click.testing.CliRunner().invoke(main, arguments)
    assert result.exit_code != 0 and said in result.stderr and result.stdout == ""
    assert "Traceback" not in result.stderr


def test_no_model(tmp_path: Path) -> None:
    result = run(tmp_path / "none.gguf")
    assert result.exit_code == 1 and "none.gguf" in result.stderr and result.stderr.count("\n") == 1


def test_plot_without_matplotlib(model: Path, tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        result = run(model, "--plot", tmp_path)
    assert result.exit_code == 2 and "pip install 'edgemoe[plot]'" in result.stderr


def is_gone(pid: int) -> bool:
    """Whether a process has ended; who reaps orphans may not have come to it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="the kernel lists no children")
def test_an_interrupt_ends_the_children(model: Path) -> None:
    command = [sys.executable, "-m", "edgemoe", "bench", str(model), *SHORT, "--rounds", "100", "--routes", "uniform"]
    bench = subprocess.Popen(
        [*command, "--arms", "all"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert bench.stderr is not None
    assert "round 1" in bench.stderr.readline()
    while not (children := children_of(bench.pid)):
        time.sleep(0.001)
    bench.send_signal(signal.SIGINT)
    out, _ = bench.communicate(timeout=60)
    assert bench.returncode == 130 and out == ""
    # A child that is being started just then is not known yet: it ends by itself, as nobody talks to it.
    deadline = time.monotonic() + 60
    while not all(map(is_gone, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(is_gone, children))
