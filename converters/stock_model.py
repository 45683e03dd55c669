"""A stock GGUF model, one file or split, open for reading: metadata byte for byte, tensor data in pieces."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from gguf.constants import GGUFValueType, Keys

from edgemoe.converters.gguf_layout import RawValue
from edgemoe.errors import ModelFileError
from edgemoe.gguf_header import GGUFHeader, TensorInfo, scalar_layouts
from edgemoe.split_files import read_headers

__all__ = ["StockModel"]

_SPLIT_KEYS = frozenset(
    {Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT}
)
_ARRAY_HEAD = struct.Struct("<IIQ")


class StockModel:
    """All files of a GGUF model, open; a context manager.

    Parameters
    ----------
    path : str or path-like
        The only file, or the first part of a split model.

    Attributes
    ----------
    headers : tuple of GGUFHeader
        Of all files, in order.
    tensors : dict
        Name to what the header of its file says of it, in file order.
    metadata : dict
        Key to value of the first file, without the keys that tell parts of a split model apart.

    Raises
    ------
    ModelFileError
        If a file is missing, unreadable or unsound.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.headers: tuple[GGUFHeader, ...] = read_headers(path)
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, int] = {}
        self._fds: list[int] = []
        with ExitStack() as stack:
            stack.callback(self.close)
            for number, header in enumerate(self.headers):
                self._fds.append(self._open(header.path))
                for tensor in header.tensors:
                    self.tensors[tensor.name] = tensor
                    self._file_of[tensor.name] = number
            ranges = self.headers[0].value_ranges
            self.metadata = {key: self._raw(key) for key in ranges if key not in _SPLIT_KEYS}
            stack.pop_all()

    @property
    def files(self) -> tuple[Path, ...]:
        """All parts, in order."""
        return tuple(header.path for header in self.headers)

    def read(self, name: str, start: int, n_bytes: int) -> bytes:
        """Read part of a tensor's data.

        Parameters
        ----------
        name : str
            Tensor name.
        start, n_bytes : int
            Where the part starts within the tensor's data, and its size, in bytes.

        Raises
        ------
        ModelFileError
            If the disk fails, or the file became shorter since its header was read.
        """
        file = self._file_of[name]
        return self._pread(file, self.tensors[name].offset + start, n_bytes, f"tensor {name}")

    def integers(self, key: str) -> tuple[int, ...] | None:
        """Give a metadata array of integers, however long; None where there is none."""
        raw = self.metadata.get(key)
        if raw is None or len(raw.data) < _ARRAY_HEAD.size:
            return None
        kind, element, length = _ARRAY_HEAD.unpack_from(raw.data)
        if kind != GGUFValueType.ARRAY or element not in scalar_layouts():
            return None
        layout = scalar_layouts()[element][1]
        items = tuple(item for (item,) in layout.iter_unpack(raw.data[_ARRAY_HEAD.size :]))
        return items if len(items) == length and all(type(item) is int for item in items) else None

    def close(self) -> None:
        """Close all files."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> StockModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from None

    def _raw(self, key: str) -> RawValue:
        start, end = self.headers[0].value_ranges[key]
        return RawValue(self._pread(0, start, end - start, f"metadata key {key}"))

    def _pread(self, file: int, start: int, n_bytes: int, what: str) -> bytes:
        path = self.headers[file].path
        parts = []
        while n_bytes:
            try:
                part = os.pread(self._fds[file], n_bytes, start)
            except OSError as error:
                raise _unreadable(path, error) from None
            if not part:
                raise ModelFileError(
                    f"{path} ends within {what}, {n_bytes} bytes early; it became shorter since it was opened, download"
                    " or copy it again"
                )
            parts.append(part)
            start, n_bytes = start + len(part), n_bytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(
        f"{path} cannot be read: {error.strerror or type(error).__name__}; check the path and the disk"
    )
