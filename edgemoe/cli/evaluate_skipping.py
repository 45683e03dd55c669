"""``edgemoe evaluate --skip-mass``: what leaving out low-weight misses costs, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from edgemoe.skip_cost import SkipCost


def parse_bounds(text: str) -> list[float]:
    """Read ``P,P``: shares of the router's weights, ascending."""
    from edgemoe.backend import MOST_SKIPPED

    try:
        bounds = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise click.BadParameter(f"{text} is not a list of numbers.", param_hint="--skip-mass") from None
    for bound in bounds:
        if not 0 < bound <= MOST_SKIPPED:
            raise click.BadParameter(
                f"{bound} is no share of router mass; give more than 0 and at most {MOST_SKIPPED}.",
                param_hint="--skip-mass",
            )
    return bounds


def evaluate_skipping(
    model: Path,
    text: Path,
    bounds: Sequence[float],
    tokens: int,
    window: int,
    ram: str,
    threads: int | None,
    io: str,
    quiet: bool,
    json: bool,
) -> None:
    """Measure the bounds on all text of a folder, beside the exact model."""
    from edgemoe.cli import task_ui, ui
    from edgemoe.documents import read_documents
    from edgemoe.evaluation import begin_of_text, cut_windows, held_out_tokens
    from edgemoe.skip_cost import measure_skipping

    with ui.Loading(shown=not quiet) as loading:
        llama = options.open_for_text(model, ram, window, threads, io, (), loading.progress, logits_all=False)
    with llama:
        read = held_out_tokens(llama, read_documents([text]))
        windows = cut_windows(read, max(1, tokens // window), window, begin_of_text(llama))
        arms = [0.0, *bounds]
        with task_ui.Steps(shown=not quiet) as steps, steps.step("decoding") as progress:
            done = 0

            def advance() -> None:
                nonlocal done
                done += 1
                progress(done, len(windows) * len(arms))

            costs = measure_skipping(llama, windows, arms, advance)
    if json:
        ui.show_json({"model": llama.index.name, "rows": [_row(cost, costs[0]) for cost in costs]})
    else:
        ui.show(ui.out(), _table(costs))


def _row(cost: SkipCost, exact: SkipCost) -> dict[str, Any]:
    return {
        "skip_mass": cost.skip_mass,
        "tokens": int(cost.tokens.sum()),
        "perplexity": cost.perplexity,
        "perplexity_change": cost.perplexity_change(exact),
        "standard_error": cost.standard_error(exact),
        "skipped_share": cost.skipped_share,
        "skipped_mass": cost.skipped_mass,
        "bytes_read_per_token": cost.bytes_per_token,
    }


def _table(costs: Sequence[SkipCost]) -> Table:
    from rich.table import Table

    from edgemoe.memory import format_bytes

    exact = costs[0]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("skip-mass", "perplexity", "change", "±", "skipped", "router mass", "read per token", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in costs:
        error = cost.standard_error(exact)
        read = cost.bytes_per_token / exact.bytes_per_token - 1 if exact.bytes_read else 0.0
        table.add_row(
            f"{cost.skip_mass:g}" if cost.skip_mass else "exact",
            f"{cost.perplexity:.3f}",
            f"{cost.perplexity_change(exact):+.2%}",
            "-" if error is None else f"{error:.2%}",
            f"{cost.skipped_share:.1%}",
            f"{cost.skipped_mass:.2%}",
            format_bytes(round(cost.bytes_per_token)),
            f"{read:+.1%}",
        )
    return table
