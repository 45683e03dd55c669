"""Results of an evaluation as a table for people, rows for spreadsheets and JSON, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from edgemoe.arms import ALL_TASKS, FULL, NEAREST, OWN, RANDOM, WEIGHTS, WRONG, Arm
from edgemoe.evaluation import Result, Summary
from edgemoe.figures import new_figure, plain_frame, save_figure
from edgemoe.quality import ALLOCATIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FIELDS", "row", "save_plot", "summary_row", "summary_table", "task_table"]

FIELDS = (
    "task",
    "arm",
    "set_of",
    "allocation",
    "criterion",
    "keep",
    "mean_kept",
    "fewest_kept",
    "most_kept",
    "seeds",
    "tokens",
    "windows",
    "perplexity",
    "full_perplexity",
    "perplexity_change",
    "loss",
    "loss_standard_error",
    "kl",
    "top1_agreement",
)
"""Columns of the CSV file and keys of a row of JSON: losses in nats per token, changes and agreement as shares."""


def row(result: Result) -> dict[str, Any]:
    """Give one result as plain values, keys as in `FIELDS`."""
    arm, figures = result.arm, result.figures
    sizes = [size for chosen in arm.sets for size in chosen.sizes]
    values = (
        result.task,
        arm.name,
        arm.task,
        arm.allocation,
        arm.criterion,
        arm.keep,
        round(arm.mean_kept, 4),
        min(sizes),
        max(sizes),
        len(arm.sets),
        int(figures.tokens.sum()) // len(arm.sets),
        len(figures.tokens),
        figures.perplexity,
        figures.full_perplexity,
        figures.perplexity_change,
        figures.loss,
        figures.standard_error,
        figures.kl,
        figures.top1_agreement,
    )
    return dict(zip(FIELDS, values, strict=True))


def summary_row(summary: Summary) -> dict[str, Any]:
    """Give one arm's means over tasks as plain values."""
    return {
        "arm": summary.arm.name,
        "allocation": summary.arm.allocation,
        "criterion": summary.arm.criterion,
        "keep": summary.arm.keep,
        "mean_kept": round(summary.mean_kept, 4),
        "perplexity_change": summary.perplexity_change,
        "loss": summary.loss,
        "loss_standard_error": summary.standard_error,
        "kl": summary.kl,
        "top1_agreement": summary.top1_agreement,
        "worst_task": summary.worst_task,
        "worst_perplexity_change": math.expm1(summary.worst_loss),
    }


def summary_table(summaries: Sequence[Summary]) -> Table:
    """Lay out one line for each arm and number of experts, means over tasks."""
    table = _table("keep", "set", "spread", "perplexity", "±", "KL", "top-1", "worst task")
    for before, summary in zip([None, *summaries], summaries, strict=False):
        arm = summary.arm
        _new_section(table, before.arm if before else None, arm)
        table.add_row(
            str(arm.keep),
            _name(arm),
            arm.allocation,
            _change(summary.loss),
            _error(summary.loss, summary.standard_error),
            f"{summary.kl:.3f}",
            f"{summary.top1_agreement:.1%}",
            "" if arm.name == FULL else f"{summary.worst_task} {_change(summary.worst_loss)}",
        )
    return table


def task_table(results: Sequence[Result]) -> Table:
    """Lay out one line for each arm and number of experts on one task's text."""
    table = _table("keep", "set", "spread", "perplexity", "change", "±", "KL", "top-1")
    table.title = f"text of {results[0].task}"
    table.title_justify = "left"
    for before, result in zip([None, *results], results, strict=False):
        figures, arm = result.figures, result.arm
        _new_section(table, before.arm if before else None, arm)
        table.add_row(
            str(arm.keep),
            _name(arm) if arm.task in ("", result.task) else f"{arm.name}: {arm.task}",
            arm.allocation,
            f"{figures.perplexity:.2f}",
            _change(figures.loss),
            _error(figures.loss, figures.standard_error),
            f"{figures.kl:.3f}",
            f"{figures.top1_agreement:.1%}",
        )
    return table


