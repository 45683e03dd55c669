"""Strict reader for the header of one GGUF file (format: ggml's gguf.md; reference reader: ggml's gguf.cpp).

The file is taken to be hostile: every length is checked against the file's size before anything is read or
allocated, long arrays are walked without making objects of their items, and whatever is wrong raises a
`ModelFileError`. What ggml refuses is refused here too, with a sentence instead of a failed load.
"""

from __future__ import annotations

import functools
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from edgemoe.errors import ModelFileError
from edgemoe.file_window import CUT_SHORT, DAMAGED, FileWindow
from edgemoe.ggml_types import type_blocks, type_name

__all__ = ["ArraySummary", "GGUFHeader", "TensorInfo", "Value", "read_header", "scalar_layouts", "show"]

# Bounds no real model comes near (the oldest files had 30k tensors); they limit what a hostile file can cost.
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_KEY_BYTES = 1 << 16
_MAX_NAME_BYTES = 63  # GGML_MAX_NAME - 1
_MAX_KEPT_TEXT = 1 << 20
_MAX_KEPT_ITEMS = 4096
_MAX_DIMS = 4
_INT64_MAX = (1 << 63) - 1

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_FOREIGN = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)"),
    (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint?)"),
    (b"\x80\x04", "a Python pickle"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself"),
    (b"<", "a web page"),
    (b"{", "a JSON file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"lmgg", "a GGML file from before GGUF"),
    (b"fmgg", "a GGML file from before GGUF"),
    (b"tjgg", "a GGML file from before GGUF"),
)


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """A metadata value that was checked and skipped, not kept.

    Attributes
    ----------
    type : str
        Item type in lower case (``"string"``, ``"float32"``, ...; ``"utf8"`` for one very long string).
    length : int
        Number of items (bytes for ``"utf8"``).
    """

    type: str
    length: int


Scalar = int | float | bool | str
Value = Scalar | tuple[int | float | bool, ...] | ArraySummary


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in its file.

    Attributes
    ----------
    name : str
        Tensor name as stored.
    shape : tuple of int
        Extents in ggml order, ne[0] (the contiguous one) first; 1 to 4 of them.
    ggml_type : int
        ggml's type id.
    offset : int
        Offset of the data from the start of the *file*, in bytes.
    n_bytes : int
        Size of the data in bytes. For a type this package does not know it follows from where the next tensor
        starts, rounded down to whole rows.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything a GGUF file says before its tensor data.

    Attributes
    ----------
    path : Path
        The file.
    version : int
        GGUF version, 2 or 3.
    metadata : dict
        Key to value. Numeric arrays of up to 4096 items are tuples; longer ones, arrays of strings and
        strings above 1 MiB are `ArraySummary`.
    tensors : tuple of TensorInfo
        In file order.
    data_offset : int
        Where the tensor data starts, in bytes.
    alignment : int
        ``general.alignment``, in bytes.
    file_size : int
        Size of the file when it was read, in bytes.
    value_ranges : dict
        Key to where its value lies in the file, type included: start and end in bytes.
    """

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    alignment: int
    file_size: int
    value_ranges: dict[str, tuple[int, int]]


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check the header of one GGUF file.

    Parameters
    ----------
    path : str or path-like
        A GGUF file, version 2 or 3, little-endian.

    Returns
    -------
    GGUFHeader
        Metadata and the place of every tensor; all tensors lie within the file and do not overlap.

    Raises
    ------
    ModelFileError
        If the path cannot be read as a file or what is in it is not a sound GGUF.
    """
    file_path = Path(path)
    try:
        mode = file_path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelFileError(f"{file_path} is a directory, expected a GGUF file; name the file inside it")
        # Opening a pipe or a device could block for ever.
        if not stat.S_ISREG(mode):
            raise ModelFileError(f"{file_path} is not a regular file, expected a GGUF file; save it to disk first")
        with file_path.open("rb", buffering=0) as file:
            return _Reader(file, file_path, os.fstat(file.fileno()).st_size).header()
    except FileNotFoundError:
        raise ModelFileError(f"{file_path} does not exist; check the path of the model") from None
    except PermissionError:
        raise ModelFileError(f"{file_path} cannot be read: permission denied; get read access to it") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelFileError(f"{file_path} cannot be read: {reason}; check the path and the disk") from None
    except ValueError:  # a NUL character, or text that no file name can hold
        raise ModelFileError(f"{show(str(path))} cannot be a file name; check the path of the model") from None


@functools.cache
def scalar_layouts() -> dict[int, tuple[str, struct.Struct]]:
    """Value types that are one number or bool: GGUF's type id -> (name in lower case, its bytes)."""
    from gguf.constants import GGUFValueType as Kind

    codes = {
        Kind.UINT8: "B",
        Kind.INT8: "b",
        Kind.UINT16: "H",
        Kind.INT16: "h",
        Kind.UINT32: "I",
        Kind.INT32: "i",
        Kind.UINT64: "Q",
        Kind.INT64: "q",
        Kind.FLOAT32: "f",
        Kind.FLOAT64: "d",
        Kind.BOOL: "?",
    }
    return {int(kind): (kind.name.lower(), struct.Struct("<" + code)) for kind, code in codes.items()}


def show(text: str) -> str:
    """Quote text from a file so that it is short and cannot play tricks on a terminal."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


@dataclass(frozen=True, slots=True)
class _RawTensor:
    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int  # from the start of the data section


class _Reader(FileWindow):
    """One pass over a header."""

    def header(self) -> GGUFHeader:
        version = self._version()
        self.doing = "the counts"
        n_tensors, n_keys = self.unpack(_U64), self.unpack(_U64)
        for count, limit, smallest, what in (
            (n_keys, _MAX_KEYS, 13, "metadata keys"),
            (n_tensors, _MAX_TENSORS, 24, "tensors"),
        ):
            if count > limit:
                self.fail(f"claims {count} {what}, expected at most {limit}", DAMAGED)
            if count * smallest > self.size:
                self.fail(f"claims {count} {what}, which its {self.size} bytes cannot hold", CUT_SHORT)
        metadata, ranges = self._metadata(n_keys)
        alignment = self._alignment(metadata)
        raw = self._tensor_infos(n_tensors)
        end = self.position
        data_offset = end + -end % alignment if raw else end
        tensors = self._place(raw, data_offset, alignment)
        return GGUFHeader(self.path, version, metadata, tensors, data_offset, alignment, self.size, ranges)

    def _version(self) -> int:
        if self.size == 0:
            self.fail("is empty, expected a GGUF file", "download or copy it again")
        first = self.peek(32)
        if first[:4] != b"GGUF":
            if first[8:10] == b'{"':
                guess = "a safetensors file"
            else:
                guess = next((what for magic, what in _FOREIGN if first.lstrip().startswith(magic)), "unknown data")
            self.fail(
                f"is not a GGUF file: it starts with {first[:8]!r} ({guess}), expected b'GGUF'",
                "give the path of a .gguf file, or make one of a checkpoint with edgemoe convert hf",
            )
        self.skip(4)
        self.doing = "the version"
        version = self.unpack(_U32)
        if version & 0xFFFF == 0 and version:
            self.fail("is a big-endian GGUF, expected little-endian", "download the little-endian file")
        if version == 1:
            self.fail("is GGUF version 1, which llama.cpp no longer reads", "convert it again")
        if version not in (2, 3):
            self.fail(f"says it is GGUF version {version}, expected 2 or 3", "download or convert it again")
        return version

    def _metadata(self, n_keys: int) -> tuple[dict[str, Value], dict[str, tuple[int, int]]]:
        metadata: dict[str, Value] = {}
        ranges: dict[str, tuple[int, int]] = {}
        for number in range(n_keys):
            self.doing = f"metadata key {number + 1} of {n_keys}"
            key = self._name(_MAX_KEY_BYTES)
            if key in metadata:
                self.fail(f"has the metadata key {show(key)} twice", DAMAGED)
            self.doing = f"the value of metadata key {show(key)}"
            start = self.position
            metadata[key] = self._value(self.unpack(_U32))
            ranges[key] = start, self.position
        return metadata, ranges

    def _name(self, limit: int) -> str:
        length = self.unpack(_U64)
        if not 0 < length <= limit:
            self.fail(f"has {length} bytes as the name of {self.doing}, expected 1 to {limit}", DAMAGED)
        try:
            name = self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"has a name that is not UTF-8 at {self.doing}", DAMAGED)
        if "\0" in name:
            self.fail(f"has a NUL character in the name of {self.doing}", DAMAGED)
        return name

    def _value(self, kind: int) -> Value:
        from gguf.constants import GGUFValueType as Kind

        layouts = scalar_layouts()
        if kind in layouts:
            _, layout = layouts[kind]
            value: Scalar = layout.unpack(self.take(layout.size))[0]
            return value
        if kind == Kind.STRING:
            length = self.unpack(_U64)
            if length > _MAX_KEPT_TEXT:
                self.skip(length)
                return ArraySummary("utf8", length)
            # Only names have to be exact; a stray byte in a description is no reason to refuse a model.
            return self.take(length).decode("utf-8", errors="replace")
        if kind == Kind.ARRAY:
            return self._array(self.unpack(_U32), self.unpack(_U64))
        self.fail(f"has {self.doing} of unknown type {kind}, expected 0 to 12", DAMAGED)

    def _array(self, kind: int, length: int) -> Value:
        from gguf.constants import GGUFValueType as Kind

        if kind == Kind.STRING:
            self.skip_strings(length)
            return ArraySummary("string", length)
        if kind == Kind.ARRAY:
            self.fail(f"has an array of arrays as {self.doing}, which llama.cpp does not read", "convert it again")
        if kind not in scalar_layouts():
            self.fail(f"has {self.doing} as an array of unknown type {kind}, expected 0 to 12", DAMAGED)
        name, layout = scalar_layouts()[kind]
        if length > _MAX_KEPT_ITEMS:
            self.skip(length * layout.size)
            return ArraySummary(name, length)
        return tuple(item for (item,) in layout.iter_unpack(self.take(length * layout.size)))

    def _alignment(self, metadata: dict[str, Value]) -> int:
        from gguf.constants import GGUF_DEFAULT_ALIGNMENT, Keys

        alignment = metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1) or alignment >= 1 << 32:
            found = show(str(alignment))
            self.fail(f"has {Keys.General.ALIGNMENT} {found}, expected a power of two below 2**32", DAMAGED)
        return alignment

    def _tensor_infos(self, n_tensors: int) -> list[_RawTensor]:
        tensors: list[_RawTensor] = []
        names: set[str] = set()
        for number in range(n_tensors):
            self.doing = f"tensor {number + 1} of {n_tensors}"
            name = self._name(_MAX_NAME_BYTES)
            if name in names:
                self.fail(f"has two tensors named {show(name)}", DAMAGED)
            names.add(name)
            self.doing = f"the description of tensor {show(name)}"
            n_dims = self.unpack(_U32)
            if n_dims > _MAX_DIMS:
                self.fail(f"has tensor {show(name)} with {n_dims} dimensions, expected at most 4", DAMAGED)
            # A scalar (no dimension at all) is one element to ggml.
            shape = tuple(self.unpack(_U64) for _ in range(n_dims)) or (1,)
            if 0 in shape or math.prod(shape) > _INT64_MAX:
                self.fail(f"has tensor {show(name)} of impossible shape {shape}", DAMAGED)
            tensors.append(_RawTensor(name, shape, self.unpack(_U32), self.unpack(_U64)))
        return tensors

    def _place(self, raw: list[_RawTensor], data_offset: int, alignment: int) -> tuple[TensorInfo, ...]:
        """Check that the tensors lie one after the other, as ggml demands, and within the file."""
        placed: list[TensorInfo] = []
        expected = 0
        for number, tensor in enumerate(raw):
            name = show(tensor.name)
            if tensor.offset % alignment:
                self.fail(f"has tensor {name} at offset {tensor.offset}, not a multiple of {alignment}", DAMAGED)
            following = raw[number + 1].offset if number + 1 < len(raw) else self.size - data_offset
            n_bytes = self._n_bytes(tensor, following - tensor.offset)
            end = data_offset + tensor.offset + n_bytes
            if end > self.size or n_bytes > _INT64_MAX:
                self.fail(
                    f"has {self.size} bytes but tensor {name} (of {len(raw)}) ends at byte {end}",
                    CUT_SHORT,
                )
            if tensor.offset < expected:
                self.fail(f"has tensor {name} overlapping the one before it", DAMAGED)
            if tensor.offset > expected:
                gap = tensor.offset - expected
                self.fail(f"has {gap} stray bytes before tensor {name}, which llama.cpp refuses", "convert it again")
            expected = tensor.offset + n_bytes + -n_bytes % alignment
            placed.append(TensorInfo(tensor.name, tensor.shape, tensor.ggml_type, data_offset + tensor.offset, n_bytes))
        return tuple(placed)

    def _n_bytes(self, tensor: _RawTensor, room: int) -> int:
        blocks = type_blocks(tensor.ggml_type)
        if blocks is None:
            rows = math.prod(tensor.shape[1:])
            if room < rows:
                self.fail(
                    f"leaves {max(0, room)} bytes for tensor {show(tensor.name)} of shape {tensor.shape}"
                    f" and unknown type {tensor.ggml_type}",
                    CUT_SHORT,
                )
            return room - room % rows
        block, block_bytes = blocks
        if tensor.shape[0] % block:
            self.fail(
                f"has tensor {show(tensor.name)} with rows of {tensor.shape[0]} weights,"
                f" not a multiple of {block} as {type_name(tensor.ggml_type)} needs",
                DAMAGED,
            )
        return math.prod(tensor.shape) // block * block_bytes
