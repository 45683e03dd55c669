"""A bench as tables for people, rows for spreadsheets, and pictures."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from edgemoe.atomic_file import atomic_file
from edgemoe.bench import BenchResult, CellResult
from edgemoe.bench_figures import Figures
from edgemoe.bench_roofline import Roofline
from edgemoe.figures import new_figure, plain_frame, save_figure
from edgemoe.memory import format_bytes
from edgemoe.route_statistics import TOLERANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FIELDS", "bench_rows", "bench_tables", "save_csv", "save_plots"]

_CELL_FIELDS = ("label", "ratio", "ram", "arena_bytes", "n_ubatch", "in_cgroup")
_FIGURES = (
    "arm",
    "n_tokens",
    "tokens_per_s",
    "slow_tokens_per_s",
    "fast_tokens_per_s",
    "mean_s",
    "first_tokens_per_s",
    "prompt_tokens_per_s",
    "first_token_s",
    "load_s",
    "warm_s",
    "bytes_per_token",
    "prompt_bytes",
    "prompt_s",
    "prompt_wait_s",
    "prompt_other_s",
    "hit_rate",
    "peak",
    "peak_rss",
    "wait_share",
    "busy_share",
    "system_share",
    "stolen_share",
    "of_lru",
    "of_belady",
    "of_prompt",
    "eaten_by",
    "prompt_eaten_by",
    "to_mmap",
    "to_plain",
    "same_logits",
)
_ROOFLINE = (
    "compute_s",
    "lru_s",
    "belady_s",
    "lru_bytes",
    "belady_bytes",
    "lru_hit_rate",
    "belady_hit_rate",
    "bytes_per_s",
    "bound",
    "prompt_compute_s",
    "prompt_pass_s",
    "prompt_s",
)
_ABOUT = ("date", "commit", "cpu", "cores", "kernel", "disk", "disk_bytes_per_s")
FIELDS = (
    *_ABOUT,
    "model",
    "routing",
    *_CELL_FIELDS,
    *_FIGURES,
    *(f"roofline_{name}" for name in _ROOFLINE),
    "failures",
)
"""Columns of the CSV: seconds, bytes, tokens per second, shares from 0 to 1."""


def bench_rows(result: BenchResult) -> Iterator[dict[str, Any]]:
    """Give one row for each budget and arm."""
    about = {name: result.about[name] for name in _ABOUT} | {"model": result.about["model"]["name"]}
    for cell in result.cells:
        for figures in cell.figures:
            row = about | {"routing": result.routing}
            row |= {name: getattr(cell, name) for name in _CELL_FIELDS}
            row |= {name: getattr(figures, name) for name in _FIGURES}
            row |= {f"roofline_{name}": cell.roofline and getattr(cell.roofline, name) for name in _ROOFLINE}
            yield row | {"failures": "; ".join(figures.failures)}


def save_csv(result: BenchResult, path: Path) -> None:
    """Write `bench_rows` to a file.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows(bench_rows(result))
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def bench_tables(result: BenchResult) -> Iterator[RenderableType]:
    """Lay out what was measured at each budget, after a line that says on what."""
    about = result.about
    model = about["model"]
    routing = f"{result.routing} routes, {'forced' if result.forced else 'chosen by the model'}"
    yield Text(
        f"{model['name']} ({format_bytes(model['file_bytes'])}, {model['n_layer']} layers), {routing}; prompt of"
        f" {result.n_prompt} tokens, then {result.n_decode}, {result.rounds} rounds\n"
        f"{_machine(result)}"
    )
    if result.statistics:
        shares = ", ".join(f"{name} {value:.2f}" for name, value in result.statistics.items())
        yield Text(f"routes: {shares}")
    if result.departures is not None:
        found = "; ".join(result.departures) or "none"
        yield Text(f"statistics that differ by more than {TOLERANCE} from the trace they were fitted to: {found}")
    for cell in result.cells:
        yield Text(_head(cell), style="bold")
        yield _speeds(cell.figures)
        yield _costs(cell.figures)
        yield _prompts(cell.figures, cell.roofline)
        yield from map(Text, _remarks(cell))


def _machine(result: BenchResult) -> str:
    about = result.about
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['kernel']}, disk {about['disk']},"
        f" edgemoe {about['commit']}, {about['date']}"
    )


