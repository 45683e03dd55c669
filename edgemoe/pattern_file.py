"""The ``.pattern`` file: one task's `Pattern` in a safetensors container that ends in its own checksum.

============================ =============== ========================================================================
array                        type, shape     content
============================ =============== ========================================================================
vector                       F32 [N]         exact scores of the first MoE layer
permutations                 U8/U16 [L-1, N] ranks of the later layers
scores, score_scales         F16 [C, L, N],  score = half * scale, with scale the largest magnitude of its layer
                             F32 [C, L]
piece_document, .._tokens,   I32 [P],        see `DocumentShares`
.._shares                    F16 [P, L, N]
sensitivity_sizes, .._loss   I32 [G],        see `LossCurves`; left out where they were not measured
                             F32 [L, G]
sha256                       U8 [32]         of everything before it
============================ =============== ========================================================================

All else is JSON text under the metadata key ``edgemoe_pattern``. A file may come from a stranger: its size is limited
before it is read, its checksum compared before it is parsed, and every value checked before it is used; nothing in it
is a path or is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt

from edgemoe.atomic_file import atomic_file
from edgemoe.errors import AllocationError, PatternError
from edgemoe.evidence import DocumentShares, QualityRow, Source
from edgemoe.fingerprint import ModelFingerprint
from edgemoe.loss_curves import LossCurves
from edgemoe.pattern import Pattern

__all__ = ["SUFFIX", "VERSION", "decode", "encode", "read_pattern", "write_pattern"]

SUFFIX = ".pattern"
VERSION = 1
"""Format version; a reader refuses newer ones."""

_MAX_BYTES = 128 << 20
_MAX_HEADER_BYTES = 1 << 20
_KEY = "edgemoe_pattern"
_DIGEST_BYTES = 32
# Types, number of dimensions.
_ARRAYS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "vector": (("float32",), 1),
    "permutations": (("uint8", "uint16"), 2),
    "scores": (("float16",), 3),
    "score_scales": (("float32",), 2),
    "piece_document": (("int32",), 1),
    "piece_tokens": (("int32",), 1),
    "piece_shares": (("float16",), 3),
    "sha256": (("uint8",), 1),
}
_SENSITIVITY_ARRAYS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "sensitivity_sizes": (("int32",), 1),
    "sensitivity_loss": (("float32",), 2),
}

Arrays = dict[str, npt.NDArray[Any]]
Record = TypeVar("Record", ModelFingerprint, Source, QualityRow)


def read_pattern(path: str | os.PathLike[str]) -> Pattern:
    """Read a pattern file, which may be damaged or hostile.

    Raises
    ------
    PatternError
        If it cannot be read, is damaged, is no pattern, or is of a newer format version.
    """
    path = Path(path)
    try:
        status = path.stat()
        # Opening a pipe or a device could block for ever.
        if not stat.S_ISREG(status.st_mode):
            raise PatternError(f"{path} is not a regular file, expected an edgemoe pattern; give the path of one")
        if status.st_size > _MAX_BYTES:
            raise PatternError(
                f"{path} has {status.st_size} bytes, no pattern is above {_MAX_BYTES >> 20} MiB;"
                " give the path of a pattern"
            )
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except FileNotFoundError:
        raise PatternError(f"{path} does not exist; check the path of the pattern") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PatternError(f"{path} cannot be read: {reason}; check the path and its permissions") from None
    except ValueError:  # a NUL character, or text that no file name can hold
        raise PatternError(f"{str(path)!a} cannot be a file name; check the path of the pattern") from None
    try:
        return decode(data)
    except PatternError as error:
        raise PatternError(f"{path} {error}") from None


def write_pattern(pattern: Pattern, path: str | os.PathLike[str]) -> None:
    """Write a pattern file; a reader sees the old one or the new one, never a part.

    Raises
    ------
    PatternError
        If the folder or the disk refuses it.
    """
    path = Path(path)
    data = encode(pattern)
    try:
        with atomic_file(path) as file:
            file.write(data)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PatternError(f"{path} cannot be written: {reason}; check the folder and the disk") from None


def encode(pattern: Pattern) -> bytes:
    """Give the bytes of a pattern's file; the same pattern gives the same bytes.

    Raises
    ------
    PatternError
        If they would be more than a reader accepts.
    """
    from safetensors.numpy import save

    scores = np.stack(list(pattern.scores.values()))
    scales = np.abs(scores).max(axis=2)
    documents, sensitivity = pattern.documents, pattern.sensitivity
    arrays: Arrays = {
        "vector": pattern.vector,
        "permutations": pattern.permutations,
        "scores": (scores / np.where(scales > 0, scales, 1)[..., None]).astype(np.float16),
        "score_scales": scales,
        "piece_document": documents.document,
        "piece_tokens": documents.tokens,
        "piece_shares": documents.shares,
        "sha256": np.zeros(_DIGEST_BYTES, np.uint8),
    }
    if sensitivity is not None:
        arrays["sensitivity_sizes"] = np.array(sensitivity.sizes, np.int32)
        arrays["sensitivity_loss"] = sensitivity.loss.astype(np.float32)
    facts = {
        "version": VERSION,
        "task": pattern.task,
        "fingerprint": asdict(pattern.fingerprint),
        "criterion": pattern.criterion,
        "criteria": list(pattern.scores),
        "sources": [asdict(source) for source in pattern.sources],
        "quality": [asdict(row) for row in pattern.quality],
    }
    little_endian = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    # Safetensors puts wide types first and then goes by name, so sha256 comes last.
    data = save(little_endian, {_KEY: json.dumps(facts)})[:-_DIGEST_BYTES]
    if len(data) + _DIGEST_BYTES > _MAX_BYTES:
        raise PatternError(
            f"task {pattern.task!r} takes {len(data) >> 20} MiB, more than a pattern file's {_MAX_BYTES >> 20} MiB;"
            " keep fewer documents or criteria"
        )
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise PatternError(
            f"task {pattern.task!r} takes {header_bytes:,} bytes for the header of its file, more than"
            f" {_MAX_HEADER_BYTES:,}; merge fewer tasks or keep fewer quality rows"
        )
    return data + hashlib.sha256(data).digest()


def decode(data: bytes) -> Pattern:
    """Give the pattern of a file's bytes.

    Raises
    ------
    PatternError
        With the rest of a sentence that begins with the file's name.
    """
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if len(body) < 8 or hashlib.sha256(body).digest() != digest:
        raise PatternError("is damaged or no edgemoe pattern: its checksum is wrong; get it again or profile the task")
    try:
        return _decode_checked(data)
    except _NewerVersionError as error:
        raise PatternError(
            f"is a pattern of format version {error}, this edgemoe reads up to {VERSION}; upgrade edgemoe"
        ) from None
    except PatternError as error:
        found = str(error)
    # The checksum holds, so somebody wrote what no edgemoe writes.
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
        found = "it is not built like one"
    raise PatternError(f"is no sound edgemoe pattern: {found}; get it from another source or profile the task")


class _NewerVersionError(PatternError):
    """The file is of a version that this code does not know; its text is the version."""


def _decode_checked(data: bytes) -> Pattern:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise PatternError(f"its header has {header_bytes} bytes, at most {_MAX_HEADER_BYTES} are allowed")
    facts = json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"][_KEY])
    version = facts["version"]
    if type(version) is not int or version < 1:
        raise PatternError("its version is no number")
    if version > VERSION:
        raise _NewerVersionError(str(min(version, 10**9)))
    try:
        arrays = load(data)
    except SafetensorError:
        raise PatternError("its arrays do not fit the file") from None
    _check_arrays(arrays)
    fingerprint = _record(ModelFingerprint, facts["fingerprint"])
    criteria = _texts(facts["criteria"])
    scores = _scores(arrays, criteria)
    documents = DocumentShares(arrays["piece_document"], arrays["piece_tokens"], arrays["piece_shares"])
    task, criterion = _texts([facts["task"], facts["criterion"]])
    return Pattern(
        task=task,
        fingerprint=fingerprint,
        criterion=criterion,
        scores=scores,
        vector=arrays["vector"],
        permutations=arrays["permutations"],
        sources=tuple(_record(Source, raw) for raw in facts["sources"]),
        documents=documents,
        sensitivity=_loss_curves(arrays, fingerprint.n_expert) if "sensitivity_sizes" in arrays else None,
        quality=tuple(_record(QualityRow, raw) for raw in facts["quality"]),
    )


def _check_arrays(arrays: Arrays) -> None:
    expected = dict(_ARRAYS)
    if arrays.keys() & _SENSITIVITY_ARRAYS:
        expected |= _SENSITIVITY_ARRAYS
    if arrays.keys() != expected.keys():
        raise PatternError("an array is missing or not known")
    for name, (types, n_dims) in expected.items():
        array = arrays[name]
        if array.dtype.name not in types or array.ndim != n_dims:
            raise PatternError(f"its array {name} is {array.dtype} with {array.ndim} dimensions")


def _scores(arrays: Arrays, criteria: list[str]) -> dict[str, npt.NDArray[np.float32]]:
    halves, scales = arrays["scores"], arrays["score_scales"]
    if len(set(criteria)) != len(criteria) or halves.shape[:2] != scales.shape or len(halves) != len(criteria):
        raise PatternError("its scores are not one table and one column of scales for each criterion")
    # Together these keep every product finite.
    if not (np.isfinite(scales).all() and (np.abs(halves) <= 1).all()):
        raise PatternError("its scores are out of range")
    return {
        name: half.astype(np.float32) * scale[:, None]
        for name, half, scale in zip(criteria, halves, scales, strict=True)
    }


def _loss_curves(arrays: Arrays, n_expert: int) -> LossCurves:
    sizes, loss = arrays["sensitivity_sizes"], arrays["sensitivity_loss"]
    try:
        # Bounded first: as Python integers they take ten times the memory.
        return LossCurves(tuple(sizes[: n_expert + 1].tolist()), loss.astype(np.float64))
    except AllocationError:
        raise PatternError("its loss curves contradict themselves") from None


def _texts(raw: object) -> list[str]:
    if not isinstance(raw, list) or not all(isinstance(text, str) for text in raw):
        raise PatternError("a name in it is no text")
    return raw


def _record(kind: type[Record], raw: object) -> Record:
    """Make a dataclass of a JSON object that has exactly its fields, each of its type."""
    hints = get_type_hints(kind)
    if not isinstance(raw, dict) or raw.keys() != hints.keys():
        raise PatternError(f"its {kind.__name__} does not have the fields it needs")
    return kind(**{name: _value(hint, raw[name], name) for name, hint in hints.items()})


def _value(hint: object, raw: Any, name: str) -> Any:
    if hint == tuple[int, ...] and isinstance(raw, list) and all(map(_is_int, raw)):
        return tuple(raw)
    if hint in (float, float | None) and (type(raw) is float or _is_int(raw)):
        return float(raw)
    if (hint is int and _is_int(raw)) or (hint in (str, bool) and type(raw) is hint):
        return raw
    if hint == float | None and raw is None:
        return None
    raise PatternError(f"its field {name} is of another type")


def _is_int(raw: object) -> bool:
    return type(raw) is int and abs(raw) < 1 << 63
