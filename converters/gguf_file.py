"""Writes GGUF files: streaming, resumable, atomic.

A file grows under the name ``<path>.partial``. Its header comes first, so every tensor has its place and may be written
in any order. Until it is finished, the partial file ends in a note of what it is and what it has::

    header | tensor data | SHA-256 of the plan (32 bytes) | 1 byte for each tensor, 1 when it is complete

The plan is the header and the state of the source files. A partial file of the very same plan is taken up again; any
other one is begun anew. Tensors are noted as complete only once their data has reached the disk, every now and then
while more of them are written: a process that is killed, or a machine that loses power, loses the last moments' work.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from edgemoe.converters.gguf_layout import Metadata, RawValue, TensorInfo, Value, lay_out
from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show
from edgemoe.memory import format_bytes

__all__ = ["GgufFile", "Metadata", "TensorInfo", "Value"]

_DIGEST_BYTES = 32
# Data goes to the disk in portions: what a crash can lose, and what the kernel holds back at most. Shorter ones would
# mostly wait for the disk's acknowledgement.
_SYNC_BYTES = 256 << 20
_SYNC_SECONDS = 0.5

Bytes = bytes | bytearray | memoryview


class GgufFile:
    """A GGUF file while it is written; a context manager.

    Parameters
    ----------
    path : Path
        The file to be. Nothing has this name before `finish`.
    metadata, tensors, alignment
        As for `lay_out`.
    sources : sequence of Path
        The files that the data is made of. When one has changed since, a partial file is not taken up again.
    force : bool
        Whether `finish` may replace an existing file.

    Raises
    ------
    ConvertError
        If the file exists, the disk has no room for it, it is one of the sources, another process is writing it, or
        the disk refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Value | RawValue],
        tensors: Sequence[TensorInfo],
        *,
        alignment: int = GGUF_DEFAULT_ALIGNMENT,
        sources: Sequence[Path] = (),
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        self._force = force
        self._layout = lay_out(metadata, tensors, alignment=alignment)
        self._tensors = tuple(tensors)
        self._numbers = {tensor.name: number for number, tensor in enumerate(tensors)}
        self._done: set[str] = set()
        self._unsynced: list[str] = []
        self._unsynced_bytes = 0
        self._synced_at = time.monotonic()
        self._fd = -1
        plan = self._plan(sources)
        self._check_target(sources)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        with self._errors():
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._lock()
                self._begin(plan)
            except BaseException:
                self.close()
                raise

    @property
    def file_size(self) -> int:
        """Size of the finished file in bytes."""
        return self._layout.file_size

    @property
    def done(self) -> frozenset[str]:
        """Names of the tensors that are complete, those of a former run included."""
        return frozenset(self._done)

    def write(self, name: str, chunks: Iterable[Bytes]) -> None:
        """Write the data of one tensor; of a tensor that is complete already, no chunk is taken.

        Parameters
        ----------
        name : str
            Tensor name.
        chunks : iterable of bytes-like
            Its data in order, in pieces of any size.

        Raises
        ------
        KeyError
            If the file has no such tensor.
        ConvertError
            If the chunks are more or fewer bytes than the tensor has, or the disk refuses them.
        """
        number = self._numbers[name]
        if name in self._done:
            return
        n_bytes, start = self._tensors[number].n_bytes, self._layout.offsets[number]
        at = 0
        for chunk in chunks:
            left = memoryview(chunk).cast("B")
            if at + len(left) > n_bytes:
                break
            while left:
                with self._errors():
                    written = os.pwrite(self._fd, left, start + at)
                left = left[written:]
                at += written
        else:
            if at == n_bytes:
                self._complete(name, n_bytes)
                return
        raise ConvertError(
            f"the data of tensor {show(name)} is not the {n_bytes} bytes that its header says; the source changed while"
            " it was read, run the conversion again"
        )

    def finish(self) -> None:
        """Give the complete file its name.

        Raises
        ------
        ConvertError
            If a tensor is missing, a file of that name has appeared meanwhile, or the disk refuses.
        """
        missing = next((tensor.name for tensor in self._tensors if tensor.name not in self._done), None)
        if missing is not None:
            raise ConvertError(f"{self.partial} has no data of tensor {show(missing)} yet; run the conversion again")
        self._refuse_existing()
        with self._errors():
            self._sync()
            os.ftruncate(self._fd, self.file_size)
            os.fsync(self._fd)
            self.partial.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._release()

    def close(self) -> None:
        """Let go of the file. What is not finished stays as a partial file if a tensor of it is complete."""
        if self._fd < 0:
            return
        try:
            if self._done:
                with self._errors():
                    self._sync()
            else:
                self.partial.unlink(missing_ok=True)
        finally:
            self._release()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What ended the work is worth more than that its last portion could not be kept either.
        with contextlib.suppress(ConvertError) if error else contextlib.nullcontext():
            self.close()

    def _check_target(self, sources: Sequence[Path]) -> None:
        if self.path.is_dir() or not self.path.name:
            raise ConvertError(f"{self.path} is a directory; give the name of the file to write")
        if self.path.exists() and any(self.path.samefile(source) for source in sources):
            raise ConvertError(f"{self.path} is what is to be converted; give the output another name")
        self._refuse_existing()
        if self.path.exists() and not self.path.is_file():
            raise ConvertError(f"{self.path} is not a regular file; give the name of a file to write")
        if not self.path.parent.is_dir():
            raise ConvertError(f"{self.path.parent} is not a directory; make it first or give another output")

    def _refuse_existing(self) -> None:
        if self.path.exists() and not self._force:
            raise ConvertError(f"{self.path} exists already; give another output, or --force to replace it")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have given it its final name since it was opened.
            mine = os.path.samestat(os.fstat(self._fd), self.partial.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            self._release()  # and leave the other's file alone
            raise ConvertError(f"{self.partial} is being written by another process; wait for it to end")

    def _plan(self, sources: Sequence[Path]) -> bytes:
        plan = hashlib.sha256(self._layout.header)
        for source in sources:
            try:
                status = source.stat()
            except OSError as error:
                raise ConvertError(f"{source} cannot be read: {error.strerror}; check the path and the disk") from None
            plan.update(repr((status.st_size, status.st_mtime_ns)).encode())
        return plan.digest()

    def _begin(self, plan: bytes) -> None:
        """Take up a partial file of the same plan, else begin one."""
        noted = len(plan) + len(self._tensors)
        found = os.pread(self._fd, noted, self.file_size)
        resumed = os.fstat(self._fd).st_size == self.file_size + noted and found.startswith(plan)
        if resumed:
            flags = found[len(plan) :]
            self._done = {tensor.name for tensor, flag in zip(self._tensors, flags, strict=True) if flag}
        else:
            os.ftruncate(self._fd, 0)
        self._check_room(noted)
        if resumed:
            return
        # Holes read as zeros: the padding between tensors needs no writing.
        os.ftruncate(self._fd, self.file_size + noted)
        self._put(self._layout.header, 0)
        self._put(plan, self.file_size)

    def _check_room(self, noted: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        needed = self.file_size + noted - 512 * os.fstat(self._fd).st_blocks
        if needed > free:
            raise ConvertError(
                f"{self.path} needs {format_bytes(needed)} but its disk has {format_bytes(free)} free; make room or"
                " give an output on another disk"
            )

    def _complete(self, name: str, n_bytes: int) -> None:
        self._done.add(name)
        self._unsynced.append(name)
        self._unsynced_bytes += n_bytes
        if self._unsynced_bytes >= _SYNC_BYTES or time.monotonic() - self._synced_at >= _SYNC_SECONDS:
            with self._errors():
                self._sync()

    def _sync(self) -> None:
        """Bring the data to the disk, then note whose it is."""
        os.fdatasync(self._fd)
        for name in self._unsynced:
            self._put(b"\1", self.file_size + _DIGEST_BYTES + self._numbers[name])
        self._unsynced, self._unsynced_bytes, self._synced_at = [], 0, time.monotonic()

    def _put(self, data: bytes, offset: int) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._fd, left, offset)
            left, offset = left[written:], offset + written

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or type(error).__name__
            step = "check the folder and the disk"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                step = "make room and run the same command again, it goes on where it stopped"
            raise ConvertError(f"{error.filename or self.partial} cannot be written: {reason}; {step}") from None
