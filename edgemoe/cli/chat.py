"""``edgemoe chat``: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.chat import Answer, ChatSession
from edgemoe.cli import options
from edgemoe.cli.options import ModelOptions, utf8
from edgemoe.errors import PatternError, PromptError
from edgemoe.memory import format_bytes

if TYPE_CHECKING:
    from edgemoe.backend import Llama

HELP = """\
/task         show the tasks, and which is active
/task NAME    use that task; /task all: all experts; /task auto: whatever the prompts are about
/system TEXT  set the system message; without TEXT remove it
/reset        forget the conversation
/plan         show where the memory goes
/stats        show what the latest answer took
/help         show this
/quit         leave, as Ctrl-D does
Ctrl-C stops an answer, Alt-Enter starts a new line, a blank before / makes it text."""


@click.command("chat")
@options.MODEL
@options.model_options
def command(model: Path, options: ModelOptions) -> None:
    """Talk with a model.

    On a terminal, /help lists the commands. Elsewhere each line of standard input is a message or a command. Answers go
    to standard output (with --json, one JSON document on a line for each), everything else to standard error.
    """
    from edgemoe.cli import ui

    on_terminal = sys.stdin.isatty()
    read: Callable[[], str | None] = _read_line
    growth = b""
    if on_terminal:
        # Before the model, so that the plan counts what the input line takes, and what it will take while one types.
        from edgemoe.cli.terminal_input import GROWTH, TerminalInput

        read = TerminalInput()
        growth = b"\1" * GROWTH
    with ui.Loading(shown=not options.quiet) as loading:
        llama = options.open(model, on_progress=loading.progress)
    del growth
    with llama:
        chat = _Chat(llama, options, on_terminal)
        chat.greet()
        while True:
            try:
                line = read()
                if line is None or not chat.take(line):
                    break
            except KeyboardInterrupt:
                if not on_terminal:
                    raise
                ui.note("Ctrl-D or /quit leaves.")


def _read_line() -> str | None:
    line = sys.stdin.buffer.readline()
    return utf8(line, "standard input") if line else None


class _Chat:
    """What happens with each line."""

    def __init__(self, llama: Llama, options: ModelOptions, on_terminal: bool) -> None:
        self._llama = llama
        self._options = options
        self._on_terminal = on_terminal
        self._session = ChatSession(llama, options.sampling())
        self._latest: Answer | None = None
        self._task_told: str | None = None

    def greet(self) -> None:
        """Say what there is to know before the first message."""
        index, plan = self._llama.index, self._llama.plan
        if not index.has_chat_template:
            self._note(f"{index.name} has no chat template: using the format {self._llama.chat_format}.")
        if self._on_terminal:
            self._note(
                f"{index.name}, {plan.n_ctx:,} tokens of context, {format_bytes(plan.budget.bytes)} of memory."
                " /help lists the commands, Ctrl-D leaves."
            )
        self._tell_task()

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; False to leave."""
        if line.startswith("/"):
            return self._obey(line)
        if line.strip():
            try:
                self._answer(line.strip())
            except PromptError as error:
                if not self._on_terminal:
                    raise
                click.echo(f"edgemoe: {error}", err=True)
        return True

    def _obey(self, line: str) -> bool:
        from edgemoe.cli import ui

        name, _, text = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/help":
            ui.show(ui.err(), HELP)
        elif name == "/plan":
            ui.show(ui.err(), *ui.plan_parts(self._llama.plan))
        elif name == "/stats" and self._latest is not None:
            ui.show(ui.err(), ui.statistics(self._llama, self._latest))
        elif name == "/stats":
            self._note("No answer yet.")
        elif name == "/task":
            self._task(text.strip())
        elif name == "/reset":
            self._session.reset()
            self._note("The conversation is forgotten.")
        elif name == "/system":
            self._session.system = text.strip()
            self._note("The system message is set." if self._session.system else "There is no system message.")
        else:
            click.echo(f"edgemoe: there is no command {name}; /help lists them", err=True)
        return True

    def _task(self, name: str) -> None:
        """Show, pin or release the active task."""
        mode = self._llama.task_mode
        if mode is None:
            click.echo("edgemoe: this chat knows no tasks; start it with --experts task or auto", err=True)
            return
        try:
            if name == "auto":
                mode.release()
            elif name:
                mode.pin(None if name == "all" else name)
                self._task_told = mode.active
        except PatternError as error:
            click.echo(f"edgemoe: {error}", err=True)
            return
        from edgemoe.cli import task_ui

        self._note(task_ui.mode_line(mode))
        if not name:
            self._note(f"tasks: {', '.join(mode.names)}")

    def _tell_task(self) -> None:
        """Say so where the prompt has changed the task."""
        mode = self._llama.task_mode
        if mode is not None and mode.active != self._task_told:
            from edgemoe.cli import task_ui

            self._task_told = mode.active
            self._note(task_ui.mode_line(mode))

    def _answer(self, text: str) -> None:
        from edgemoe.cli import ui

        answer = self._latest = self._session.ask(text)
        if self._session.dropped_turns:
            self._note(f"The context is full: the oldest questions ({self._session.dropped_turns}) were dropped.")
        try:
            if self._options.json:
                answer.drain()
            else:
                ui.stream(answer)
        except KeyboardInterrupt:
            if not self._on_terminal:
                raise
        finally:
            if self._options.json:
                document = ui.answer_document(self._llama, answer)
                ui.show_json({**document, "dropped_turns": self._session.dropped_turns}, indent=None)
            self._tell_task()
            self._note(ui.status_line(self._llama, answer))

    def _note(self, text: str) -> None:
        from edgemoe.cli import ui

        if not (self._options.quiet or self._options.json):
            ui.note(text)
