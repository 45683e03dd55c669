"""Special tokens are those that transformers finds, and llama.cpp adds the ones that it adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_tokenizers as tiny
from tiny_tokenizers import FAMILIES, converted, tokens_of, write_json

from edgemoe.converters.special_tokens import SpecialTokens, special_tokens
from edgemoe.converters.tokenizer_files import TokenizerFiles
from edgemoe.errors import ConvertError

END, START, STOP = range(3)  # <|endoftext|>, <|im_start|>, <|im_end|>
EOS = {"eos_token": "<|endoftext|>"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_family(tmp_path, FAMILIES["gpt-2"])
    return tmp_path


def template(*single: str | int) -> dict[str, Any]:
    """A post-processor that puts tokens around "A"."""
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}} if part == "A" else {"SpecialToken": {"id": str(part)}}
        for part in single
    ]
    tokens = {tiny.SPECIAL[i]: {"id": tiny.SPECIAL[i], "ids": [i], "tokens": [tiny.SPECIAL[i]]} for i in range(3)}
    for part in parts:
        if "SpecialToken" in part:
            part["SpecialToken"] = {"id": tiny.SPECIAL[int(part["SpecialToken"]["id"])], "type_id": 0}
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": tokens}


def found(folder: Path, tokenizer_config: Any = None, post_processor: Any = None, **files: Any) -> SpecialTokens:
    content = json.loads((folder / "tokenizer.json").read_bytes()) | {"post_processor": post_processor}
    files |= {"tokenizer": content, "tokenizer_config": EOS if tokenizer_config is None else tokenizer_config}
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    return special_tokens(TokenizerFiles.read(folder), content["model"]["vocab"])


def test_where_they_are_looked_for(folder: Path) -> None:
    assert found(folder).ids == {"eos": END}
    assert found(folder, {"eos_token": {"content": "<|im_end|>"}, "bos_token": None}).ids == {"eos": STOP}
    maps = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "unk_token": "nowhere"}
    assert found(folder, special_tokens_map=maps).ids == {"eos": END, "pad": END}
    config = {"bos_token_id": 1, "sep_token_id": -1, "mask_token_id": 10**9, "text_config": {"unk_token_id": 2}}
    assert found(folder, special_tokens_map={}, config=config).ids == {"bos": START, "eos": END, "unk": STOP}
    config = {"eos_token_id": 2, "pad_token_id": None}
    assert found(folder, {}, config=config, generation_config={"pad_token_id": 1}).ids == {"eos": STOP, "pad": START}


def test_further_ends(folder: Path) -> None:
    ends = {"eos_token_id": [0, 2, 1, 5, 10**9]}
    assert found(folder, generation_config=ends).ids == {"eos": END, "eot": STOP, "eom": START}
    assert found(folder, {"eos_token": "<|im_end|>"}, generation_config=ends).ids == {
        "eos": STOP,
        "eot": END,
        "eom": START,
    }


def test_added_tokens(folder: Path) -> None:
    def added(config: Any = None, post_processor: Any = None) -> tuple[Any, ...]:
        special = found(folder, config, post_processor)
        return special.ids.get("bos"), special.add_bos, special.ids["eos"], special.add_eos

    assert added() == added(None, BYTE_LEVEL) == (None, False, END, False)
    assert added(None, template(1, "A")) == (START, True, END, False)
    assert added(None, template("A", 2)) == (None, False, STOP, True)
    both = {"type": "Sequence", "processors": [BYTE_LEVEL, template(1, "A", 0)]}
    assert added(None, both) == (START, True, END, True)
    # More than one at an end: llama.cpp cannot, the chat template does.
    assert added(None, template(1, 2, "A")) == (None, False, END, False)
    # Flags count for Llama's classes (DeepSeek's tokenizers are of them), and only where no template is.
    flags = {**EOS, "bos_token": "<|im_start|>", "add_bos_token": True, "add_eos_token": True}
    assert added(flags) == (START, False, END, False)
    llama = {**flags, "tokenizer_class": "LlamaTokenizerFast"}
    assert added(llama) == added(llama, BYTE_LEVEL) == (START, True, END, True)
    assert added(llama, template("A")) == (START, False, END, False)


def test_sentencepiece_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    numbers, defaults = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, {"unk": 0, "bos": 1, "eos": 2}
    assert special_tokens(TokenizerFiles.read(tmp_path), numbers, defaults) == SpecialTokens(defaults, True, False)
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": True, "eos_token": "a"})
    expected = SpecialTokens({**defaults, "eos": 3}, False, True)
    assert special_tokens(TokenizerFiles.read(tmp_path), numbers, defaults) == expected


def test_refusals(folder: Path) -> None:
    with pytest.raises(ConvertError, match="names no token that ends a text"):
        found(folder, {})
    llama = {**EOS, "add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}
    with pytest.raises(ConvertError, match="wants a token put before every text"):
        found(folder, llama)
    with pytest.raises(ConvertError, match="adds tokens by 'RobertaProcessing'"):
        found(folder, None, {"type": "RobertaProcessing"})


def test_named_tokens_are_special(folder: Path) -> None:
    """Those that a file names are looked for in text first, whatever else tokenizer.json says of them."""
    transformers = pytest.importorskip("transformers")
    content = json.loads((folder / "tokenizer.json").read_bytes()) | {"added_tokens": []}
    config = {**EOS, "additional_special_tokens": ["<|im_end|>"], "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", config)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with converted(folder, "gpt2") as llama:
        for text in ("a<|im_end|><|endoftext|>", "<|im_start|>"):
            assert tokens_of(llama, text) == theirs.encode(text)
        assert tokens_of(llama, "<|im_end|>") == [STOP]
        assert tokens_of(llama, "<|im_start|>") != [START]


@pytest.mark.parametrize("post_processor", [None, template(1, "A"), template(1, "A", 0)])
def test_same_as_transformers_and_gguf(folder: Path, post_processor: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = {
        **EOS,
        "bos_token": "<|im_start|>",
        "pad_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    special = found(folder, config, post_processor)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for kind in ("bos", "eos", "pad", "unk"):
        assert special.ids.get(kind) == getattr(theirs, f"{kind}_token_id")
    reference = gguf.SpecialVocab(folder)
    assert special.ids == reference.special_token_ids
    assert {"bos": special.add_bos, "eos": special.add_eos}.items() >= reference.add_special_token.items()
    with converted(folder, "gpt2") as llama:
        for text in ("", "a", "<|im_start|>a b"):
            assert tokens_of(llama, text, add_special=True) == theirs.encode(text)
        assert llama.token_eos() == END
