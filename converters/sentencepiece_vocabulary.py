"""SentencePiece's BPE as llama.cpp does it ("llama"): pieces with scores, the highest of a text's pairs merged first.

The pieces come from ``tokenizer.model``, or from a ``tokenizer.json`` that was made of one. The latter has merges in
place of scores, so scores are made of them: a piece's rank, counted down from 0 as SentencePiece's trainer does it.
(llama.cpp's own converter gives every piece the same score then, which merges in another order.) With both files there,
``tokenizer.json`` tells how text is prepared, for it is what `transformers` goes by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from edgemoe.converters.sentencepiece_model import BPE, Piece, PieceType, SentencePieceModel
from edgemoe.converters.tokenizer_files import TokenizerFiles, merged_pairs, numbered_tokens, steps
from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["ADDED_SCORE", "SPACE", "SentencePieceVocabulary"]

ADDED_SCORE = -1000.0
SPACE = "\u2581"

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True, slots=True)
class SentencePieceVocabulary:
    """What a checkpoint's SentencePiece files say.

    Attributes
    ----------
    pieces : dict of int to Piece
        By number; added tokens are not among them.
    special_ids : dict of str to int
        Numbers of "unk", "bos", "eos" and "pad" as far as the model itself names them.
    add_space_prefix : bool
        Whether a space is put before the text.
    """

    pieces: dict[int, Piece]
    special_ids: Mapping[str, int]
    add_space_prefix: bool

    @classmethod
    def of(cls, files: TokenizerFiles) -> SentencePieceVocabulary:
        """Read a checkpoint's SentencePiece files.

        Raises
        ------
        ConvertError
            If llama.cpp would cut text into other pieces, or the files contradict each other.
        """
        if files.sentencepiece is None:
            found = cls(_pieces_of_json(files), {}, _space_prefix(files))
        else:
            model = SentencePieceModel.read(files.sentencepiece)
            _check_model(files, model)
            prefix = files.config.get("add_prefix_space")
            if files.tokenizer:
                prefix = _space_prefix(files)
            elif not isinstance(prefix, bool):
                prefix = model.add_dummy_prefix
            found = cls(dict(enumerate(map(_prepared, model.pieces))), model.special_ids, prefix)
        if not _BYTES.issubset(piece.text for piece in found.pieces.values()):
            raise ConvertError(
                f"{files.folder} has no token for each byte (<0x00> and so on), and llama.cpp has no other way to spell"
                " unknown characters; train the tokenizer with byte fallback"
            )
        return found


def _prepared(piece: Piece) -> Piece:
    """Have a user's own piece match text as it is: llama.cpp looks for it before spaces are replaced."""
    if piece.type == PieceType.USER_DEFINED:
        return Piece(piece.text.replace(SPACE, " "), piece.score, piece.type)
    return piece


def _check_model(files: TokenizerFiles, model: SentencePieceModel) -> None:
    path = files.sentencepiece
    if model.model_type != BPE:
        raise ConvertError(
            f"{path} is no BPE model (type {model.model_type}), and llama.cpp runs Unigram and the like for encoders"
            " only; use a checkpoint with a BPE tokenizer"
        )
    if model.whitespace_as_suffix:
        raise ConvertError(f"{path} puts spaces behind words, which llama.cpp does not; use another tokenizer")
    if not files.tokenizer:
        if model.normalizes:
            raise ConvertError(
                f"{path} normalizes text or drops repeated spaces, which llama.cpp does not; train the tokenizer with"
                " the identity normalizer and without remove_extra_whitespaces, or add a tokenizer.json without them"
            )
        return
    vocab, added = files.tokenizer["model"]["vocab"], {token.id for token in files.added_tokens()}
    for number, piece in enumerate(model.pieces):
        if number not in added and vocab.get(piece.text) != number:
            raise ConvertError(
                f"{path} and {files.json_path} differ in token {number} ({show(piece.text)}); remove the wrong one"
            )


def _pieces_of_json(files: TokenizerFiles) -> dict[int, Piece]:
    model = files.tokenizer["model"]
    tokens = numbered_tokens(model)
    normal = {text for text in tokens.values() if text not in _BYTES and text != model.get("unk_token")}
    ranks = _ranks(merged_pairs(files), normal, files)
    pieces = {}
    for number in sorted(tokens):
        text = tokens[number]
        if text in normal:
            pieces[number] = Piece(text, -float(ranks.setdefault(text, len(ranks))), PieceType.NORMAL)
        else:
            pieces[number] = Piece(text, 0.0, PieceType.BYTE if text in _BYTES else PieceType.UNKNOWN)
    return pieces


def _ranks(pairs: Sequence[tuple[str, str]], normal: set[str], files: TokenizerFiles) -> dict[str, int]:
    """Rank the pieces that come about by merging; refuses merges that no scores stand for.

    With scores any two pieces are merged whose text is a piece, at that piece's rank. So every such pair must be among
    the merges, and a piece's pairs must follow one another.
    """
    products = [left + right for left, right in pairs]
    ranks = {text: rank for rank, (text, _) in enumerate(groupby(products))}
    listed = set(pairs)
    for text in ranks:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if normal.issuperset(pair) and pair not in listed:
                raise ConvertError(
                    f"{files.json_path} does not merge {show(pair[0])} and {show(pair[1])}, which llama.cpp's"
                    " SentencePiece tokenizer would; add the tokenizer.model that it was made of"
                )
    if len(ranks) != len(list(groupby(products))):
        raise ConvertError(
            f"{files.json_path} has merges in an order that no scores stand for; add the tokenizer.model that it was"
            " made of"
        )
    return ranks


def _space_prefix(files: TokenizerFiles) -> bool:
    """Tell whether text gets a space before it; refuses ways to prepare text that llama.cpp does not have."""

    def refuse(step: Mapping[str, Any]) -> ConvertError:
        return ConvertError(
            f"{files.json_path} prepares text by {show(str(dict(step)))}, which llama.cpp's SentencePiece tokenizer"
            " does not; use a checkpoint whose tokenizer only replaces spaces"
        )

    prefix = False
    for step in steps(files.tokenizer.get("normalizer"), "normalizers"):
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                pass
            case _:
                raise refuse(step)
    for step in steps(files.tokenizer.get("pre_tokenizer"), "pretokenizers"):
        match step:
            # Words are cut apart before each space, which changes nothing where pieces have none within.
            case {"type": "Metaspace", "replacement": "\u2581"} if not step.get("split", True) or not any(
                SPACE in text[1:] for text in files.tokenizer["model"]["vocab"]
            ):
                prefix = step.get("prepend_scheme", "always") != "never"
            case _:
                raise refuse(step)
    return prefix
