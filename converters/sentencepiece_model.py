"""Reads SentencePiece models (``tokenizer.model``): the few fields of the protobuf message that a vocabulary needs.

Source: sentencepiece_model.proto (google/sentencepiece) for the field numbers and their defaults, protocol buffers'
encoding for the rest. So small a reader needs neither package, and all that a damaged file can do is raise.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from edgemoe.errors import ConvertError

__all__ = ["BPE", "Piece", "PieceType", "SentencePieceModel"]

_MAX_BYTES = 100_000_000

BPE = 2  # TrainerSpec.ModelType; 1 is unigram, 3 words, 4 characters

# Field numbers of ModelProto, its SentencePiece, its TrainerSpec and its NormalizerSpec.
_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX = 3, 24
_SPECIAL_IDS = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}  # and their defaults
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 2, 3, 4

Field = int | bytes


class PieceType(IntEnum):
    """What a piece is; the numbers are SentencePiece's and llama.cpp's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the vocabulary.

    Attributes
    ----------
    text : str
        With U+2581 for a space.
    score : float
        Of two pairs that could be merged, the one whose piece has the higher score is merged first.
    type : PieceType
        What it is.
    """

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A SentencePiece model.

    Attributes
    ----------
    pieces : tuple of Piece
        The vocabulary; a piece's number is its place.
    model_type : int
        `BPE` or another one.
    special_ids : dict of str to int
        Numbers of "unk", "bos", "eos" and "pad" as far as there are such pieces.
    normalizes : bool
        Whether text is changed first: mapped by tables (NFKC and the like) or stripped of repeated spaces.
    add_dummy_prefix : bool
        Whether a space is put before the text.
    whitespace_as_suffix : bool
        Whether words end with their space instead of starting with it.
    """

    pieces: tuple[Piece, ...]
    model_type: int
    special_ids: dict[str, int]
    normalizes: bool
    add_dummy_prefix: bool
    whitespace_as_suffix: bool

    @classmethod
    def read(cls, path: Path) -> SentencePieceModel:
        """Read a model.

        Raises
        ------
        ConvertError
            If the file cannot be read or is no SentencePiece model.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"more than {_MAX_BYTES:,} bytes")
            return cls._parse(path.read_bytes())
        except OSError as error:
            raise ConvertError(f"{path} cannot be read: {error.strerror}; check the file") from None
        except (LookupError, TypeError, ValueError, struct.error) as error:
            raise ConvertError(f"{path} is no SentencePiece model ({error}); download it again") from None

    @classmethod
    def _parse(cls, data: bytes) -> SentencePieceModel:
        pieces: list[Piece] = []
        trainer: dict[int, Field] = {}
        normalizer: dict[int, Field] = {}
        for number, value in _fields(data):
            if number == _PIECES:
                pieces.append(_piece(_bytes(value)))
            elif number == _TRAINER_SPEC:
                trainer.update(_fields(_bytes(value)))
            elif number == _NORMALIZER_SPEC:
                normalizer.update(_fields(_bytes(value)))
        if not pieces:
            raise ValueError("no pieces in it")
        ids = {name: _integer(trainer.get(number, default)) for name, (number, default) in _SPECIAL_IDS.items()}
        return cls(
            tuple(pieces),
            _integer(trainer.get(_MODEL_TYPE, 1)),
            {name: number for name, number in ids.items() if 0 <= number < len(pieces)},
            bool(normalizer.get(_CHARSMAP)) or bool(normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1)),
            bool(normalizer.get(_DUMMY_PREFIX, 1)),
            bool(trainer.get(_WHITESPACE_AS_SUFFIX, 0)),
        )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _bytes(fields.get(_SCORE, bytes(4))))
    return Piece(_bytes(fields[_TEXT]).decode(), score, PieceType(_integer(fields.get(_TYPE, 1))))


def _bytes(value: Field) -> bytes:
    if isinstance(value, int):
        raise TypeError("a field is of another type")
    return value


def _integer(value: Field) -> int:
    if not isinstance(value, int):
        raise TypeError("a field is of another type")
    return value - (1 << 64) if value >> 63 else value  # a negative int32 is written as 64 bits


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """Take a message apart: numbers of its fields and their values, fixed ones as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                n_bytes = 8
            case 2:
                n_bytes, at = _varint(data, at)
            case 5:
                n_bytes = 4
            case kind:
                raise ValueError(f"no field has the type {kind}")
        if n_bytes > len(data) - at:
            raise ValueError("it is cut short")
        yield key >> 3, data[at : at + n_bytes]
        at += n_bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("it is cut short")
