r"""llama.cpp's name for what a byte-level BPE tokenizer does before it merges: how it cuts text into words.

A GGUF does not hold these rules, only their name, ``tokenizer.ggml.pre``; the rules are in llama.cpp
(src/llama-vocab.cpp). So the steps that ``tokenizer.json`` lists are compared with the ones that a name stands for, and
steps that no name stands for are refused: under a wrong name a model runs and answers worse.

Differences no name can take away: llama.cpp does not normalize, so where ``tokenizer.json`` has an NFC step (Qwen,
OLMoE) letters that are written as letter and accent become other tokens; "tekken" ends a word at a combining mark;
"deepseek-llm" does not take an ideographic space for a space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from edgemoe.converters.tokenizer_files import steps
from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["pre_tokenizer_name"]

# What the published checkpoints of each family split by; ByteLevel has GPT-2's expression built in.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALIZED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_O200K = rf"{_CAPITALIZED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASHED}"
_TEKKEN = rf"{_CAPITALIZED}|{_CAPITALS}|\p{{N}}|{_SLASHED}"
_CJK_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LETTERS = (  # those with upper and lower case, as the files list them
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK_HANGUL,
    _DIGIT,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_HANGUL, _DIGIT)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _SPACES,
)

# Name by steps, and by whether a word that is a token is taken as it is (`ignore_merges`): llama.cpp ties that to the
# name. Where it knows the steps with one of the two only, the name is right for vocabularies whose tokens all come
# about by merging, as trained ones do.
_NAMES: dict[tuple[str, ...], dict[bool, str]] = {
    (_GPT2,): {False: "gpt-2"},
    (_DIGIT, _GPT2): {False: "starcoder"},
    (_LLAMA3,): {True: "llama-bpe", False: "dbrx"},
    (_QWEN2,): {False: "qwen2"},
    (_QWEN35,): {False: "qwen35"},
    (_BAILING,): {False: "bailingmoe"},
    # "gpt-4o" and "llama4", which other converters write here, end a word at a combining mark, so Hindi or Thai become
    # other tokens. This name's rule does not. It knows capitals in ASCII only, but no token of o200k crosses others.
    (_O200K,): {True: "granite-embed-multi-97m"},
    (_TEKKEN,): {True: "tekken"},
    _DEEPSEEK_LLM: {False: "deepseek-llm"},
    _DEEPSEEK_CODER: {False: "deepseek-coder"},
    _DEEPSEEK_V3: {False: "deepseek-v3"},
}
# Names of the same rules that other programs expect of a family.
_FAMILY_NAMES = {
    ("olmoe", "gpt-2"): "olmo",
    ("granitemoe", "starcoder"): "refact",
    ("glm4moe", "llama-bpe"): "glm4",
    ("glm4moe", "dbrx"): "chatglm-bpe",
    ("lfm2moe", "llama-bpe"): "lfm2",
    ("bailingmoe2", "bailingmoe"): "bailingmoe2",
}


def pre_tokenizer_name(tokenizer: Mapping[str, Any], path: Path, architecture: str) -> str:
    """Find the name under which llama.cpp does what a tokenizer does before it merges.

    Parameters
    ----------
    tokenizer : Mapping
        Content of ``tokenizer.json``.
    path : Path
        The file, for messages.
    architecture : str
        ``general.architecture`` of the GGUF to be.

    Returns
    -------
    str
        For ``tokenizer.ggml.pre``.

    Raises
    ------
    ConvertError
        If llama.cpp does nothing of the kind.
    """

    def refuse(what: str) -> NoReturn:
        raise ConvertError(
            f"{path} {what}, for which the supported llama.cpp has no pre-tokenizer; convert a model whose tokenizer it"
            " knows, or ask for this one to be added"
        )

    for step in steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            refuse(f"normalizes text by {show(str(step['type']))}")
    stages = list(steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    # ByteLevel spells bytes as letters: what comes after it sees another text.
    if not stages or [step for step in stages if step["type"] == "ByteLevel"] != stages[-1:]:
        refuse("does not turn text into bytes (ByteLevel) as the last step before it merges")
    splits = []
    for step in stages:
        split = _split(step)
        if split is None:
            refuse(f"cuts text by {show(str(step))}")
        splits.append(split)
    key = tuple(split for split in splits if split)
    names = _NAMES.get(key)
    if names is None:
        refuse(f"cuts text by {' and then by '.join(map(show, key)) or 'nothing'}")
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = names.get(ignore_merges) or next(iter(names.values()))
    return _FAMILY_NAMES.get((architecture, name), name)


def _split(step: Mapping[str, Any]) -> str | None:
    """Give the expression whose matches a step makes words; "" if it makes none, None if it does something else."""
    match step["type"]:
        case "ByteLevel" if not step.get("add_prefix_space"):
            return _GPT2 if step.get("use_regex", True) else ""
        case "Digits" if step.get("individual_digits"):
            return _DIGIT
        case "Split":
            # Some have line ends in the expression itself, some as escapes.
            regex = step["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
            how = step["behavior"], bool(step.get("invert"))
            # To keep the matches and remove the rest is the same where the matches leave no rest.
            if how == ("Isolated", False) or (how == ("Removed", True) and regex.endswith(r"|\s+(?!\S)|\s+")):
                return regex or None
    return None