def _head(cell: CellResult) -> str:
    limit = "in a memory cgroup of that size" if cell.in_cgroup else "without a memory cgroup"
    if cell.label == "fits":
        limit = "everything fits"
    return (
        f"{cell.label}: {format_bytes(cell.ram)}, the model is {cell.ratio:.2f} times that; {limit};"
        f" {format_bytes(cell.arena_bytes)} for experts, n_ubatch {cell.n_ubatch}"
    )


def _speeds(arms: Sequence[Figures]) -> Table:
    table = _table(
        "arm", "tok/s", "p10 to p90", "rounds", "first 64", "prompt tok/s", "first token", "load", "x mmap", "x plain"
    )
    for arm in arms:
        table.add_row(
            arm.arm,
            _number(arm.tokens_per_s),
            f"{_number(arm.slow_tokens_per_s)} to {_number(arm.fast_tokens_per_s)}",
            f"{_number(min(arm.round_tokens_per_s, default=None))} to"
            f" {_number(max(arm.round_tokens_per_s, default=None))}",
            _number(arm.first_tokens_per_s),
            _number(arm.prompt_tokens_per_s),
            _number(arm.first_token_s, " s"),
            _number(arm.load_s, " s"),
            _number(arm.to_mmap),
            _number(arm.to_plain),
        )
    return table


def _costs(arms: Sequence[Figures]) -> Table:
    table = _table(
        "arm",
        "read/token",
        "hits",
        "peak",
        "VmHWM",
        "waiting",
        "disk busy",
        "kernel",
        "stolen",
        "of LRU's",
        "of Belady's",
        "eaten by",
        "logits",
    )
    for arm in arms:
        table.add_row(
            arm.arm,
            _bytes(arm.bytes_per_token),
            _share(arm.hit_rate),
            _bytes(arm.peak),
            _bytes(arm.peak_rss),
            _share(arm.wait_share),
            _share(arm.busy_share),
            _share(arm.system_share),
            _share(arm.stolen_share),
            _number(arm.of_lru),
            _number(arm.of_belady),
            arm.eaten_by or "-",
            {None: "-", True: "same", False: "DIFFER"}[arm.same_logits],
        )
    return table


def _prompts(arms: Sequence[Figures], roofline: Roofline | None) -> Table:
    table = _table("arm", "prompt", "read", "computing", "waiting", "other", "of roofline", "eaten by")
    for arm in arms:
        table.add_row(
            arm.arm,
            _number(arm.prompt_s, " s"),
            _bytes(arm.prompt_bytes),
            _number(roofline.prompt_compute_s if roofline else None, " s"),
            _number(arm.prompt_wait_s, " s"),
            _number(arm.prompt_other_s, " s"),
            _number(arm.of_prompt),
            arm.prompt_eaten_by or "-",
        )
    return table


def _remarks(cell: CellResult) -> Iterator[str]:
    roofline = cell.roofline
    if roofline is not None:
        source = {"resident": "with every expert in memory", "plain": "less its waiting, of edgemoe's arms"}
        yield (
            f"roofline: {1 / roofline.belady_s:.2f} tok/s at Belady's misses ({roofline.belady_hit_rate:.1%} hits),"
            f" {1 / roofline.lru_s:.2f} at LRU's ({roofline.lru_hit_rate:.1%}); bound by {roofline.bound}:"
            f" compute {roofline.compute_s:.3f} s a token ({source[cell.compute_from]}),"
            f" disk {roofline.belady_bytes / roofline.bytes_per_s:.3f} s at {roofline.bytes_per_s / 1e9:.2f} GB/s"
        )
        yield (
            f"roofline of the prompt: {_number(roofline.prompt_s)} s, compute {_number(roofline.prompt_compute_s)} s,"
            f" disk {_number(roofline.prompt_pass_s)} s for one pass over its experts"
        )
    mmap = next((arm for arm in cell.figures if arm.arm == "mmap"), None)
    if mmap is not None:
        tried = ", ".join(
            f"{trial.n_threads} x {trial.load_mode} {_number(trial.tokens_per_s)}" for trial in cell.trials
        )
        yield f"llama.cpp, threads x load mode, tok/s in a trial: {tried}"
    for arm in cell.figures:
        yield from (f"{arm.arm}: {failure}" for failure in dict.fromkeys(arm.failures))


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("arm", "eaten by", "logits") else "right", no_wrap=True)
    return table


def _number(value: float | None, unit: str = "") -> str:
    """Three digits that matter."""
    if value is None:
        return "-"
    return f"{value:.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else format_bytes(round(value))


