"""``edgemoe convert align``: a GGUF whose tensors start on pages."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.cli import options
from edgemoe.cli.convert import writing


@click.command("align")
@options.MODEL
@options.OUTPUT
@click.option("--order", metavar="TASK", help="Lay a task's best experts side by side: they get new numbers.")
@options.STORE
@options.FORCE
def command(model: Path, output: Path, order: str | None, store: Path | None, force: bool) -> None:
    """Make a GGUF whose tensors start on pages, with an index of its experts.

    MODEL is a GGUF file, or the first part of a split one. The output is one file, which plain llama.cpp loads too, and
    it gives the same answers.
    """
    from edgemoe.cli import ui
    from edgemoe.converters.align import ALIGNMENT, align, renumbered_pattern
    from edgemoe.errors import ConvertError
    from edgemoe.fingerprint import fingerprint
    from edgemoe.index import read_index
    from edgemoe.pattern_file import write_pattern
    from edgemoe.patterns import PatternStore

    before = read_index(model)
    pattern = None if order is None else PatternStore(fingerprint(before), store).load(order)
    beside = output.parent / f"{output.stem}-{order}.pattern"
    if pattern is not None and beside.exists() and not force:
        raise ConvertError(f"{beside} exists already; give another output, or --force to replace it")
    with writing() as progress:
        after = align(model, output, pattern=pattern, force=force, on_progress=progress)
    ui.note(f"{output}: every tensor starts on a page of {ALIGNMENT:,} bytes, with an index of the experts.")
    shares = f"{before.aligned_slabs:.0%} before, {after.aligned_slabs:.0%} now"
    ui.note(f"Experts' parts that start on a page of this machine: {shares}.")
    if after.aligned_slabs < 1:
        ui.note("The others cannot: they follow each other without a gap, and their size is no multiple of a page.")
    if pattern is not None:
        write_pattern(renumbered_pattern(pattern, before, after), beside)
        ui.note(
            f"Experts have new numbers, so tasks of {model} do not fit this file. Task {pattern.task} with the new"
            f" numbers is in {beside}; take it over with: edgemoe tasks import {output} {beside}"
        )
