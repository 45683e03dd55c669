"""``edgemoe`` and ``python -m edgemoe``: streams that can be written to, and a Ctrl-C that is quiet to the end."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["main"]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the signal's number."""


def main() -> None:
    """Run the command line, and exit."""
    try:
        try:
            _prepare_streams()
            from edgemoe.cli import main as command

            command(prog_name="edgemoe")
        finally:
            import signal  # not above, where Ctrl-C would not be caught

            # All is done: while Python takes itself apart, a signal would only change the exit status.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


class _Remarks(io.FileIO):
    """Standard error: losing it, as when its terminal or its reader is gone, costs no answer."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _prepare_streams() -> None:
    # In this order, before any other file is opened: the system gives a new file the lowest number that is free.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 (pathlib would take long to import)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="replace")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Remarks(sys.stderr.fileno(), "w", closefd=False)),
        encoding=sys.stderr.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


if __name__ == "__main__":
    main()
