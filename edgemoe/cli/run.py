"""``edgemoe run``: one prompt, one answer on standard output."""

from __future__ import annotations

from pathlib import Path

import click

from edgemoe.chat import ChatSession, complete
from edgemoe.cli import options
from edgemoe.cli.options import ModelOptions, read_prompt


@click.command("run")
@options.MODEL
@click.argument("prompt", required=False)
@options.model_options
def command(model: Path, prompt: str | None, options: ModelOptions) -> None:
    """Answer one prompt.

    PROMPT is read from standard input when it is "-" or left out. It is put through the model's chat template; a model
    that has none continues the text. The answer goes to standard output; the plan before it and the measurements
    after it go to standard error.
    """
    from edgemoe.cli import ui

    text = read_prompt(prompt)
    talking = not (options.quiet or options.json)
    sampling = options.sampling()
    with options.open(model, on_plan=ui.announce if talking else None) as llama:
        if llama.index.has_chat_template:
            answer = ChatSession(llama, sampling).ask(text)
        else:
            answer = complete(llama, text, sampling)
        try:
            if options.json:
                answer.drain()
            else:
                ui.stream(answer)
        finally:
            if options.json:
                document = ui.answer_document(llama, answer)
                ui.show_json({**document, "plan": ui.plan_document(llama.plan)})
            elif talking:
                if llama.task_mode is not None:
                    from edgemoe.cli import task_ui

                    ui.err().print()
                    ui.note(task_ui.mode_line(llama.task_mode))
                ui.report(llama, answer)
