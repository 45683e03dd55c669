"""Special tokens of a checkpoint: which ones begin and end a text, and whether the tokenizer adds them by itself.

Numbers are looked up where `transformers` looks: by text in ``tokenizer_config.json`` and ``special_tokens_map.json``,
then by number in ``config.json`` and ``generation_config.json``. What is added is what the post-processor of
``tokenizer.json`` adds. (`gguf.SpecialVocab` reads two of these files; where it finds something, it finds the same.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgemoe.converters.tokenizer_files import TokenizerFiles, steps
from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["SpecialTokens", "special_tokens"]

_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
# Their tokenizers add what tokenizer_config.json says where tokenizer.json has no template: DeepSeek's rely on it.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Special tokens in llama.cpp's terms.

    Attributes
    ----------
    ids : dict of str to int
        Numbers of "bos", "eos", "eot", "eom", "unk", "sep", "pad", "mask", as far as there are such tokens. "eot" and
        "eom" are the further tokens that end an answer, in the order of ``generation_config.json``; llama.cpp finds
        more of them by their text.
    add_bos, add_eos : bool
        Whether "bos" is put before every text and "eos" behind it.
    """

    ids: dict[str, int]
    add_bos: bool
    add_eos: bool


def special_tokens(
    files: TokenizerFiles, numbers: Mapping[str, int], defaults: Mapping[str, int] | None = None
) -> SpecialTokens:
    """Find a checkpoint's special tokens.

    Parameters
    ----------
    files : TokenizerFiles
        The tokenizer's files.
    numbers : Mapping of str to int
        All tokens: their numbers by text.
    defaults : Mapping of str to int, optional
        What a SentencePiece model itself says, by kind.

    Raises
    ------
    ConvertError
        If no token ends a text, or one is to be added that is not there.
    """
    known = set(numbers.values())
    ids = {}
    for kind in _KINDS:
        candidates = [number for number in _candidates(files, numbers, kind) if number in known]
        if candidates:
            ids[kind] = candidates[0]
        elif defaults and kind in defaults:
            ids[kind] = defaults[kind]
    added = _added(files)
    if added is None:
        add_bos, add_eos = _flags(files)
    else:
        before, after = added
        # llama.cpp adds one token at each end; of more than one (ChatGLM), none: chat templates write them out.
        ids.update({kind: ends[0] for kind, ends in (("bos", before), ("eos", after)) if len(ends) == 1})
        add_bos, add_eos = len(before) == 1, len(after) == 1
    if "eos" not in ids:
        raise ConvertError(
            f"{files.folder} names no token that ends a text, and llama.cpp would take token 11 for it; name the"
            " eos_token in tokenizer_config.json"
        )
    if add_bos and "bos" not in ids:
        raise ConvertError(
            f"{files.folder} wants a token put before every text but names none; name the bos_token in"
            " tokenizer_config.json or set add_bos_token to false there"
        )
    ends = dict.fromkeys(number for number in _ends(files) if number in known and number != ids["eos"])
    ids |= dict(zip(("eot", "eom"), ends, strict=False))
    return SpecialTokens(ids, add_bos, add_eos)


def _candidates(files: TokenizerFiles, numbers: Mapping[str, int], kind: str) -> Iterator[int]:
    for key, text in files.named_tokens():
        if key == f"{kind}_token" and text in numbers:
            yield numbers[text]
    for source in (files.model_config, files.model_config.get("text_config") or {}, files.generation):
        yield from _numbers(source.get(f"{kind}_token_id"))


def _ends(files: TokenizerFiles) -> Iterator[int]:
    """Give every token that ends an answer."""
    for source in (files.generation, files.model_config, files.model_config.get("text_config") or {}):
        yield from _numbers(source.get("eos_token_id"))


def _numbers(value: Any) -> list[int]:
    """Give a number, or several, as a list; there may be none."""
    return [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]


def _added(files: TokenizerFiles) -> tuple[list[int], list[int]] | None:
    """Give the tokens that the post-processor puts before and behind a text; None if it has nothing to say of that."""
    found = None
    for step in steps(files.tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            before: list[int] = []
            after: list[int] = []
            side = before
            for part in step["single"]:
                if "Sequence" in part:
                    side = after
                else:
                    side += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            found = before, after
        elif step["type"] != "ByteLevel":
            raise ConvertError(
                f"{files.json_path} adds tokens by {show(str(step['type']))}, which is not known; expected a"
                " TemplateProcessing, save the tokenizer with one"
            )
    return found


def _flags(files: TokenizerFiles) -> tuple[bool, bool]:
    """Whether "bos" and "eos" are added where no template says so."""
    obeys = not files.tokenizer or files.config.get("tokenizer_class") in _LLAMA_CLASSES

    def flag(name: str, default: bool) -> bool:
        value = files.config.get(name)
        return value if obeys and isinstance(value, bool) else default

    return flag("add_bos_token", not files.tokenizer), flag("add_eos_token", False)
