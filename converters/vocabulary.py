"""The vocabulary of a checkpoint as GGUF metadata: tokens, merges or scores, special tokens, chat templates.

Two kinds of tokenizer are known, under the names that llama.cpp gives them (src/llama-vocab.cpp): "gpt2", BPE over
bytes that are spelled as letters, and "llama", SentencePiece's BPE. llama.cpp does the tokenizing, so what it would do
otherwise than the checkpoint's own tokenizer is refused, as far as the files tell. What it has no place for is left
out: spaces that added tokens swallow (``lstrip``, ``rstrip``), and tokens that are whole words only (``single_word``).
Its SentencePiece tokenizer puts a space not only before the text but after every special token too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf.constants import GGUFValueType as Kind
from gguf.constants import Keys

from edgemoe.converters.chat_template import DEFAULT, chat_templates
from edgemoe.converters.gguf_file import Metadata, Value
from edgemoe.converters.pre_tokenizer import pre_tokenizer_name
from edgemoe.converters.sentencepiece_model import Piece, PieceType
from edgemoe.converters.sentencepiece_vocabulary import ADDED_SCORE, SPACE, SentencePieceVocabulary
from edgemoe.converters.special_tokens import SpecialTokens, special_tokens
from edgemoe.converters.tokenizer_files import AddedToken, TokenizerFiles, merged_pairs, numbered_tokens
from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["vocabulary_metadata"]

_UNUSED_SCORE = -10000.0

_Tokens = dict[int, Piece]


def vocabulary_metadata(folder: Path, architecture: str, n_vocab: int) -> Metadata:
    """Turn the tokenizer and the chat templates of a checkpoint into GGUF metadata.

    Parameters
    ----------
    folder : Path
        The checkpoint, as Hugging Face keeps it.
    architecture : str
        ``general.architecture`` of the GGUF to be.
    n_vocab : int
        Rows of the token embedding; unused tokens are added up to that many.

    Returns
    -------
    Metadata
        The keys below ``tokenizer.``, with `n_vocab` tokens.

    Raises
    ------
    ConvertError
        If there is no tokenizer, it is damaged or has more than `n_vocab` tokens, or llama.cpp has none of its kind.
    """
    try:
        files = TokenizerFiles.read(folder)
        if _is_sentencepiece(files):
            metadata = _sentencepiece(files, n_vocab)
        else:
            metadata = _byte_level(files, architecture, n_vocab)
        return metadata | _chat_templates(files)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ConvertError(
            f"the tokenizer's files in {folder} are not laid out as they should be"
            f" ({type(error).__name__}: {show(str(error))}); download them again"
        ) from None


def _is_sentencepiece(files: TokenizerFiles) -> bool:
    if not files.tokenizer:
        return True
    model = files.tokenizer["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ConvertError(
            f"{files.json_path} is a tokenizer of type {show(str(kind))}, and llama.cpp has none like it for models"
            " that write text; use a checkpoint with a byte-level or SentencePiece BPE tokenizer"
        )
    return bool(model.get("byte_fallback"))


def _byte_level(files: TokenizerFiles, architecture: str, n_vocab: int) -> Metadata:
    pre = pre_tokenizer_name(files.tokenizer, files.json_path, architecture)
    tokens = {
        number: Piece(text, 0.0, PieceType.NORMAL) for number, text in numbered_tokens(files.tokenizer["model"]).items()
    }
    for added in files.added_tokens():
        if added.id in tokens and tokens[added.id].text != added.text:
            raise ConvertError(
                f"token {added.id} of {files.json_path} is {show(tokens[added.id].text)} in the vocabulary and"
                f" {show(added.text)} among the added tokens; correct the tokenizer's files"
            )
        kind = PieceType.CONTROL if added.special else PieceType.USER_DEFINED
        tokens[added.id] = Piece(added.text, 0.0, kind)
    listed = _listed(files, tokens, n_vocab)
    return {
        Keys.Tokenizer.MODEL: Value("gpt2", Kind.STRING),
        Keys.Tokenizer.PRE: Value(pre, Kind.STRING),
        **_token_arrays(listed),
        Keys.Tokenizer.MERGES: Value([" ".join(pair) for pair in merged_pairs(files)], Kind.ARRAY, Kind.STRING),
        **_special(special_tokens(files, _numbers(tokens))),
    }


def _sentencepiece(files: TokenizerFiles, n_vocab: int) -> Metadata:
    vocabulary = SentencePieceVocabulary.of(files)
    tokens = vocabulary.pieces
    tokens |= {added.id: _matched(added) for added in files.added_tokens()}
    listed = _listed(files, tokens, n_vocab)
    return {
        Keys.Tokenizer.MODEL: Value("llama", Kind.STRING),
        Keys.Tokenizer.PRE: Value("default", Kind.STRING),
        **_token_arrays(listed),
        Keys.Tokenizer.SCORES: Value([piece.score for piece in listed], Kind.ARRAY, Kind.FLOAT32),
        **_special(special_tokens(files, _numbers(tokens), vocabulary.special_ids)),
        Keys.Tokenizer.ADD_PREFIX: Value(vocabulary.add_space_prefix, Kind.BOOL),
    }


def _matched(added: AddedToken) -> Piece:
    """Make a piece of an added token; llama.cpp looks for a user's own before spaces are replaced."""
    if added.special:
        return Piece(added.text, ADDED_SCORE, PieceType.CONTROL)
    return Piece(added.text.replace(SPACE, " "), ADDED_SCORE, PieceType.USER_DEFINED)


