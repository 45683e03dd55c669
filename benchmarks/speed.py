"""Measures edgemoe beside plain llama.cpp where the model is larger than the memory, for four kinds of routing.

    python -m benchmarks.speed

writes a synthetic model to a temporary folder, benches it (`edgemoe bench`) with everything in memory and at 2, 4 and 8
times the memory, with its experts forced by a real trace, by the generator fitted to it and by two adversaries, and
removes the model. Each kind of routing gets a folder in benchmarks/results/ with JSON, CSV and pictures. It takes
hours, most of them for llama.cpp; it needs root for memory cgroups, and a machine with nothing else to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.measurements import say
from benchmarks.synthetic_model import SHAPES, write_synthetic_model
from edgemoe.bench import run_bench
from edgemoe.bench_report import bench_tables, save_csv, save_plots
from edgemoe.cli import ui
from edgemoe.cli.bench import ARMS_OPTION
from edgemoe.errors import EdgemoeError

HERE = Path(__file__).resolve().parent
ROUTINGS = {
    "qwen": str(HERE / "routes" / "qwen.route.csv.gz"),
    "fitted": "fitted",
    "uniform": "uniform",
    "switch": "switch",
}


@contextlib.contextmanager
def model_of(shape: str, layers: int | None, folder: Path | None) -> Iterator[Path]:
    """A synthetic model that is there for a while."""
    with tempfile.TemporaryDirectory(prefix="edgemoe-speed-", dir=folder) as scratch:
        path = Path(scratch) / f"{shape}.gguf"
        say(f"writing {path}")
        write_synthetic_model(path, shape, n_layer=layers)
        yield path


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="qwen3-30b-a3b", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Depth, to suit the disk; the real one if not given.")
@click.option("--model", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A model that is there.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="For the model.")
@click.option("--ram", "budgets", multiple=True, default=["fits", "2x", "4x", "8x"], show_default=True)
@click.option("--routes", "routings", multiple=True, type=click.Choice(list(ROUTINGS)), default=list(ROUTINGS))
@ARMS_OPTION
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--prompt", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--threads", type=int, default=len(os.sched_getaffinity(0)), show_default="all cores")
@click.option("--recall", type=click.FloatRange(0, 1), default=0.8, show_default=True, help="Of emulated look-ahead.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=HERE / "results")
def main(
    shape: str,
    layers: int | None,
    model: Path | None,
    folder: Path | None,
    budgets: tuple[str, ...],
    routings: tuple[str, ...],
    arms: list[str],
    rounds: int,
    tokens: int,
    prompt: int,
    threads: int,
    recall: float,
    out: Path,
) -> None:
    with contextlib.nullcontext(model) if model else model_of(shape, layers, folder) as path:
        for routing in routings:
            say(f"{routing} routes")
            result = run_bench(path, budgets, ROUTINGS[routing], arms, prompt, tokens, rounds, threads, recall, say)
            into = out / f"speed-{path.stem}-{routing}"
            save_plots(result, into)
            save_csv(result, into / "bench.csv")
            (into / "bench.json").write_text(json.dumps(result.document()) + "\n")
            ui.show(ui.out(), *bench_tables(result))


if __name__ == "__main__":
    try:
        main()
    except EdgemoeError as error:
        say(f"error: {error}")
        raise SystemExit(1) from None