def save_plot(summaries: Sequence[Summary], n_expert: int, title: str, path: Path) -> None:
    """Draw what the main arms cost against the number of experts kept.

    Parameters
    ----------
    summaries : sequence of Summary
        All; sets by other criteria are left out.
    n_expert : int
        Experts of a whole layer.
    title : str
        Above the picture.
    path : Path
        PNG file to write.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines = _lines(summaries)
    figure = new_figure(9.5, 5.6)
    axes = figure.add_subplot()
    for (name, allocation), points in lines.items():
        kept, costs = zip(*points, strict=True)
        axes.plot(kept, costs, color=_COLOURS[name], linestyle=_DASHES[allocation], marker="o", markersize=4)
    changes = [change for points in lines.values() for _, change in points]
    # Logarithmic above 1 %, linear below, so that no cost at all has its place on the axis.
    axes.set_yscale("symlog", linthresh=1.0, linscale=0.5)
    # Above the highest line there is room for the names, which are moved upwards where lines end close together.
    axes.set_ylim(min([0.0, *changes]) * 1.2, max([2.0, *changes]) * 2 ** (len(lines) / 2))
    axes.yaxis.set_major_locator(FixedLocator([-1, 0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+,.0f} %" if value else "full model"))
    sizes = sorted({summary.arm.keep for summary in summaries})
    axes.set_xscale("log", base=2)
    # Room for the names of the lines.
    axes.set_xlim(sizes[0] * (sizes[0] / n_expert) ** 0.36, n_expert * 1.03)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"experts kept per layer, of {n_expert}, mean over layers")
    axes.set_ylabel("change of perplexity")
    axes.set_title(title, loc="left", fontsize=11)
    plain_frame(axes, "both")
    _label(axes, lines)
    save_figure(figure, path)


_COLOURS = {
    OWN: "#0b4fa0",
    NEAREST: "#2e8b3d",
    WRONG: "#d06000",
    ALL_TASKS: "#8a6d00",
    RANDOM: "#b00020",
}
_DASHES = {"measured": "-", "mass": "-.", "uniform": ":"}
"""Whose experts they are tells the colour, how they are spread over the layers the dashes."""


def _lines(summaries: Sequence[Summary]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Points (experts kept, change in per cent) by arm and allocation, ascending; the full model ends every line.

    The task's own set has a line for each allocation, its rivals have one for the best.
    """
    own = [summary.arm for summary in summaries if summary.arm.name == OWN]
    main = own[0].criterion if own else ""  # its other criteria come after it
    best = next((name for name in ALLOCATIONS if any(arm.allocation == name for arm in own)), "")
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for summary in summaries:
        arm = summary.arm
        if arm.name in _COLOURS and (arm.criterion == main if arm.name == OWN else arm.allocation == best):
            lines.setdefault((arm.name, arm.allocation), []).append((arm.keep, 100 * summary.perplexity_change))
    whole = [(summary.arm.keep, 0.0) for summary in summaries if summary.arm.name == FULL]
    return {name: sorted([*points, *whole]) for name, points in lines.items()}


def _label(axes: Axes, lines: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    """Write each line's name at its left end, far enough from its neighbours."""
    ends = sorted((points[0][1], points[0][0], name) for name, points in lines.items())
    transform = axes.transData
    axes.figure.canvas.draw()
    point = axes.figure.dpi / 72
    lowest = -math.inf
    for change, kept, name in ends:
        _, y = transform.transform((kept, change))
        lowest = max(y, lowest + 11.5 * point)
        axes.annotate(
            ", ".join(name),
            (kept, change),
            xytext=(-10, (lowest - y) / point),
            textcoords="offset points",
            ha="right",
            va="center",
            color=_COLOURS[name[0]],
            fontsize=9,
            annotation_clip=False,
        )


def _table(*columns: str) -> Table:
    """Start a table that fits 80 columns; the last one is broken first where there are fewer."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in columns:
        words = column in ("set", "spread", "worst task")
        table.add_column(column, justify="left" if words else "right", no_wrap=column != columns[-1])
    return table


def _name(arm: Arm) -> str:
    return f"{arm.name} ({arm.criterion})" if arm.name in (OWN, WEIGHTS) else arm.name


def _error(loss: float, standard_error: float | None) -> str:
    """Give the standard error of the change in per cent."""
    return "" if standard_error is None else f"{100 * standard_error * math.exp(loss):.1f}"


def _new_section(table: Table, before: Arm | None, now: Arm) -> None:
    """Leave an empty line where the number of experts changes."""
    if before is not None and before.keep != now.keep:
        table.add_row()


def _change(loss: float) -> str:
    """Change of perplexity in per cent: two digits are what the text can tell."""
    percent = 100 * math.expm1(loss)
    return f"{percent:+.1f} %" if abs(percent) < 100 else f"{percent:+,.0f} %"