def _listed(files: TokenizerFiles, tokens: _Tokens, n_vocab: int) -> list[Piece]:
    """Put tokens in order, `n_vocab` of them; refuses those that llama.cpp could not tell apart."""

    def refuse(what: str, step: str) -> ConvertError:
        return ConvertError(f"the tokenizer of {files.folder} {what}; {step}")

    highest = max(tokens)
    if highest >= n_vocab:
        raise refuse(
            f"has token {highest} ({show(tokens[highest].text)}), but the model only {n_vocab} embeddings",
            "use the tokenizer that belongs to these weights",
        )
    numbers: dict[str, int] = {}
    for number in range(highest):
        if number not in tokens:
            raise refuse(f"has {highest} as its highest token but no token {number}", "download its files again")
    for number, piece in tokens.items():
        known = numbers.setdefault(piece.text, number)
        if known != number:
            raise refuse(f"has {show(piece.text)} twice, as tokens {known} and {number}", "correct its files")
        if "\0" in piece.text:
            raise refuse(f"has a NUL character in token {number}, where llama.cpp ends it", "correct its files")
    for number in range(highest + 1, n_vocab):
        tokens[number] = Piece(f"[PAD{number}]", _UNUSED_SCORE, PieceType.UNUSED)
        if tokens[number].text in numbers:
            raise refuse(f"has a token {tokens[number].text}, the name of an unused one", "rename the token")
    return [tokens[number] for number in range(n_vocab)]


def _numbers(tokens: _Tokens) -> Mapping[str, int]:
    return {piece.text: number for number, piece in tokens.items() if piece.type != PieceType.UNUSED}


def _token_arrays(listed: list[Piece]) -> Metadata:
    return {
        Keys.Tokenizer.LIST: Value([piece.text for piece in listed], Kind.ARRAY, Kind.STRING),
        Keys.Tokenizer.TOKEN_TYPE: Value([int(piece.type) for piece in listed], Kind.ARRAY, Kind.INT32),
    }


def _special(special: SpecialTokens) -> Metadata:
    ids = {
        getattr(Keys.Tokenizer, f"{kind.upper()}_ID"): Value(number, Kind.UINT32)
        for kind, number in special.ids.items()
    }
    return ids | {
        Keys.Tokenizer.ADD_BOS: Value(special.add_bos, Kind.BOOL),
        Keys.Tokenizer.ADD_EOS: Value(special.add_eos, Kind.BOOL),
    }


def _chat_templates(files: TokenizerFiles) -> Metadata:
    templates = chat_templates(files)
    main = templates.pop(DEFAULT, None)
    metadata = {
        Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): Value(text, Kind.STRING) for name, text in templates.items()
    }
    if templates:
        metadata[Keys.Tokenizer.CHAT_TEMPLATES] = Value(list(templates), Kind.ARRAY, Kind.STRING)
    if main is not None:
        metadata[Keys.Tokenizer.CHAT_TEMPLATE] = Value(main, Kind.STRING)
    return metadata
