"""``edgemoe plan``: where every byte of a budget would go; nothing is loaded."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.cli import options


@click.command("plan")
@options.MODEL
@options.RAM
@options.CTX
@options.UBATCH
@options.JSON
def command(model: Path, ram: str, ctx: int | None, ubatch: int | None, json: bool) -> None:
    """Show where every byte of a RAM budget would go.

    Nothing is loaded: the plan follows from the header of MODEL and from what llama.cpp says it would allocate.
    """
    # The plan starts from this process: with what `run` imports, its smallest budget is enough there too.
    import psutil  # noqa: F401

    import edgemoe.chat  # noqa: F401
    from edgemoe.backend import plan_model
    from edgemoe.cli import ui

    plan = plan_model(model, ram, n_ctx=ctx, n_ubatch=ubatch, flash_attn=True)
    if json:
        ui.show_json(ui.plan_document(plan))
    else:
        ui.show(ui.out(), *ui.plan_parts(plan))
