"""``edgemoe convert``: one file for each verb, imported only when that verb is invoked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import click

from edgemoe.cli.verbs import Verbs

__all__ = ["VERBS", "command", "writing"]

VERBS = {
    "hf": "Make a GGUF of a Hugging Face checkpoint.",
    "align": "Make a GGUF whose tensors start on pages, with an index of its experts.",
    "slice": "Make a GGUF that has only a task's best experts.",
    "verify": "Compare two GGUF models, tensor by tensor.",
}


@click.group("convert", cls=Verbs, verbs=VERBS, prefix="edgemoe.cli.convert_")
def command() -> None:
    """Make GGUF files that suit a purpose.

    \b
        edgemoe convert hf ./checkpoint -o model.gguf --type q4_k
        edgemoe convert align model.gguf -o aligned.gguf
        edgemoe convert slice model.gguf --task code --keep 8/64 -o code-64.gguf
        edgemoe convert verify model.gguf aligned.gguf

    The output has its name only when it is complete. Stopped, the same command goes on where it was.
    """  # noqa: D301 (click wants the character)


@contextlib.contextmanager
def writing() -> Iterator[Callable[[int, int], None]]:
    """Show how far a file is, given bytes done and their total; when it is stopped, say how to go on."""
    from edgemoe.cli import ui

    with ui.Loading(shown=True, what="writing") as bar:
        try:
            yield bar.progress
        except KeyboardInterrupt:
            ui.note("Stopped. The same command goes on with the tensors that are missing.")
            raise