def save_plots(result: BenchResult, folder: Path) -> None:
    """Draw ``speed.png``, the arms' speeds below the rooflines, and ``tokens.png``, how long each token took.

    Parameters
    ----------
    result : BenchResult
        With one cell at least.
    folder : Path
        Made if it is not there.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("speed.png", _draw_speeds), ("tokens.png", _draw_tokens)):
        save_figure(draw(result), folder / name)


_COLOURS = {
    "mmap": "#8a8a8a",
    "plain": "#8a6d00",
    "blind": "#7a3fa0",
    "lru": "#00838f",
    "all": "#0b4fa0",
    "auto": "#2e8b3d",
    "task": "#d06000",
}


def _draw_speeds(result: BenchResult) -> Figure:
    """Decode speeds with p10 and p90, one group for each budget; Belady's and LRU's rooflines above them.

    Points, since the axis has no zero: what is three times as long on it is more than three times as fast.
    """
    arms = list(dict.fromkeys(figures.arm for cell in result.cells for figures in cell.figures))
    width = 0.8 / len(arms)
    figure = new_figure(max(6.0, 1.5 + 2.2 * len(result.cells)), 5.2)
    axes = figure.add_subplot()
    for place, cell in enumerate(result.cells):
        for figures in cell.figures:
            if figures.tokens_per_s is None:
                continue
            low, high = figures.slow_tokens_per_s or 0.0, figures.fast_tokens_per_s or 0.0
            at = place - 0.4 + width * (arms.index(figures.arm) + 0.5)
            axes.vlines(at, low, high, color=_COLOURS[figures.arm], linewidth=3, alpha=0.4)
            axes.plot(at, figures.tokens_per_s, "o", color=_COLOURS[figures.arm])
            axes.annotate(
                _number(figures.tokens_per_s),
                (at, high),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # a roofline may pass behind it
            )
        if cell.roofline is not None:
            for seconds, dashes in ((cell.roofline.belady_s, "-"), (cell.roofline.lru_s, ":")):
                axes.hlines(1 / seconds, place - 0.42, place + 0.42, color="#b00020", linestyle=dashes, linewidth=1.5)
    if any(figures.tokens_per_s for cell in result.cells for figures in cell.figures):
        _logarithmic(axes)
    axes.set_xticks(range(len(result.cells)), [cell.label for cell in result.cells])
    axes.set_xlabel("memory, or the model's size over it")
    axes.set_ylabel("tokens per second, median (lines: p10 to p90)")
    for arm in arms:
        axes.plot([], [], "o", color=_COLOURS[arm], label=arm)
    for label, dashes in (("roofline, Belady", "-"), ("roofline, LRU", ":")):
        axes.plot([], [], color="#b00020", linestyle=dashes, label=label)
    _finish(axes, result)
    figure.supxlabel(textwrap.fill(_machine(result), 100), fontsize=7, color="0.4")
    return figure


def _draw_tokens(result: BenchResult) -> Figure:
    """Seconds of each decoded token, median over rounds, one panel for each budget."""
    n_cells = len(result.cells)
    figure = new_figure(9.5, 1.0 + 2.6 * n_cells)
    for place, cell in enumerate(result.cells):
        axes = figure.add_subplot(n_cells, 1, place + 1)
        for arm in dict.fromkeys(run.arm for run in cell.runs):
            rounds = [run.token_s for run in cell.runs if run.arm == arm and run.token_s]
            middle = [median(seconds) for seconds in zip(*rounds, strict=False)]
            axes.plot(range(1, len(middle) + 1), middle, color=_COLOURS[arm], linewidth=0.9, label=arm)
        if any(run.token_s for run in cell.runs):
            _logarithmic(axes)
        axes.set_ylabel(f"{cell.label}: seconds")
        if place == n_cells - 1:
            axes.set_xlabel("token after the prompt")
        _finish(axes, result if place == 0 else None)
    figure.supxlabel(textwrap.fill(_machine(result), 100), fontsize=7, color="0.4")
    return figure


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # which of them have room is its decision

    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(PlainNumbers(minor_thresholds=(2, 0.5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _finish(axes: Axes, result: BenchResult | None) -> None:
    """Title, legend and frame."""
    if result is not None:
        axes.set_title(f"{result.about['model']['name']}, {result.routing} routes", loc="left", fontsize=11)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plain_frame(axes, "y")
