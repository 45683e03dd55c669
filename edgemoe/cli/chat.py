"""``edgemoe chat``: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.chat import Answer, ChatSession
from edgemoe.cli import options
from edgemoe.cli.flags import in_flags
from edgemoe.cli.options import ModelOptions, utf8
from edgemoe.errors import EdgemoeError, PatternError, PromptError, SessionError
from edgemoe.interrupts import exiting_on, held_interrupts
from edgemoe.memory import format_bytes

if TYPE_CHECKING:
    from edgemoe.backend import Llama
    from edgemoe.fingerprint import ModelFingerprint

HELP = """\
/task         show the tasks, and which is active
/task NAME    use that task; /task all: all experts; /task auto: whatever the prompts are about
/system TEXT  set the system message; without TEXT remove it
/save FILE    save the conversation, its task, and which experts are in memory
/load FILE    go on with a saved one
/reset        forget the conversation
/plan         show where the memory goes
/stats        show what the latest answer took
/help         show this
/quit         leave, as Ctrl-D does
Ctrl-C stops an answer, Alt-Enter starts a new line, a blank before / makes it text."""


@click.command("chat")
@options.MODEL
@click.option(
    "--session",
    metavar="FILE",
    type=click.Path(path_type=Path, readable=False),
    help="Go on with the conversation in this file, if there is one, and save it there after each answer.",
)
@options.model_options
def command(model: Path, session: Path | None, options: ModelOptions) -> None:
    """Talk with a model.

    On a terminal, /help lists the commands, and what is typed is kept in ~/.local/share/edgemoe/chat_history. Elsewhere
    each line of standard input is a message or a command; where one was refused, the exit status is 1 at the end.
    Answers go to standard output (with --json, one JSON document on a line for each), everything else to standard
    error.
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
    llama = options.open(model)
    del growth
    refused = False
    # These leave as Ctrl-D does, but for the exit status.
    with llama, exiting_on(signal.SIGTERM, signal.SIGHUP):
        chat = _Chat(llama, options, on_terminal, session)
        chat.greet()
        with chat.saved():
            while True:
                try:
                    line = read()
                    if line is None or not chat.take(line):
                        break
                except (_CommandError, PatternError, PromptError, SessionError) as error:
                    refused = True
                    click.echo(f"edgemoe: {in_flags(str(error))}", err=True)
                except KeyboardInterrupt:
                    if not on_terminal:
                        raise
                    ui.note("Ctrl-D or /quit leaves.")
    # On a terminal it was seen.
    if refused and not on_terminal:
        click.get_current_context().exit(1)


def _read_line() -> str | None:
    line = sys.stdin.buffer.readline()
    return utf8(line, "standard input") if line else None


class _CommandError(EdgemoeError):
    """A command of the conversation that cannot be obeyed."""


class _Chat:
    """What happens with each line; what is refused is raised, and the conversation can go on."""

    def __init__(self, llama: Llama, options: ModelOptions, on_terminal: bool, file: Path | None) -> None:
        self._llama = llama
        self._options = options
        self._on_terminal = on_terminal
        self._file = file
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

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Go on with the session file, if there is one, and save the conversation there at the end, whatever ends it.

        Raises
        ------
        SessionError
            If the file cannot be used; a new one is made at once, so that this is told before anything is said.
        """
        if self._file is None:
            yield
            return
        if self._file.exists():
            self._load(self._file)
            if self._options.task is not None and self._llama.task_mode is not None:
                self._llama.task_mode.pin(self._options.task)
        else:
            self._save(self._file)
        self._tell_task()
        try:
            yield
        finally:
            self._save(self._file)

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; False to leave.

        Raises
        ------
        EdgemoeError
            When it is refused (_CommandError, PatternError, PromptError, SessionError), or the model fails.
        """
        if line.startswith("/"):
            return self._obey(line)
        if line.strip():
            self._answer(line.strip())
            if self._file is not None:
                self._save(self._file)
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
        elif name in ("/save", "/load"):
            self._save_or_load(name, text.strip())
        elif name == "/reset":
            self._session.reset()
            self._note("The conversation is forgotten.")
        elif name == "/system":
            self._session.system = text.strip()
            self._note("The system message is set." if self._session.system else "There is no system message.")
        else:
            raise _CommandError(f"there is no command {name}; /help lists them")
        return True

    def _task(self, name: str) -> None:
        """Show, pin or release the active task."""
        mode = self._llama.task_mode
        if mode is None:
            raise _CommandError("this chat knows no tasks; start it with --experts task or auto")
        if name == "auto":
            mode.release()
        elif name:
            mode.pin(None if name == "all" else name)
            self._task_told = mode.active
        from edgemoe.cli import task_ui

        self._note(task_ui.mode_line(mode))
        if not name:
            self._note(f"tasks: {', '.join(mode.names)}")

    def _save_or_load(self, name: str, text: str) -> None:
        if not text:
            raise _CommandError(f"{name} needs a file, as in {name} talk.json")
        path = Path(text)
        if name == "/load":
            self._load(path)
            self._tell_task()
        else:
            self._save(path)
            self._note(f"Saved: {path}.")

    def _save(self, path: Path) -> None:
        from edgemoe.session_file import SavedSession, write_session

        assert self._llama.store is not None, "the model is open"
        session, mode = self._session, self._llama.task_mode
        saved = SavedSession(
            system=session.system,
            turns=tuple(turn["content"] for turn in session.turns),
            n_asked=session.n_asked,
            task=None if mode is None else mode.active,
            pinned=mode is not None and mode.pinned,
            residents=self._llama.store.residents(),
        )
        # The signal of a terminal that is closed comes twice: once from its shell, once from the kernel.
        with held_interrupts():
            write_session(saved, self._fingerprint, path)

    def _load(self, path: Path) -> None:
        from edgemoe.session_file import read_session

        saved = read_session(path, self._fingerprint)
        mode = self._llama.task_mode
        if mode is None:
            switch = self._llama.residency.restore(saved.residents, None)
        else:
            switch = mode.resume(saved.task, saved.pinned, saved.residents)
        roles = ("user", "assistant")
        session = self._session
        session.system, session.n_asked = saved.system, saved.n_asked
        session.turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(saved.turns)]
        self._note(
            f"{path}: {len(saved.turns):,} messages; {format_bytes(switch.bytes_read)} of experts read in"
            f" {switch.seconds:.1f} s."
        )
        if mode is None and saved.task is not None:
            self._note(f"Its task, {saved.task}, is not in force: --experts auto or task would use it.")

    @cached_property
    def _fingerprint(self) -> ModelFingerprint:
        """Of the file as it is: --keep K/M changes what the model says of itself."""
        from edgemoe.fingerprint import fingerprint
        from edgemoe.index import read_index

        return fingerprint(read_index(self._llama.index.path))

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
