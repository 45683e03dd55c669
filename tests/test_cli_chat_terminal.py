"""The chat on a terminal: keys, the history, and signals; with a model that answers from a script."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import click.testing
import pytest
from plain_llama import TINY_MOE
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgemoe.cli import main
from edgemoe.cli.terminal_input import TerminalInput


def typed(keys: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `TerminalInput` makes of these keys: messages, None for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    read: list[Any] = []
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        monkeypatch.setattr("edgemoe.cli.terminal_input.create_output", lambda **_: DummyOutput())
        keyboard.send_text(keys)
        line_input = TerminalInput()
        while None not in read:
            try:
                read.append(line_input())
            except KeyboardInterrupt:
                read.append(KeyboardInterrupt)
    return read


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = "one\rtwo\x1b\rlines\rabandoned\x03\x04"
    assert typed(keys, tmp_path, monkeypatch) == ["one", "two\nlines", KeyboardInterrupt, None]


def test_history_is_private_and_outlives_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed("secret\r\x04", tmp_path, monkeypatch)
    path = tmp_path / "edgemoe" / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert typed("\x1b[A\r\x04", tmp_path, monkeypatch) == ["secret", None]  # arrow up


def test_history_that_leads_nowhere_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "edgemoe" / "chat_history"
    typed("secret\r\x04", tmp_path, monkeypatch)
    path.unlink()
    path.symlink_to(os.devnull)
    assert typed("\x1b[A\rsecret\r\x04", tmp_path, monkeypatch) == ["", "secret", None]  # nothing to go up to
    assert path.readlink() == Path(os.devnull)


def test_history_is_told_of() -> None:
    told = click.testing.CliRunner().invoke(main, ["chat", "--help"]).stdout
    assert "~/.local/share/edgemoe/chat_history" in told


def test_history_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "edgemoe").write_text("a file where the folder should be")
    assert typed("one\r\x04", tmp_path, monkeypatch) == ["one", None]


ON_A_TERMINAL = """
import fcntl, os, signal, sys, termios, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes as a signal
sys.path.insert(0, sys.argv[1])
from fake_llama import FakeLlama
from edgemoe.cli import main
from edgemoe.cli.options import ModelOptions

def think():
    # A single long sleep would miss a signal that comes just before it.
    for _ in range(3000):
        time.sleep(0.02)

llama = FakeLlama(["One", think, " two"], ["Fine.\\x1b[31m"])
llama.index.path = sys.argv[2]
llama.store.residents = lambda: {0: (5, 1)}
ModelOptions.open = lambda *_, **__: llama
main(["chat", "fake.gguf", *sys.argv[3:]])
"""

PROMPT_READY = "\x1b[?2004h"
"""prompt_toolkit asks for bracketed paste when it begins to read."""


class Terminal:
    """A pseudo-terminal with the chat on its other side."""

    def __init__(self, data: Path, *arguments: str | Path) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        environment = {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "XDG_DATA_HOME": str(data)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, str(Path(__file__).parent), TINY_MOE, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, **environment},
        )
        os.close(theirs)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str) -> str:
        """Everything on the screen since the last call, up to and with this text."""
        deadline = time.monotonic() + 30
        while text not in self.seen:
            assert select.select([self._ours], [], [], max(0, deadline - time.monotonic()))[0], self.seen
            self.seen += os.read(self._ours, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def hang_up(self) -> None:
        os.close(self._ours)
        self._ours = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._ours >= 0:
            os.close(self._ours)


def test_on_a_terminal(tmp_path: Path) -> None:
    with contextlib.closing(Terminal(tmp_path)) as terminal:
        terminal.wait_for("fake, 64 tokens of context, 100 MiB of memory. /help lists the commands, Ctrl-D leaves.")
        terminal.wait_for(PROMPT_READY)
        terminal.type("count\r")
        terminal.wait_for("One")
        terminal.type("\x03")
        terminal.wait_for("1 token, stopped, hit rate")
        terminal.wait_for(PROMPT_READY)
        terminal.type("\x03")
        terminal.wait_for("Ctrl-D or /quit leaves.")
        terminal.wait_for(PROMPT_READY)
        terminal.type("again\r")
        terminal.wait_for("Fine.")
        # What a model says is text: the terminal does not turn red.
        assert terminal.wait_for("1 token, ").startswith("[31m")
        terminal.wait_for(PROMPT_READY)
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0


@pytest.mark.parametrize("answering", [False, True])
@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (None, 129)])
def test_a_terminal_that_is_gone_leaves_the_conversation(
    tmp_path: Path, signal_number: signal.Signals | None, status: int, answering: bool
) -> None:
    talk = tmp_path / "talk.json"
    with contextlib.closing(Terminal(tmp_path, "--session", talk)) as terminal:
        terminal.wait_for(PROMPT_READY)
        if answering:
            terminal.type("count\r")
            terminal.wait_for("One")
        if signal_number is None:
            terminal.hang_up()
        else:
            terminal.process.send_signal(signal_number)
        code = terminal.process.wait(timeout=30)
    # An answer that cannot be told to the end is an error of its own.
    assert code == status or (signal_number is None and answering)
    saved = json.loads(talk.read_text())
    assert saved["turns"] == (["count", "One"] if answering else [])
    assert saved["residents"] == {"0": [5, 1]}


def test_a_pipe_that_is_ended_by_a_signal(tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    command = [sys.executable, "-m", "edgemoe", "chat", TINY_MOE, "--ram", "96MiB", "--max-tokens", "4"]
    with subprocess.Popen(
        [*command, "--temp", "0", "--json", "--session", talk],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("/system Be brief.\nHello\n/system\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())["text"]
        process.terminate()
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
    assert process.returncode == 143
    saved = json.loads(talk.read_text())
    assert saved["turns"] == ["Hello", answer] and saved["residents"]
