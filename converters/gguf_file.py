"""Writes GGUF files (version 3; format: ggml's gguf.md): streaming, resumable, atomic.

A file grows under the name ``<path>.partial``. Its header comes first, so every tensor has its place and may be written
in any order. Until it is finished, the partial file ends in a note of what it is and what it has::

    header | tensor data | SHA-256 of the plan (32 bytes) | 1 byte for each tensor, 1 when it is complete

The plan is the header and the state of the source files. A partial file of the very same plan is taken up again; any
other one is begun anew. Tensors are noted as complete only once their data has reached the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION, GGUFValueType, Keys

from edgemoe.errors import ConvertError
from edgemoe.ggml_types import type_blocks, type_name
from edgemoe.gguf_header import scalar_layouts, show
from edgemoe.memory import format_bytes

__all__ = ["GgufFile", "Layout", "Metadata", "RawValue", "TensorInfo", "Value", "lay_out"]

_MAX_NAME_BYTES = 63  # GGML_MAX_NAME - 1
_DIGEST_BYTES = 32
# Data goes to the disk in portions: what a crash can lose, and what the kernel holds back at most.
_SYNC_BYTES = 256 << 20

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value and how it is stored.

    Attributes
    ----------
    value : Any
        A number, a bool, a str or the bytes of one; for arrays a sequence of these.
    type : GGUFValueType
        Type it is stored as.
    element : GGUFValueType or None
        For arrays, the type of their items.
    """

    value: Any
    type: GGUFValueType
    element: GGUFValueType | None = None


@dataclass(frozen=True, slots=True)
class RawValue:
    """A metadata value as another file stores it: its type and all that follows, byte for byte."""

    data: bytes


Metadata = dict[str, Value]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor to be written.

    Attributes
    ----------
    name : str
        Tensor name, at most 63 bytes.
    shape : tuple of int
        Extents in ggml order, ne[0] (the contiguous one) first; 1 to 4 of them.
    ggml_type : int
        ggml's type id.
    n_bytes : int
        Size of its data in bytes.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes.

    Attributes
    ----------
    header : bytes
        All that comes before the data, padding included.
    offsets : tuple of int
        Start of each tensor's data in the file, in bytes.
    file_size : int
        Size of the whole file in bytes.
    """

    header: bytes
    offsets: tuple[int, ...]
    file_size: int


def lay_out(
    metadata: Mapping[str, Value | RawValue], tensors: Sequence[TensorInfo], *, alignment: int = GGUF_DEFAULT_ALIGNMENT
) -> Layout:
    """Encode a header and place the tensors, one after the other in the order given.

    Parameters
    ----------
    metadata : Mapping
        Keys and values in order. ``general.alignment`` is set where `alignment` is not GGUF's default.
    tensors : sequence of TensorInfo
        All tensors.
    alignment : int
        A power of two: tensors start at multiples of it, in bytes.

    Raises
    ------
    ConvertError
        If GGUF has no way to store a value, a name or a tensor.
    """
    keys = dict(metadata)
    if alignment != GGUF_DEFAULT_ALIGNMENT or Keys.General.ALIGNMENT in keys:
        keys[Keys.General.ALIGNMENT] = Value(alignment, GGUFValueType.UINT32)
    parts = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(tensors), len(keys))]
    for key, value in keys.items():
        try:
            parts += [_string(key), value.data if isinstance(value, RawValue) else _encode(value)]
        except (struct.error, TypeError, UnicodeError) as error:
            raise ConvertError(f"metadata key {show(key)} cannot be stored in a GGUF: {error}; correct it") from None
    starts = list(accumulate((_padded(tensor.n_bytes, alignment) for tensor in tensors), initial=0))
    _check(tensors)
    for tensor, start in zip(tensors, starts, strict=False):
        n_dims = len(tensor.shape)
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{n_dims}QIQ", n_dims, *tensor.shape, tensor.ggml_type, start))
    header = b"".join(parts)
    header += bytes(_padded(len(header), alignment) - len(header))
    return Layout(header, tuple(len(header) + start for start in starts[:-1]), len(header) + starts[-1])


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
        if self._unsynced_bytes >= _SYNC_BYTES:
            with self._errors():
                self._sync()

    def _sync(self) -> None:
        """Bring the data to the disk, then note whose it is."""
        os.fdatasync(self._fd)
        for name in self._unsynced:
            self._put(b"\1", self.file_size + _DIGEST_BYTES + self._numbers[name])
        self._unsynced, self._unsynced_bytes = [], 0

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


def _check(tensors: Sequence[TensorInfo]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        name, blocks = show(tensor.name), type_blocks(tensor.ggml_type)
        if tensor.name in seen:
            raise ConvertError(f"two tensors are named {name}, which a GGUF cannot hold; correct the conversion")
        seen.add(tensor.name)
        if not 0 < len(tensor.name.encode()) <= _MAX_NAME_BYTES:
            raise ConvertError(f"tensor {name} has a name of more than {_MAX_NAME_BYTES} bytes; shorten it")
        if not 0 < len(tensor.shape) <= 4 or 0 in tensor.shape:
            raise ConvertError(f"tensor {name} has shape {tensor.shape}, expected 1 to 4 extents above 0; correct it")
        if blocks is None:
            continue
        rows, block = prod(tensor.shape[1:]), blocks[0]
        if tensor.shape[0] % block or rows * (tensor.shape[0] // block) * blocks[1] != tensor.n_bytes:
            raise ConvertError(
                f"tensor {name} of shape {tensor.shape} is no {tensor.n_bytes} bytes of {type_name(tensor.ggml_type)};"
                " use another type"
            )


def _encode(value: Value) -> bytes:
    kind = struct.pack("<I", value.type)
    if value.type == GGUFValueType.STRING:
        return kind + _string(value.value)
    if value.type != GGUFValueType.ARRAY:
        return kind + scalar_layouts()[value.type][1].pack(value.value)
    element, items = value.element, value.value
    if element == GGUFValueType.STRING:
        body = b"".join(map(_string, items))
    elif element in scalar_layouts():
        body = struct.pack(f"<{len(items)}{scalar_layouts()[element][1].format[-1]}", *items)
    else:
        raise TypeError(f"an array of {element}")
    return kind + struct.pack("<IQ", element, len(items)) + body


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else bytes(text)
    return struct.pack("<Q", len(data)) + data


def _padded(n_bytes: int, alignment: int) -> int:
    return n_bytes + -n_bytes % alignment
