"""Tables, rows and pictures of a bench that was never run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from bench_models import made_up_run
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from edgemoe.bench import BenchResult, CellResult
from edgemoe.bench_figures import figures_of
from edgemoe.bench_opponent import Trial
from edgemoe.bench_report import FIELDS, bench_rows, bench_tables, save_csv, save_plots
from edgemoe.bench_roofline import Roofline
from edgemoe.bench_run import Run
from edgemoe.figures import can_plot

ROOFLINE = Roofline(0.04, 8.0, 5.0, 0.5, 0.7, 1.5, 200, 100.0)
ABOUT = {
    "date": "2026-11-25T00:00:00+00:00",
    "commit": "abc1234",
    "cpu": "A Processor",
    "cores": 2,
    "kernel": "Linux 6",
    "disk": "serial 42",
    "disk_bytes_per_s": 1e9,
    "model": {"name": "a model", "file_bytes": 17 << 30, "n_layer": 48},
}


def cell(label: str, roofline: Roofline | None, *runs: Run) -> CellResult:
    trials = [Trial(1, "MMAP", 0.5), Trial(2, "NONE", None, "killed")]
    figures = figures_of(runs, 32, roofline)
    return CellResult(label, 4 << 30, 3 << 30, 512, 4.25, True, trials, [1e9], roofline, "resident", [*runs], figures)


def result(*cells: CellResult) -> BenchResult:
    statistics = {"overlap at lag 1": 0.384, "distinct experts": 0.5}
    return BenchResult(ABOUT, "qwen", True, 32, 100, 1, None, statistics, ["overlap at lag 2"], list(cells))


USUAL = result(
    cell("4x", ROOFLINE, made_up_run("mmap", 2.0, 16), made_up_run("plain", 0.2), made_up_run("all", checksum=2)),
    cell("8x", None, Run("mmap", failure="the kernel killed it"), made_up_run("all")),
)


WIDE = Console(width=1000)


def printed(bench: BenchResult) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for part in bench_tables(bench):
            console.print(part)
    return capture.get()


def test_tables() -> None:
    text = printed(USUAL)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "17.0 GiB, 48 layers), qwen routes, forced; prompt of 32 tokens, then 100, 1 rounds" in text
    for fact in ("A Processor", "2 cores", "serial 42", "abc1234", "2026-11-25"):
        assert fact in text
    assert "mmap 0.5 0.5 to 0.5 0.5 to 0.5 - 8 6 s 2 s - 0.1" in lines
    assert "all 10 10 to 10 10 to 10 10 8 6 s 2 s 20 2" in lines
    assert "all 1000 B 75.0% 10 B 9 B 50.0% 25.0% 20.0% - 0.8 0.5 waiting DIFFER" in lines
    assert "plain 1000 B 75.0% 10 B 9 B 50.0% 25.0% 20.0% - 0.4 0.25 waiting DIFFER" not in lines
    assert "all 4 s 4.88 KiB 1.5 s 1.5 s 1 s 0.5 compute" in lines
    assert "mmap 4 s 4.88 KiB 1.5 s - - 0.5 -" in lines
    assert "all 4 s 4.88 KiB - 1.5 s - - -" in lines  # without a roofline
    assert any(
        line.startswith("roofline: 20.00 tok/s at Belady's misses (70.0% hits), 12.50 at LRU's") for line in lines
    )
    assert "roofline of the prompt: 2 s, compute 1.5 s, disk 2 s for one pass over its experts" in lines
    assert any("1 x MMAP 0.5, 2 x NONE -" in line for line in lines)
    assert "mmap: the kernel killed it" in lines
    assert "routes: overlap at lag 1 0.38, distinct experts 0.50" in lines
    assert "statistics that differ by more than 0.05 from the trace they were fitted to: overlap at lag 2" in lines


def test_tables_are_not_wide() -> None:
    tables = [part for part in bench_tables(USUAL) if isinstance(part, Table)]
    assert len(tables) == 6 and all(Measurement.get(WIDE, WIDE.options, table).maximum <= 140 for table in tables)


def test_rows(tmp_path: Path) -> None:
    rows = list(bench_rows(USUAL))
    assert [(row["label"], row["arm"]) for row in rows] == [
        ("4x", "mmap"), ("4x", "plain"), ("4x", "all"), ("8x", "mmap"), ("8x", "all"),
    ]  # fmt: skip
    assert rows[2]["of_belady"] == pytest.approx(0.5) and rows[2]["roofline_belady_s"] == 0.05
    assert (rows[2]["prompt_wait_s"], rows[2]["prompt_other_s"], rows[2]["prompt_eaten_by"]) == (1.5, 1.0, "compute")
    assert (rows[2]["roofline_prompt_compute_s"], rows[2]["roofline_prompt_pass_s"]) == (1.5, 2.0)
    assert rows[3]["failures"] == "the kernel killed it" and rows[4]["roofline_bound"] is None
    save_csv(USUAL, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == FIELDS and len(written) == 5
    assert float(written[2]["tokens_per_s"]) == pytest.approx(10) and written[3]["tokens_per_s"] == ""


def test_the_document_is_json() -> None:
    document = json.loads(json.dumps(USUAL.document()))
    assert document["benchmark"] == "bench" and document["commit"] == "abc1234" and document["routing"] == "qwen"
    first, second = document["cells"]
    assert first["roofline"]["belady_s"] == 0.05 and first["roofline"]["bound"] == "disk" and second["roofline"] is None
    assert first["roofline"]["prompt_pass_s"] == 2.0 and first["figures"][2]["prompt_eaten_by"] == "compute"
    assert first["runs"][2]["prompt_wait_s"] == 1.5 and first["runs"][0]["prompt_wait_s"] is None
    assert len(first["runs"][1]["token_s"]) == 100 and "checksums" not in first["runs"][1]
    assert [figures["arm"] for figures in first["figures"]] == ["mmap", "plain", "all"]


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    save_plots(USUAL, folder)
    assert {path.name for path in folder.iterdir()} == {"speed.png", "tokens.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_pictures_of_nothing_but_failures(tmp_path: Path) -> None:
    save_plots(result(cell("8x", None, Run("mmap", failure="killed"))), tmp_path)
    assert (tmp_path / "speed.png").stat().st_size > 0
