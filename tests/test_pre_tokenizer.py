"""Which steps get which name is shown by test_vocabulary.py; here, how they may be spelled and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as tiny
from tiny_tokenizers import BYTES, DIGITS, GPT2, LLAMA3, QWEN2, sequence, split

from edgemoe.converters.pre_tokenizer import pre_tokenizer_name
from edgemoe.errors import ConvertError


def name(pre_tokenizer: Mapping[str, Any] | None, normalizer: Mapping[str, Any] | None = None, **model: Any) -> str:
    tokenizer = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": model}
    return pre_tokenizer_name(tokenizer, Path("tokenizer.json"), "some")


def test_spellings_of_the_same_steps() -> None:
    assert name(sequence(split(QWEN2), BYTES)) == name(sequence(sequence(split(QWEN2)), BYTES)) == "qwen2"
    assert name(sequence(split(QWEN2, "Removed", True), BYTES)) == "qwen2"
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert name(sequence(split(gpt2), BYTES)) == name(GPT2) == "gpt-2"
    assert (
        name({key: value for key, value in GPT2.items() if key != "use_regex"}) == "gpt-2"
    )  # older files have no such key
    # DeepSeek's files hold line ends as they are, others as escapes.
    assert "\r" in tiny.DEEPSEEK_V3[2]
    escaped = [regex.replace("\r", r"\r").replace("\n", r"\n") for regex in tiny.DEEPSEEK_V3]
    assert name(sequence(*map(split, escaped), BYTES)) == name(sequence(*map(split, tiny.DEEPSEEK_V3), BYTES))


def test_words_that_are_tokens() -> None:
    steps = sequence(split(LLAMA3), BYTES)
    assert (name(steps, ignore_merges=True), name(steps, ignore_merges=False), name(steps)) == (
        "llama-bpe",
        "dbrx",
        "dbrx",
    )
    # llama.cpp has one way only with these steps.
    assert name(sequence(split(QWEN2), BYTES), ignore_merges=True) == "qwen2"


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        (None, "does not turn text into bytes"),
        (sequence(), "does not turn text into bytes"),
        (split(QWEN2), "does not turn text into bytes"),
        (sequence(BYTES, split(QWEN2)), "does not turn text into bytes"),
        (sequence(GPT2, GPT2), "does not turn text into bytes"),
        (BYTES, "cuts text by nothing"),
        ({**GPT2, "add_prefix_space": True}, "cuts text by"),
        (sequence(split(r"\p{L}+"), BYTES), r"cuts text by '\\p{L}+'"),
        (sequence(split(QWEN2), split(QWEN2), BYTES), "and then by"),
        (sequence(split(QWEN2, "MergedWithNext"), BYTES), "cuts text by"),
        (sequence(split(QWEN2, "Removed"), BYTES), "cuts text by"),
        (sequence(split(r"\p{N}", "Removed", True), GPT2), "cuts text by"),
        (sequence({"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated"}, BYTES), "cuts text by"),
        (sequence({"type": "Punctuation", "behavior": "Isolated"}, GPT2), "cuts text by"),
        (sequence({**DIGITS, "individual_digits": False}, GPT2), "cuts text by"),
    ],
)
def test_unknown_steps(pre_tokenizer: Mapping[str, Any] | None, expected: str) -> None:
    with pytest.raises(ConvertError) as caught:
        name(pre_tokenizer)
    assert expected in str(caught.value) and "; " in str(caught.value)


def test_normalizers() -> None:
    assert name(GPT2, {"type": "Sequence", "normalizers": []}) == name(GPT2, {"type": "NFC"}) == "gpt-2"
    for kind in ("NFKC", "NFD", "Lowercase", "Replace"):
        with pytest.raises(ConvertError, match=f"normalizes text by '{kind}'"):
            name(GPT2, {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": kind}]})
