"""``edgemoe bench``: edgemoe beside plain llama.cpp in one run, at several ratios of model and memory."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.bench_arm import ARMS, USUAL_ARMS
from edgemoe.cli import options


def _arms(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    arms = list(dict.fromkeys(value.split(",")))
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(ARMS)}.", ctx, param)
    return arms


ARMS_OPTION = click.option(
    "--arms",
    metavar="LIST",
    default=",".join(USUAL_ARMS),
    show_default=True,
    callback=_arms,
    help=f"Of {', '.join(ARMS)}.",
)
"""Also of `benchmarks.speed`."""


@click.command("bench")
@options.MODEL
@click.option(
    "--ram",
    "budgets",
    metavar="SIZE",
    multiple=True,
    default=["auto"],
    show_default=True,
    help="Memory: 6GiB, 50%, auto; 4x, the model's size over the memory; fits. May be repeated.",
)
@click.option(
    "--routes",
    "routing",
    metavar="KIND",
    default="natural",
    show_default=True,
    help="natural; or forced in every arm: fitted, uniform, switch, or a trace.csv[.gz].",
)
@click.option(
    "--recall",
    metavar="R",
    type=click.FloatRange(0, 1),
    help="With forced routes: tell look-ahead this share of the next experts rightly.  [default: it asks the routers]",
)
@ARMS_OPTION
@click.option("--tokens", metavar="N", type=click.IntRange(1, 2**20), default=256, show_default=True, help="Decoded.")
@click.option("--prompt", metavar="N", type=click.IntRange(1, 2**20), default=512, show_default=True, help="Before.")
@click.option(
    "--rounds", metavar="N", type=click.IntRange(1, 100), default=3, show_default=True, help="Cold starts of each arm."
)
@options.THREADS
@click.option("--csv", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Also write figures here.")
@click.option(
    "--plot", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), help="Also draw pictures there."
)
@click.option("--json", is_flag=True, help="Print one line of JSON on standard output, with every token's time.")
def command(
    model: Path,
    budgets: tuple[str, ...],
    routing: str,
    recall: float | None,
    arms: list[str],
    tokens: int,
    prompt: int,
    rounds: int,
    threads: int | None,
    csv: Path | None,
    plot: Path | None,
    json: bool,
) -> None:
    """Measure edgemoe beside plain llama.cpp, in one run.

    Every arm is a process of its own that starts with a cold page cache, in a memory cgroup of the size of --ram where
    one can be made (usually as root): mmap is plain llama.cpp at its best number of threads and way to load, plain is
    edgemoe without its tricks, blind without look-ahead alone, in lru the least recently used leaves, all is edgemoe,
    auto has the experts of the prompt's pattern in memory first, task uses these alone. All evaluate the same tokens
    with the same experts.

    Nothing else should run on the machine.
    """
    from edgemoe.bench import run_bench
    from edgemoe.bench_report import bench_tables, save_csv, save_plots
    from edgemoe.cli import ui
    from edgemoe.figures import NO_MATPLOTLIB, can_plot
    from edgemoe.threads import default_threads

    if csv is not None and not csv.parent.is_dir():
        raise click.BadParameter(f"{csv} cannot be written; give a file in an existing folder.", param_hint="--csv")
    if plot is not None and not can_plot():
        raise click.BadParameter(NO_MATPLOTLIB, param_hint="--plot")
    threads = threads or default_threads()
    result = run_bench(model, budgets, routing, arms, prompt, tokens, rounds, threads, recall, ui.note)
    if csv is not None:
        save_csv(result, csv)
    if plot is not None:
        save_plots(result, plot)
    if json:
        ui.show_json(result.document(), indent=None)
    else:
        ui.show(ui.out(), *bench_tables(result))
