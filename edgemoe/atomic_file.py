"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file"]


@contextlib.contextmanager
def atomic_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a new file that takes its name, in place of an older one, once it is written and on the disk.

    A symbolic link stays one: the file that it leads to is replaced.

    Parameters
    ----------
    path : Path
        Name of the file.
    mode : int
        Permissions, less the umask, of a file that was not there before; an older one's are kept.

    Raises
    ------
    OSError
        If the folder or the disk refuses it; nothing is left behind then, nor after any other exception.
    """
    path = Path(os.path.realpath(path))
    kept = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Never more than it will have in the end: whoever opens a file keeps it open.
        number = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode if kept is None else kept)
        with os.fdopen(number, "wb") as file:
            if kept is not None:
                os.fchmod(number, kept)
            yield file
            file.flush()
            os.fsync(number)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
