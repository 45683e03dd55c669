"""``edgemoe match``: which task a prompt belongs to."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.cli import options
from edgemoe.cli.options import read_prompt


@click.command("match")
@options.MODEL
@click.argument("prompt", required=False)
@click.option("--first", is_flag=True, help="Ask the first router only, before any expert is read.")
@options.RAM
@options.STORE
@options.THREADS
@options.IO
@options.JSON
def command(
    model: Path,
    prompt: str | None,
    first: bool,
    ram: str,
    store: Path | None,
    threads: int | None,
    io: str,
    json: bool,
) -> None:
    """Say which task a prompt belongs to, or none.

    PROMPT is read from standard input when it is "-" or left out. It is put through the model's chat template, as the
    first message of a conversation is.
    """
    from edgemoe.backend import Llama
    from edgemoe.chat import chat_prompt
    from edgemoe.cli import task_ui, ui

    text = read_prompt(prompt)
    with (
        ui.Loading(shown=not json) as loading,
        Llama(
            str(model),
            ram=ram,
            io=io,
            experts="auto",
            tasks=store,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            on_progress=loading.progress,
        ) as llama,
    ):
        if llama.index.has_chat_template:
            tokens = chat_prompt(llama, [{"role": "user", "content": text}])
        else:
            tokens = llama.tokenize(text.encode("utf-8"), add_bos=True, special=True)
        match = llama.match(tokens, text, first=first)
    if json:
        ui.show_json(task_ui.match_document(match))
    else:
        ui.show(ui.out(), task_ui.match_parts(match))
