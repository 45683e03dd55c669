"""The files of a Hugging Face folder that say how text becomes tokens.

Layout: the `tokenizers` package's ``tokenizer.json``, SentencePiece's ``tokenizer.model`` and what `transformers` keeps
beside them (``save_pretrained``). Nothing is run and nothing is unpickled: all of it is read as JSON and bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemoe.converters.checkpoint import read_json
from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["AddedToken", "TokenizerFiles", "merged_pairs", "numbered_tokens", "steps"]

_TOKENIZER = "tokenizer.json"
_SENTENCEPIECE = "tokenizer.model"
# Some checkpoints mark tokens that control a chat as ordinary ones; llama.cpp's own converter goes by their looks too.
_LOOK_SPECIAL = (("<|", "|>"), ("<\uff5c", "\uff5c>"))


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the model's own vocabulary, matched in the text before anything else.

    Attributes
    ----------
    id : int
        Its number.
    text : str
        What is matched.
    special : bool
        Whether it controls the model rather than being text: it is not shown to the user.
    """

    id: int
    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder's tokenizer files hold. Files that need not be there are empty mappings.

    Attributes
    ----------
    folder : Path
        The checkpoint.
    tokenizer : Mapping
        ``tokenizer.json``.
    sentencepiece : Path or None
        ``tokenizer.model``.
    config, special_tokens_map, generation, model_config, processor : Mapping
        ``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json``, ``config.json``,
        ``chat_template.json``.
    added_tokens_json : Mapping
        ``added_tokens.json``: numbers by text.
    """

    folder: Path
    tokenizer: Mapping[str, Any]
    sentencepiece: Path | None
    config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    generation: Mapping[str, Any]
    model_config: Mapping[str, Any]
    processor: Mapping[str, Any]
    added_tokens_json: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read the files of a folder.

        Raises
        ------
        ConvertError
            If there is no tokenizer among them that can be read, or one of them is no JSON.
        """

        def optional(name: str) -> Mapping[str, Any]:
            path = folder / name
            return read_json(path) if path.exists() else {}

        model = folder / _SENTENCEPIECE
        files = cls(
            folder,
            optional(_TOKENIZER),
            model if model.exists() else None,
            optional("tokenizer_config.json"),
            optional("special_tokens_map.json"),
            optional("generation_config.json"),
            optional("config.json"),
            optional("chat_template.json"),
            optional("added_tokens.json"),
        )
        if not files.tokenizer and files.sentencepiece is None:
            raise ConvertError(
                f"{folder} has no {_TOKENIZER} and no {_SENTENCEPIECE}; add the tokenizer's files (AutoTokenizer's"
                f" save_pretrained writes a {_TOKENIZER} from older formats)"
            )
        return files

    @property
    def json_path(self) -> Path:
        """Where ``tokenizer.json`` is or would be."""
        return self.folder / _TOKENIZER

    def named_tokens(self) -> Iterator[tuple[str, str]]:
        """Give the special tokens that the files name: the key ("bos_token", ...) and the text of each."""
        for source in (self.config, self.special_tokens_map):
            for key, value in source.items():
                if key in ("additional_special_tokens", "extra_special_tokens"):
                    entries = list(value.values() if isinstance(value, dict) else value or ())
                else:
                    entries = [value] if key.endswith("_token") else []
                for entry in entries:
                    text = entry.get("content") if isinstance(entry, dict) else entry
                    if isinstance(text, str):
                        yield key, text

    def added_tokens(self) -> list[AddedToken]:
        """List the added tokens of all files that have some, by number; `transformers` counts a later file as right.

        A special token that a file names counts as added even if it is in the vocabulary only.

        Raises
        ------
        ConvertError
            If two files give the same number to different texts.
        """
        found: dict[int, AddedToken] = {}
        for token in self._all_added_tokens():
            known = found.setdefault(token.id, token)
            if known.text != token.text:
                raise ConvertError(
                    f"token {token.id} of {self.folder} is {show(known.text)} in one file and {show(token.text)} in"
                    " another; correct the tokenizer's files"
                )
            found[token.id] = token
        return [found[number] for number in sorted(found)]

    def _all_added_tokens(self) -> Iterator[AddedToken]:
        known = set()
        decoder = self.config.get("added_tokens_decoder") or {}
        listed = [(entry["id"], entry) for entry in self.tokenizer.get("added_tokens") or ()]
        for number, entry in [*listed, *((int(number), entry) for number, entry in decoder.items())]:
            text = entry["content"]
            known.add(text)
            yield AddedToken(_number(number), text, bool(entry.get("special")) or _looks_special(text))
        for text, number in self.added_tokens_json.items():
            if text not in known:
                known.add(text)
                yield AddedToken(_number(number), text, _looks_special(text))
        vocab = self.tokenizer["model"]["vocab"] if self.tokenizer else {}
        for _, text in self.named_tokens():
            if text in vocab and text not in known:
                yield AddedToken(_number(vocab[text]), text, True)


def numbered_tokens(model: Mapping[str, Any]) -> dict[int, str]:
    """Give the texts of a tokenizer.json's own vocabulary by number; several texts of one number raise ValueError."""
    vocab = model["vocab"]
    tokens = {_number(number): text for text, number in vocab.items()}
    if len(tokens) != len(vocab):
        raise ValueError("two tokens have the same number")
    return tokens


def merged_pairs(files: TokenizerFiles) -> list[tuple[str, str]]:
    """List the merges of ``tokenizer.json``, the first one to be done first.

    Raises
    ------
    ConvertError
        If a merge is no pair of tokens that makes a token.
    """
    vocab, pairs = files.tokenizer["model"]["vocab"], []
    for merge in files.tokenizer["model"]["merges"]:
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if len(pair) != 2 or "".join(pair) not in vocab or " " in "".join(pair):
            raise ConvertError(
                f"{files.json_path} has the merge {show(str(merge))}, which is no pair of texts that makes a token;"
                " download it again"
            )
        pairs.append(pair)
    return pairs


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no token number")
    return value


def _looks_special(text: str) -> bool:
    return any(text.startswith(start) and text.endswith(end) for start, end in _LOOK_SPECIAL)


def steps(stage: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    """Give the steps of a stage of ``tokenizer.json``, its sequences (whose steps are under `name`) laid open."""
    if stage is None:
        return
    if stage["type"] == "Sequence":
        for step in stage[name]:
            yield from steps(step, name)
    else:
        yield stage
