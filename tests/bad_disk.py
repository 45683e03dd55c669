"""A disk that misbehaves while a program reads a model from it: slower, or with read errors."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from pathlib import Path


class _Control(ctypes.Structure):
    """As in bad_disk.c, where the fields are described."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "after_bytes",
            "bytes_per_s",
            "fail_every",
            "failing_thread",
            "failures_left",
            "reads",
            "bytes",
            "failures",
        )
    ]


class BadDisk:
    """The disk of one process, to be run with `environment`; it works well until `control` says otherwise.

    Parameters
    ----------
    library : Path
        As `build_library` gives it.
    file_name : str
        Files whose path contains this are on that disk.
    folder : Path
        Where the control file goes.
    """

    FOR_EVER = -1
    NEXT_THREAD = -1

    def __init__(self, library: Path, file_name: str, folder: Path) -> None:
        path = folder / "control"
        path.write_bytes(bytes(ctypes.sizeof(_Control)))
        with path.open("r+b") as file:
            self.control = _Control.from_buffer(mmap.mmap(file.fileno(), 0))
        self.environment = {
            "LD_PRELOAD": str(library),
            "BAD_DISK_FILE": file_name,
            "BAD_DISK_CONTROL": str(path),
        }


def build_library(folder: Path) -> Path | None:
    """Compile the library to preload; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "bad_disk.so"
    source = Path(__file__).with_name("bad_disk.c")
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([compiler, *options, str(source), "-o", str(library), "-ldl"], check=True)
    return library
