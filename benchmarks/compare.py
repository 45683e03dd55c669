"""Measures edgemoe beside plain llama.cpp: load time, decode speed, the floor, and the memory budget.

    python -m benchmarks.compare load model.gguf

Lines for people go to standard error, the last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.measurements import (
    MIB,
    compare_decode,
    compare_load,
    run_floor,
    run_in_cgroup,
    say,
    show_memory,
)
from edgemoe.bench_arm import ArmError, Settings, ask_plan
from edgemoe.bench_machine import describe
from edgemoe.memory_cgroup import CgroupUnavailableError


class Size(click.ParamType):
    """A size as `--ram` of edgemoe reads it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from edgemoe.errors import BudgetError
        from edgemoe.memory import parse_size

        try:
            return parse_size(str(value))
        except BudgetError as error:
            self.fail(str(error), param, ctx)


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every measurement takes."""
    cores = len(os.sched_getaffinity(0))
    for decorate in (
        click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here."),
        click.option("--threads", type=int, default=cores, show_default="all cores"),
        click.option("--ubatch", type=int, default=512, show_default=True),
        click.option("--ctx", type=int, default=1536, show_default=True),
        click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    ):
        command = decorate(command)
    return command


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@shared_options
@click.option("--pairs", type=int, default=5, show_default=True)
@click.option("--ram", type=Size(), help="Budget of edgemoe; everything fits if not given.")
def load(model: Path, ctx: int, ubatch: int, threads: int, out: Path | None, pairs: int, ram: int | None) -> None:
    """Time from the start of a process to a ready context, cold page cache."""
    settings, budgets = _settings(model, ctx, ubatch, threads)
    settings = settings.within(ram or budgets["everything"])
    _finish("load", settings, compare_load(settings, pairs), out)


@main.command()
@shared_options
@click.option("--pairs", type=int, default=12, show_default=True)
@click.option("--tokens", type=int, default=64, show_default=True, help="Decoded tokens of each arm in a pair.")
def decode(model: Path, ctx: int, ubatch: int, threads: int, out: Path | None, pairs: int, tokens: int) -> None:
    """Decode speed with everything in memory, both arms warm and taking turns."""
    if 16 + pairs * tokens > ctx:
        raise click.UsageError(f"{pairs} pairs of {tokens} tokens need --ctx {16 + pairs * tokens}")
    settings, budgets = _settings(model, ctx, ubatch, threads)
    settings = settings.within(budgets["everything"])
    _finish("decode", settings, compare_decode(settings, pairs, tokens), out)


@main.command()
@shared_options
@click.option("--tokens", type=int, default=1000, show_default=True)
@click.option("--ram", type=Size(), help="Budget; the smallest that works if not given.")
def floor(model: Path, ctx: int, ubatch: int, threads: int, out: Path | None, tokens: int, ram: int | None) -> None:
    """A long answer within the smallest budget: speed and memory of each fifth."""
    if 16 + tokens > ctx:
        raise click.UsageError(f"{tokens} tokens need --ctx {16 + tokens}")
    settings, budgets = _settings(model, ctx, ubatch, threads)
    settings = settings.within(ram or _floor(budgets))
    _finish("floor", settings, run_floor(settings, tokens), out)


@main.command()
@shared_options
@click.option("--prompt", type=int, default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--tokens", type=int, default=32, show_default=True, help="Decoded tokens.")
@click.option("--ram", type=Size(), multiple=True, help="Budgets; 5 from the floor to everything if not given.")
@click.option(
    "--slack", type=Size(), help="Limit of the cgroup above the budget, to see by how much a peak exceeds it."
)
def memory(
    model: Path,
    ctx: int,
    ubatch: int,
    threads: int,
    out: Path | None,
    prompt: int,
    tokens: int,
    ram: tuple[int, ...],
    slack: int | None,
) -> None:
    """Peak memory of runs inside a memory cgroup whose limit is the budget."""
    settings, budgets = _settings(model, ctx, ubatch, threads)
    if not ram:
        low, high = _floor(budgets), budgets["everything"]
        ram = tuple(round(low * (high / low) ** (step / 4)) for step in range(5))
    runs = []
    for budget in ram:
        run = run_in_cgroup(settings.within(budget), prompt, tokens, slack or 0)
        show_memory(run)
        runs.append(run)
    _finish("memory", settings, {"budgets": budgets, "runs": runs}, out)


def _settings(model: Path, ctx: int, ubatch: int, threads: int) -> tuple[Settings, dict[str, int]]:
    settings = Settings(str(model.resolve()), n_ctx=ctx, n_ubatch=ubatch, n_threads=threads)
    return settings, ask_plan(settings)


def _floor(budgets: dict[str, int]) -> int:
    # Python's own size, which is part of the floor, differs a little from process to process.
    return -(-budgets["floor"] // MIB) * MIB + MIB


def _finish(benchmark: str, settings: Settings, result: dict[str, Any], out: Path | None) -> None:
    shape = {"n_ctx": settings.n_ctx, "n_ubatch": settings.n_ubatch, "n_threads": settings.n_threads}
    if settings.ram is not None:
        shape["ram"] = settings.ram
    record = {"benchmark": benchmark, **describe(Path(settings.model)), "settings": shape, **result}
    click.echo(json.dumps(record))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ArmError, CgroupUnavailableError) as error:
        say(f"error: {error}")
        raise SystemExit(1) from None
