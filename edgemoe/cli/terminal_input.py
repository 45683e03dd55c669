"""The chat's input line on a terminal: history in the user's data folder, several lines with Alt-Enter."""

from __future__ import annotations

import contextlib
import os

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

__all__ = ["GROWTH", "TerminalInput"]

GROWTH = 16 << 20
"""Memory that the line editor takes as one types, bytes: 13 MiB were seen after 2,500 keys in one message."""


class TerminalInput:
    """Reads messages from the terminal.

    The prompt goes to standard error when standard output is not the terminal.
    """

    def __init__(self) -> None:
        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            history=_history(), key_bindings=keys, output=create_output(always_prefer_tty=True)
        )

    def __call__(self) -> str | None:
        """Read one message; None after Ctrl-D.

        Raises
        ------
        KeyboardInterrupt
            On Ctrl-C.
        """
        try:
            return self._session.prompt([("bold", "> ")])
        except EOFError:
            return None


class _PrivateHistory(FileHistory):
    """A history whose file only its owner can read, and whose disk may be full."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history() -> History:
    path = platformdirs.user_data_path("edgemoe") / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # FileHistory itself would create the file readable for everybody.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return _PrivateHistory(str(path))
