"""``edgemoe inspect``: what the header of a model says; nothing is loaded."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.cli import options


@click.command("inspect")
@options.MODEL
@options.JSON
def command(model: Path, json: bool) -> None:
    """Show what is in a model: layers, experts, sizes.

    Only the header of MODEL (a GGUF file, the first part of a split one) is read.
    """
    from edgemoe.cli import ui
    from edgemoe.index import describe, read_index

    description = describe(read_index(model))
    if json:
        ui.show_json(description)
    else:
        ui.show(ui.out(), *ui.inspection(description))
