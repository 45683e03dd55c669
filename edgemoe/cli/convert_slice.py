"""``edgemoe convert slice``: a GGUF that has only a task's best experts."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.cli import options
from edgemoe.cli.convert import writing


@click.command("slice")
@options.MODEL
@click.option("--task", metavar="NAME", required=True, help="The task whose experts are kept.")
@click.option("--keep", metavar="K/M", required=True, help="M experts kept in every layer, K active; M alone keeps K.")
@options.OUTPUT
@options.STORE
@options.FORCE
def command(model: Path, task: str, keep: str, output: Path, store: Path | None, force: bool) -> None:
    """Make a GGUF that has only a task's best experts.

    It is PreMoe's pruned model as a file of its own, for plain llama.cpp, ollama or LM Studio. MODEL is a GGUF file, or
    the first part of a split one. All layers keep equally many experts, as a GGUF has one number for all; the sets of
    --experts task, where layers differ, cost less at the same size.
    """
    from edgemoe.cli import ui
    from edgemoe.converters.slice import plan_slice
    from edgemoe.converters.stock_model import StockModel
    from edgemoe.fingerprint import fingerprint
    from edgemoe.index import read_index
    from edgemoe.keep import Keep
    from edgemoe.memory import format_bytes
    from edgemoe.patterns import PatternStore

    index = read_index(model)
    pattern = PatternStore(fingerprint(index), store).load(task)
    with StockModel(model) as source:
        planned = plan_slice(source, index, pattern, Keep.parse(keep))
        ui.note(
            f"{output} will have {planned.chosen} experts and {planned.file_size:,} bytes"
            f" ({format_bytes(planned.file_size)} of {format_bytes(index.file_bytes)})."
        )
        with writing() as progress:
            planned.write(output, force=force, on_progress=progress)
    if index.skipped:
        ui.note("Prediction layers, which llama.cpp does not run, keep their first experts.")
    ui.note(f"{output} is written.")
