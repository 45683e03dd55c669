"""The reader of SentencePiece models agrees with the sentencepiece package; damage costs no more than a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import train_sentencepiece

from edgemoe.converters.sentencepiece_model import BPE, PieceType, SentencePieceModel
from edgemoe.errors import ConvertError


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(vocab_size=600, user_defined_symbols=["<sep>"], control_symbols=["<ctl>"], pad_id=3)


def read(path: Path, data: bytes) -> SentencePieceModel:
    path.write_bytes(data)
    return SentencePieceModel.read(path)


def test_same_as_sentencepiece(tmp_path: Path, model: bytes) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    kinds = {
        PieceType.UNKNOWN: pieces.is_unknown,
        PieceType.CONTROL: pieces.is_control,
        PieceType.UNUSED: pieces.is_unused,
        PieceType.BYTE: pieces.is_byte,
    }
    found = read(tmp_path / "tokenizer.model", model)
    assert [piece.text for piece in found.pieces] == [pieces.id_to_piece(i) for i in range(len(pieces))]
    assert [piece.score for piece in found.pieces] == [pieces.get_score(i) for i in range(len(pieces))]
    for number, piece in enumerate(found.pieces):
        assert [kind for kind, holds in kinds.items() if holds(number)] == ([piece.type] if piece.type in kinds else [])
    assert [piece.text for piece in found.pieces if piece.type == PieceType.USER_DEFINED] == ["<sep>"]
    assert found.special_ids == {"unk": 0, "bos": 1, "eos": 2, "pad": 3}


def test_settings(tmp_path: Path, model: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    plain = read(path, model)
    assert (plain.model_type, plain.normalizes, plain.add_dummy_prefix, plain.whitespace_as_suffix) == (
        BPE, False, True, False,
    )  # fmt: skip
    assert read(path, train_sentencepiece(model_type="char")).model_type != BPE
    assert read(path, train_sentencepiece(normalization_rule_name="nfkc")).normalizes
    assert read(path, train_sentencepiece(remove_extra_whitespaces=True)).normalizes
    assert not read(path, train_sentencepiece(add_dummy_prefix=False)).add_dummy_prefix
    assert read(path, train_sentencepiece(treat_whitespace_as_suffix=True)).whitespace_as_suffix
    assert read(path, train_sentencepiece(bos_id=-1)).special_ids == {"unk": 0, "eos": 2}


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage(tmp_path_factory: pytest.TempPathFactory, model: bytes, data: st.DataObject) -> None:
    damaged = bytearray(model[: data.draw(st.integers(0, len(model)))])
    for at in data.draw(st.lists(st.integers(0, max(len(damaged) - 1, 0)), max_size=4)):
        damaged[at : at + 1] = data.draw(st.binary(min_size=1, max_size=3))
    try:
        read(tmp_path_factory.mktemp("damage") / "tokenizer.model", bytes(damaged))
    except ConvertError as error:
        assert "\n" not in str(error) and "; " in str(error)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",  # a piece without its length
        b"\x0a\x7fab",  # a piece longer than the file
        b"\x0a\x00",  # an empty piece
        b"\x0a\x02\x0a\x00\x13",  # a group, which no field is
        b"\x08\x01",  # pieces that are a number
        b"\x0a\x04\x0a\x02\xff\xfe",  # no UTF-8
        b"\x0a\x04\x0a\x00\x18\x09",  # a type that is none
        b"\x0a\x04\x0a\x00\x10\x01",  # a score that is a number
        b"\x0a\x05\x0a\x00\x12\x01\x00",  # a score of one byte
        b"\xff" * 20,
    ],
)
def test_no_model(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ConvertError, match="no SentencePiece model"):
        read(tmp_path / "tokenizer.model", data)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="cannot be read"):
        SentencePieceModel.read(tmp_path)
