"""``edgemoe convert verify``: whether two GGUF models are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click import Context

from edgemoe.cli import options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgemoe.converters.verify import Verification

_FILE = click.Path(path_type=Path, readable=False)


@click.command("verify")
@click.argument("first", type=_FILE)
@click.argument("second", type=_FILE)
@options.JSON
@click.pass_context
def command(ctx: Context, first: Path, second: Path, json: bool) -> None:
    """Compare two GGUF models, tensor by tensor.

    FIRST and SECOND are GGUF files, or the first parts of split ones. Tensors may lie in another order; experts may
    have other numbers, or be left out, where SECOND says so. Where types differ, weights may differ by the error of
    quantization. The exit status is 0 when all is the same, else 1.
    """
    from edgemoe.cli import ui
    from edgemoe.converters.verify import verify

    with ui.Loading(shown=not json, what="comparing") as comparing:
        found = verify(first, second, on_progress=comparing.progress)
    if json:
        ui.show_json({"same": found.same, **asdict(found)})
    else:
        ui.show(ui.out(), *_parts(found))
    ctx.exit(0 if found.same else 1)


def _parts(found: Verification) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    from edgemoe.cli import ui

    counts = Counter(tensor.found for tensor in found.tensors if tensor.same)
    n_other = sum(not tensor.same for tensor in found.tensors)
    rows = [("tensors", ", ".join([*(f"{n} {what}" for what, n in counts.items()), f"{n_other} not the same"]))]
    n_keys = sum(key.matters for key in found.keys)
    rows.append(("metadata", f"{n_keys} keys that matter differ, {len(found.keys) - n_keys} that do not"))
    verdict = "the same" if found.same else "not the same"
    if found.kept is not None:
        n, of = found.kept
        rows.append(("experts", f"{n} of {of}, compared by the numbers they have in the first"))
        verdict += f", as far as it goes: {of - n} of {of} experts are left out" if found.same and n < of else ""
    rows.append(("verdict", verdict))
    yield ui.facts(rows)
    shown = [tensor for tensor in found.tensors if not tensor.same or tensor.error is not None]
    if shown:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("tensor", "first", "second", "found"):
            table.add_column(name, no_wrap=True)
        for name in ("error", "allowed"):
            table.add_column(name, justify="right")
        for tensor in shown:
            types = [kind or "-" for kind in tensor.types]
            figures = ["-" if figure is None else f"{figure:.2g}" for figure in (tensor.error, tensor.limit)]
            table.add_row(*map(Text, (tensor.name, *types, tensor.found, *figures)))
        yield table
    if found.keys:
        yield ui.facts((key.key, key.found + ("" if key.matters else " (does not matter)")) for key in found.keys)
