"""Reads Hugging Face checkpoints: config.json and safetensors shards; streaming, strict, never a pickle.

Format of safetensors: an 8-byte length, a JSON header, the data (huggingface/safetensors, README). A file is taken to
be hostile: every length is checked before anything is read, and whatever is wrong raises a `ConvertError`. Tensors are
read by `pread`, some rows at a time, so memory stays bounded whatever their size.
"""

from __future__ import annotations

import functools
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["Checkpoint", "Floats", "StoredTensor", "read_json"]

Floats = npt.NDArray[np.float32]
Raw = npt.NDArray[Any]

_MAX_HEADER_BYTES = 100_000_000  # what safetensors itself accepts
_MAX_JSON_BYTES = 100_000_000
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# What each dtype is kept in until it is floats: bfloat16 and float8 are no numpy types.
_STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "U8": np.dtype("u1"),
}
# What all exponent bits set looks like, with the sign bit clear: infinity, and NaN above it.
_INFINITY = {"F32": (np.int32, 0x7F800000), "F16": (np.int16, 0x7C00), "BF16": (np.int16, 0x7F80)}
# Known of safetensors, of no use as weights: sizes only.
_OTHER_SIZES = {
    "BOOL": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "I64": 8,
    "U64": 8,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in its shard.

    Attributes
    ----------
    name : str
        Name in the checkpoint.
    dtype : str
        As safetensors calls it: ``"BF16"``, ``"F32"``, ...
    shape : tuple of int
        Extents, the contiguous one last.
    path : Path
        The shard.
    offset, n_bytes : int
        Of the data in the shard, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int

    def __str__(self) -> str:
        return f"tensor {show(self.name)} of {self.path}"


class Checkpoint:
    """A folder with a model as Hugging Face keeps it; a context manager.

    Parameters
    ----------
    folder : Path
        With ``config.json`` and ``model.safetensors``, or shards of it. Symbolic links are fine.

    Attributes
    ----------
    config : dict
        What ``config.json`` says.
    tensors : Mapping of str to StoredTensor
        All tensors of all shards.
    files : tuple of Path
        The files that the model is made of: config and shards.

    Raises
    ------
    ConvertError
        If a file is missing, damaged or cut short, or the weights are a pickle or quantized in a way that cannot be
        converted.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConvertError(
                f"{self.folder} is no folder; give the folder with config.json and the safetensors files"
            )
        config_path = self.folder / "config.json"
        self.config = read_json(config_path)
        self._block = _fp8_block(config_path, self.config)
        self._files: dict[Path, int] = {}
        self.tensors: Mapping[str, StoredTensor] = {}
        try:
            shards, promised = _shards(self.folder)
            found: dict[str, StoredTensor] = {}
            for path in shards:
                for tensor in self._open(path):
                    if tensor.name in found:
                        raise ConvertError(
                            f"{tensor} is in {found[tensor.name].path} as well; download the checkpoint again"
                        )
                    found[tensor.name] = tensor
            for name, path in promised.items():
                if name not in found or found[name].path != path:
                    raise ConvertError(
                        f"{path} lacks tensor {show(name)}, which the index puts there; download it again"
                    )
        except BaseException:
            self.close()
            raise
        self.tensors = found
        self.files = (config_path, *shards)

    def close(self) -> None:
        """Close all shards."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def raw(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Raw:
        """Read items ``start:stop`` of the leading axis as they are stored (bfloat16 as uint16), without a check.

        Raises
        ------
        ConvertError
            If the shard cannot be read.
        """
        storage = _STORAGE.get(tensor.dtype)
        if storage is None:
            raise ConvertError(
                f"{tensor} has dtype {show(tensor.dtype)}, expected one of {', '.join(_STORAGE)}; convert it first"
            )
        n_items = tensor.shape[0] if tensor.shape else 1
        stop = n_items if stop is None else stop
        item_bytes = tensor.n_bytes // n_items
        data = np.empty((stop - start) * item_bytes, np.uint8)
        _read_exactly(self._files[tensor.path], data.data, tensor.offset + start * item_bytes, tensor)
        return data.view(storage).reshape(stop - start, *tensor.shape[1:])

    def checked(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Raw:
        """Read items ``start:stop`` of the leading axis as they are stored: float32, float16, or bfloat16 as uint16.

        Raises
        ------
        ConvertError
            If a weight is NaN or infinite, or the shard cannot be read.
        """
        raw = self.raw(tensor, start, stop)
        signed, infinity = _INFINITY[tensor.dtype]
        bits = raw.view(signed)
        # Without a temporary array: signed, the largest is a positive one, unsigned a negative one.
        if bits.max() >= infinity or bits.view(f"u{bits.itemsize}").max() >= infinity + (1 << (8 * bits.itemsize - 1)):
            raise _not_finite(tensor)
        return raw

    def floats(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Floats:
        """Read items ``start:stop`` of the leading axis as float32; may be called from several threads.

        Raises
        ------
        ConvertError
            If a weight is NaN or infinite, or the shard cannot be read.
        """
        if tensor.dtype in _INFINITY:
            raw = self.checked(tensor, start, stop)
            return _from_bfloat16(raw) if tensor.dtype == "BF16" else raw.astype(np.float32, copy=False)
        raw = self.raw(tensor, start, stop)
        if tensor.dtype == "F8_E4M3":
            values = self._from_float8(tensor, raw, start)
        elif tensor.dtype == "U8":
            raise ConvertError(
                f"{tensor} holds bytes, not weights; this way of quantizing it is not known, use another checkpoint"
            )
        else:
            with np.errstate(over="ignore"):  # what is too large for float32 is found below
                values = raw.astype(np.float32, copy=False)
        # The smallest and the largest are NaN if any is.
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise _not_finite(tensor)
        return values

    def _open(self, path: Path) -> list[StoredTensor]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConvertError(f"{path} cannot be read: {error.strerror}; download the missing shard") from None
        self._files[path] = fd
        return _read_header(fd, path)

    def _from_float8(self, tensor: StoredTensor, raw: Raw, start: int) -> Floats:
        """Multiply float8 weights [rows, columns] by the scale of their block (DeepSeek-V3's format)."""
        name = f"{tensor.name}_scale_inv"
        if self._block is None or name not in self.tensors or len(tensor.shape) != 2:
            raise ConvertError(f"{tensor} is float8 without block scales ({show(name)}); use a bfloat16 checkpoint")
        scale_tensor, (rows, columns) = self.tensors[name], self._block
        expected = (-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        if scale_tensor.shape != expected or scale_tensor.dtype == "F8_E4M3":
            raise ConvertError(f"{scale_tensor} has shape {scale_tensor.shape}, expected {expected}; download it again")
        scales = self.floats(scale_tensor)
        values = np.take(_float8_values(), raw)
        values *= np.repeat(scales[np.arange(start, start + len(raw)) // rows], columns, axis=1)[:, : tensor.shape[1]]
        return values


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises
    ------
    ConvertError
        If there is no such file, or it is something else.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConvertError(f"{path} has more than {_MAX_JSON_BYTES:,} bytes; it is not what its name says")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror}; give a complete checkpoint folder") from None
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds no JSON object; download it again")
    return content


def _shards(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """Files with weights, and which tensor the index puts into which of them."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(map(_is_file_name, places.values())):
            raise ConvertError(f"{index} has no weight_map from tensors to file names; download it again")
        promised = {name: folder / file for name, file in places.items()}
        return sorted(set(promised.values())), promised
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        _refuse_other_formats(folder)
        raise ConvertError(f"{folder} has no model.safetensors; give a folder with safetensors weights")
    numbers = [match for shard in shards if (match := _NUMBERED.search(shard.name))]
    for number in range(1, 1 + max((int(match[2]) for match in numbers), default=0)):
        if not any(int(match[1]) == number for match in numbers):
            raise ConvertError(f"{folder} lacks shard {number} of {numbers[0][2]}; download the missing shard")
    return shards, {}


def _is_file_name(file: object) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file


def _refuse_other_formats(folder: Path) -> None:
    for pattern in _PICKLES:
        for path in folder.glob(pattern):
            raise ConvertError(
                f"{path} is a PyTorch pickle, which can run any code when it is opened, so it never is; save the model"
                " as safetensors (save_pretrained does) or download its safetensors files"
            )
    for path in folder.glob("*.gguf"):
        raise ConvertError(f"{path} is a GGUF already; no conversion is needed")


def _fp8_block(path: Path, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a float8 scale; refuses every way of quantizing but that and MXFP4."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "mxfp4":
        return None
    block = quantization.get("weight_block_size") if method == "fp8" else None
    if isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block):
        return block[0], block[1]
    raise ConvertError(
        f"{path} says that the weights are quantized ({show(str(method))}), of which only block-scaled fp8 and"
        " gpt-oss's mxfp4 can be converted; use the original bfloat16 checkpoint"
    )


def _read_header(fd: int, path: Path) -> list[StoredTensor]:
    size = os.fstat(fd).st_size
    head = os.pread(fd, 8, 0)
    if head == b"version ":
        raise ConvertError(f"{path} is a Git LFS pointer, not the weights; download the file itself")
    n_header = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= n_header <= _MAX_HEADER_BYTES:
        raise ConvertError(f"{path} is no safetensors file; download it again")
    if 8 + n_header > size:
        raise ConvertError(f"{path} is cut short within its header; download it again")
    try:
        header = json.loads(os.pread(fd, n_header, 8), object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} has a damaged header ({error}); download it again") from None
    header.pop("__metadata__", None)
    tensors = sorted(
        (_tensor(path, name, entry, 8 + n_header) for name, entry in header.items()), key=lambda t: t.offset
    )
    at = 8 + n_header
    for tensor in tensors:
        if tensor.offset != at:
            raise ConvertError(f"{tensor} does not start where the one before it ends; download it again")
        at += tensor.n_bytes
    if at != size:
        word = "is cut short" if size < at else "is longer than its tensors"
        raise ConvertError(f"{path} {word}: {size:,} bytes, expected {at:,}; download it again")
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        item = _STORAGE[dtype].itemsize if dtype in _STORAGE else _OTHER_SIZES[dtype]
        sizes = [*shape, begin, end]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in sizes):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ConvertError(
            f"{path} describes tensor {show(name)} in a way that is not known; download it again"
        ) from None
    tensor = StoredTensor(name, dtype, tuple(shape), path, data_start + begin, end - begin)
    if tensor.n_bytes != prod(shape) * item or 0 in shape:
        raise ConvertError(
            f"{tensor} has {tensor.n_bytes} bytes, which its shape {tensor.shape} does not fit; download it again"
        )
    return tensor


def _not_finite(tensor: StoredTensor) -> ConvertError:
    return ConvertError(f"{tensor} has a weight that is NaN or infinite; the checkpoint is damaged, download it again")


def _read_exactly(fd: int, into: memoryview, offset: int, tensor: StoredTensor) -> None:
    while into:
        try:
            n_read = os.preadv(fd, [into], offset)
        except OSError as error:
            raise ConvertError(f"{tensor} cannot be read: {error.strerror}; check the disk") from None
        if not n_read:
            raise ConvertError(f"{tensor} ends early: the file changed while it was read; run the conversion again")
        into, offset = into[n_read:], offset + n_read


def _from_bfloat16(raw: Raw) -> Floats:
    bits = raw.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


@functools.cache
def _float8_values() -> Floats:
    """All 256 values of float8 E4M3 (no infinities; the two codes with all bits set are NaN)."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    values = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    values[(code & 127) == 127] = np.nan
    return np.where(code < 128, values, -values).astype(np.float32)
