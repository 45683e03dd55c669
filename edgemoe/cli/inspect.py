"""``edgemoe inspect``: what the header of a model says; nothing is loaded."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.cli import options


@click.command("inspect")
@options.MODEL
@click.option("--experts", is_flag=True, help="Also print where every expert lies.")
@options.JSON
def command(model: Path, experts: bool, json: bool) -> None:
    """Show what is in a model: layers, experts, sizes.

    Only the header of MODEL (a GGUF file, the first part of a split one) is read.
    """
    from edgemoe.cli import ui
    from edgemoe.index import describe, read_index

    index = read_index(model)
    description = describe(index)
    if experts:
        description["expert_offsets"] = ui.expert_document(index)
    if json:
        ui.show_json(description)
    else:
        ui.show(ui.out(), *ui.inspection(description))
