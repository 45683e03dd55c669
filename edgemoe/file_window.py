"""Bounded forward reading of a file that may be hostile: every length is checked before a byte is read."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NoReturn

from edgemoe.errors import ModelFileError

__all__ = ["CUT_SHORT", "DAMAGED", "FileWindow"]

DAMAGED = "the file is damaged, download or convert it again"
CUT_SHORT = "the file is cut short, download or copy it again"

# No real header comes near these (30 MB, a million strings); they limit what a hostile file can cost.
_MAX_BYTES = 256 << 20
_MAX_STRINGS = 1 << 22
_WINDOW = 1 << 18
_U64 = struct.Struct("<Q")


class FileWindow:
    """A window that moves forward over the start of a file.

    It holds some 256 KiB, or one value where that is longer, so a header of many megabytes costs no memory.

    Parameters
    ----------
    file : BinaryIO
        Open for reading, unbuffered.
    path : Path
        Its name, for messages.
    size : int
        Its size in bytes; nothing beyond it is asked for.

    Attributes
    ----------
    doing : str
        What is being read, for messages ("the version"); callers set it as they go.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.doing = "the first value"
        self._file = file
        self._window = b""
        self._start = 0  # file offset of the window
        self._at = 0  # next byte within the window
        self._strings_left = _MAX_STRINGS

    @property
    def position(self) -> int:
        """File offset of the next byte."""
        return self._start + self._at

    def fail(self, found: str, next_step: str) -> NoReturn:
        """Raise a `ModelFileError` that names the file, what was found and what to do."""
        raise ModelFileError(f"{self.path} {found}; {next_step}")

    def peek(self, n: int) -> bytes:
        """Next n bytes, fewer at the end of the file, without moving."""
        n = min(n, self.size - self.position)
        self._need(n)
        return self._window[self._at : self._at + n]

    def take(self, n: int) -> bytes:
        """Next n bytes."""
        self._need(n)
        self._at += n
        return self._window[self._at - n : self._at]

    def skip(self, n: int) -> None:
        """Move over n bytes; what is outside the window is not read."""
        self._check_room(n)
        self._at += n
        if self._at > len(self._window):
            self._start += self._at
            self._window, self._at = b"", 0

    def unpack(self, layout: struct.Struct) -> int:
        """Next integer of a layout."""
        self._need(layout.size)
        (value,) = layout.unpack_from(self._window, self._at)
        self._at += layout.size
        return int(value)

    def skip_strings(self, count: int) -> None:
        """Move over strings, each a 64-bit length and that many bytes."""
        if count > self._strings_left:
            self.fail(f"claims {count} strings in {self.doing}, more than any vocabulary has", "download it again")
        self._strings_left -= count
        self._check_room(8 * count)
        # Local names and no calls: a vocabulary has hundreds of thousands of strings.
        unpack_from, window, at = _U64.unpack_from, self._window, self._at
        for _ in range(count):
            if at + 8 > len(window):
                self._at = at
                self._need(8)
                window, at = self._window, self._at
            (length,) = unpack_from(window, at)
            at += 8 + length
            if at > len(window):
                self._at = at - length
                self.skip(length)
                window, at = self._window, self._at
        self._at = at

    def _need(self, n: int) -> None:
        """Have the next n bytes in the window."""
        if len(self._window) - self._at >= n:
            return
        self._check_room(n)
        chunks = [self._window[self._at :]]
        self._start += self._at
        self._at = 0
        missing = n - len(chunks[0])
        self._file.seek(self._start + len(chunks[0]))
        while missing > 0:
            chunk = self._file.read(max(missing, _WINDOW))
            if not chunk:
                self.fail("became shorter while it was read", "wait until it is written completely")
            chunks.append(chunk)
            missing -= len(chunk)
        self._window = b"".join(chunks)

    def _check_room(self, n: int) -> None:
        end = self.position + n
        if end > self.size:
            self.fail(f"ends at byte {self.size} but {self.doing} would reach to byte {end}", CUT_SHORT)
        if end > _MAX_BYTES:
            self.fail(f"has a header above {_MAX_BYTES >> 20} MiB at {self.doing}", "download or convert it again")
