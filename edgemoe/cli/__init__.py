"""The ``edgemoe`` command: one file per verb, imported only when that verb is invoked."""

from __future__ import annotations

import sys
from typing import Any

import click

from edgemoe.cli.flags import in_flags
from edgemoe.cli.verbs import Verbs
from edgemoe.errors import EdgemoeError

__all__ = ["main"]

VERBS = {
    "inspect": "Show what is in a model: layers, experts, sizes.",
    "plan": "Show where every byte of a RAM budget would go.",
    "run": "Answer one prompt.",
    "chat": "Talk with a model.",
    "profile": "Learn from text which experts a task needs.",
    "tasks": "Look after the tasks of a model.",
    "match": "Say which task a prompt belongs to, or none.",
    "evaluate": "Measure what keeping only a task's experts costs.",
    "bench": "Measure edgemoe beside plain llama.cpp, in one run.",
    "convert": "Make GGUF files that suit a purpose.",
}
"""Verb -> its line in the help, written here so that the help imports no verb."""

INTERRUPTED = 130


class _Command(Verbs):
    """The verbs of edgemoe; errors are reported as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; what goes wrong is one line on standard error."""
        try:
            return super().main(*args, **kwargs)
        except EdgemoeError as error:
            reason = in_flags(str(error))
        except MemoryError:
            reason = "the system refused memory; give a smaller --ram, --ctx or --ubatch"
        except OSError as error:
            # A closed pipe never gets here: click ends it quietly.
            reason = f"{error.filename or 'output'}: {error.strerror or error}; check the disk and the permissions"
        click.echo(f"edgemoe: {reason}", err=True)
        sys.exit(1)


@click.group(cls=_Command, verbs=VERBS, prefix="edgemoe.cli.", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgemoe", message="%(prog)s %(version)s")
def main() -> None:
    """Run Mixture-of-Experts GGUF models inside the RAM you give them.

    Look at a model, and at what a budget would buy:

    \b
        edgemoe inspect model.gguf
        edgemoe plan model.gguf --ram 6GiB

    Ask one question; the answer alone goes to standard output:

    \b
        edgemoe run model.gguf --ram 6GiB "Why is the sky blue?"
        edgemoe run model.gguf --ram 50% < question.txt > answer.txt

    Talk with it (Ctrl-C stops an answer, Ctrl-D leaves):

    \b
        edgemoe chat model.gguf --ram 6GiB

    --ram bounds the whole process: weights, caches, buffers and Python. Leave
    it out to use the memory that is free now.
    """  # noqa: D301 (click wants the character)
