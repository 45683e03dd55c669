"""Makes tiny tokenizers of each kind as Hugging Face folders, and loads what they become in plain llama.cpp.

The regular expressions are those of the families' published ``tokenizer.json``, written out once more on purpose.
"""

# ruff: noqa: RUF001 - the letters that look like others are meant

from __future__ import annotations

import contextlib
import ctypes
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import sentencepiece
from gguf.constants import GGUFValueType as Kind
from llama_cpp import llama_cpp as C  # noqa: N812
from plain_llama import plain_llama
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgemoe.converters.gguf_file import GgufFile, Metadata, Value
from edgemoe.converters.vocabulary import vocabulary_metadata

N_VOCAB = 2000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Texts that tokenizers disagree about.
PAGE = (
    "", " ", "  ", "\n", "\t", "a", " a", "a ", "x \t", " \n \n",
    "Hello, World! I've told you: he's here, we'll GO, you'RE late, I'M sure, they'D know, 'tis 'em ''s.",
    "don't can't won't DON'T CAN'T she'LL it'S We've WE'VE l'été d’accord ’s ’t",
    "1 12 123 1234 12345 123456 1234567890 3.14159 1,000,000 0xDEADBEEF 1e-10 v2.0.1 ½ ² ③ Ⅻ ١٢٣ १२३ 12３４",
    "def f(x: int) -> str:\n    return f\"{x!r}\\n\" if x > 0 else '''none'''  # comment\n\n\tclass A_b2(B):\n\t\tpass",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]*c->d; } // ok?\r\n#include <stdio.h>\r\n\r\n",
    "   leading and trailing   ",
    "tabs\t\tand  \t mixed \n\n\n lines  \n \n  x",
    "a\n\n\nb\r\n\r\nc\rd \n",
    "\u00a0no-break\u00a0\u2003em\u2028line\u0085next",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Ελληνικά ΚΕΦΑΛΑΊΑ. Привет, Мир! нещо на Български ПриветМир",
    "中文字符测试，标点。「日本語」ひらがなカタカナ 한국어 시험 漢字かな交じり文１２３ 我想在apple工作1314151天～",
    "العربية من اليمين עברית ไทยไม่มีวรรค हिन्दी में परीक्षण বাংলা කාන්තො கதை ខ្មែរ កាន់តែពិសេស",
    "e\u0301 cafe\u0301 n\u0303 Z\u0351\u036b\u0343alg\u0351o \u0301alone",
    "🚀 😶\u200d🌫️ 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇪🇺🇨🇿 ✅❤️ 👍🏽 (normal) 🦙🦙",
    "CamelCase HTTPServer iPhone snake_case SCREAMING_CASE kebab-case ÀÉÎ ÀéÎô straße STRASSE ǅungla",
    "path/to/file.txt C:\\Users\\x https://example.org/a?b=c&d=%20#frag user@example.org //// !!!??? ------=======",
    "$100 €5 £3 ¥7 + − × ÷ = ≠ ≤ ∑ ∞ √2 a^b ~x `code` |pipe| <tag> [x] {y} #hash @at & % *",
    "\x00\x01\x07\x1b[31mred\x7f\x0b\x0c",
    "\ufeffmark \ufffd \u200b zero\u200cwidth \ue000 \U0010ffff \u0378",
    "a" * 129 + " b",
    " " * 70,
    "\n" * 20 + "\t" * 9,
    "naïve façade – “quotes” ‘single’ … „low“ «guillemets» ¿qué? ¡sí!",
    "''''''```````\"\"\"\"......!!!!!!?????? x.y;z:w 3.3 3..3 3...3",
    "[PAD1900] <unk> <s> </s> <0x41>",
    "<|endoftext|>",
    "a<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|> <|im_start|> x",
    "<|im_star",
)  # fmt: skip

# Pieces that random texts are made of: one or more of each class that a rule tells apart.
AWKWARD = (
    "a", "b", "S", "T", " ", "  ", "\n", "\r", "\t", "'", "'s", "'LL", "1", "2", "３", "½", "é", "e\u0301", "中",
    "の", "カ", "한", "ก", "ह", "ि", "🚀", "\u200d", "!", "?", "/", ".", "_", "\u00a0", "\u0085", "\x0b", "\x00", "Ж",
    "ß", "ǅ", "ʰ", "$", "+", "€", "<|im_start|>", "—", "،", "٣", "Ⅻ", "\u2028", "\ufeff", "\u0378",
)  # fmt: skip

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {**GPT2, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def sequence(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
CJK = "[一-龥ࠀ-一가-\ud7ff]+"
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7d"
    "ᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_LLM = ("[\r\n]", f"\\s?[{DEEPSEEK_LETTERS}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", "\\s+$", CJK)
DEEPSEEK_CODER = ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", CJK)


@dataclass(frozen=True)
class Family:
    """How a family's byte-level tokenizer cuts text, and how llama.cpp calls that."""

    architecture: str
    pre: str
    pre_tokenizer: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    ignore_merges: bool = False
    words: bool = False  # whether the vocabulary is made of the family's words, or crosses them everywhere
    added: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()  # beginnings of texts that llama.cpp is known to cut in another way


NFC = {"type": "NFC"}
FAMILIES: Mapping[str, Family] = {
    "gpt-2": Family("gpt2", "gpt-2", GPT2),
    "olmoe": Family("olmoe", "olmo", GPT2, NFC, added=("|||IP_ADDRESS|||", " " * 24, " " * 3, "  ")),
    "granite": Family("granitemoe", "refact", sequence(DIGITS, GPT2)),
    "llama-3": Family("llama", "llama-bpe", sequence(split(LLAMA3), BYTES), ignore_merges=True),
    "lfm2": Family("lfm2moe", "lfm2", sequence(split(LLAMA3), BYTES), ignore_merges=True),
    "granite-4": Family("granitehybrid", "dbrx", sequence(split(LLAMA3, "Removed", True), BYTES)),
    "qwen2": Family("qwen2moe", "qwen2", sequence(split(QWEN2), BYTES), NFC, added=("<think>", "</think>")),
    "qwen3.5": Family("qwen35moe", "qwen35", sequence(split(QWEN35), BYTES), NFC),
    "glm-4": Family("glm4moe", "glm4", sequence(split(LLAMA3), BYTES), ignore_merges=True),
    "gpt-oss": Family("gpt-oss", "granite-embed-multi-97m", sequence(split(O200K), BYTES), None, True, words=True),
    "llama-4": Family("llama4", "granite-embed-multi-97m", sequence(split(O200K), BYTES), words=True),
    "deepseek-llm": Family(
        "deepseek2", "deepseek-llm", sequence(*map(split, DEEPSEEK_LLM), DIGITS, BYTES), words=True,
    ),
    "deepseek-coder": Family(
        "deepseek", "deepseek-coder", sequence(*map(split, DEEPSEEK_CODER), DIGITS, BYTES), words=True,
    ),
    "deepseek-v3": Family(
        "deepseek2", "deepseek-v3", sequence(*map(split, DEEPSEEK_V3), BYTES),
        added=("<｜begin▁of▁sentence｜>", "<｜User｜>"),
    ),
    "bailing": Family("bailingmoe2", "bailingmoe2", sequence(split(BAILING), BYTES)),
    "mistral-nemo": Family(
        "llama", "tekken", sequence(split(TEKKEN), BYTES), None, True, words=True, unlike=("العربية", "e\u0301"),
    ),
}  # fmt: skip


def write_family(folder: Path, family: Family) -> Tokenizer:
    """Train a tokenizer on the page and save it; the special tokens have the first numbers, the others the last."""
    tokenizer = Tokenizer(models.BPE())
    pre_tokenizer = family.pre_tokenizer if family.words else BYTES
    tokenizer = Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "pre_tokenizer": pre_tokenizer}))
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
    )
    tokenizer.train_from_iterator([*PAGE, *PAGE], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(family.added))
    content = json.loads(tokenizer.to_str())
    content |= {"normalizer": family.normalizer, "pre_tokenizer": family.pre_tokenizer}
    content["model"]["ignore_merges"] = family.ignore_merges
    return write_tokenizer(folder, content, {"eos_token": SPECIAL[0]})


def write_tokenizer(folder: Path, content: Mapping[str, Any], config: Mapping[str, Any]) -> Tokenizer:
    """Save tokenizer.json and tokenizer_config.json, and read them as Hugging Face does."""
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", config)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def train_sentencepiece(**options: Any) -> bytes:
    """Train a SentencePiece model on the page, by default as Llama's and Mixtral's were."""
    model = io.BytesIO()
    lines = [line for text in PAGE for line in text.replace("\0", "").splitlines() if line.strip()]
    settings = {
        "vocab_size": 1000, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "character_coverage": 0.99, "minloglevel": 3,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 2), model_writer=model, **(settings | options)
    )
    return model.getvalue()


def sentencepiece_json(model: bytes) -> dict[str, Any]:
    """Turn a SentencePiece model into what `transformers` turns it into: merges by rank, spaces by a normalizer."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    numbers = range(pieces.vocab_size())
    vocab = {pieces.id_to_piece(number): number for number in numbers}
    mergeable = [
        number
        for number in numbers
        if not (pieces.is_byte(number) or pieces.is_control(number) or pieces.is_unknown(number))
    ]
    scores = {pieces.id_to_piece(number): pieces.get_score(number) for number in mergeable}
    pairs = [(text[:cut], text[cut:]) for text in scores for cut in range(1, len(text))]
    pairs = [pair for pair in pairs if scores.keys() >= set(pair)]
    pairs.sort(key=lambda pair: (-scores["".join(pair)], len(pair[0])))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


@contextlib.contextmanager
def loaded(folder: Path, metadata: Metadata) -> Iterator[llama_cpp.Llama]:
    """Load a file without weights in plain llama.cpp."""
    path = folder / "vocabulary.gguf"
    head = {"general.architecture": Value("llama", Kind.STRING)}
    with GgufFile(path, head | metadata, [], force=True) as file:
        file.finish()
    with contextlib.closing(plain_llama(path, vocab_only=True)) as llama:
        yield llama


@contextlib.contextmanager
def converted(folder: Path, architecture: str = "llama", n_vocab: int = N_VOCAB) -> Iterator[llama_cpp.Llama]:
    """Convert a folder's tokenizer and load it in plain llama.cpp."""
    with loaded(folder, vocabulary_metadata(folder, architecture, n_vocab)) as llama:
        yield llama


def tokens_of(llama: llama_cpp.Llama, text: str, add_special: bool = False) -> list[int]:
    tokens: list[int] = llama.tokenize(text.encode(), add_bos=add_special, special=True)
    return tokens


def bytes_of(llama: llama_cpp.Llama, tokens: list[int]) -> bytes:
    """The text of tokens, special ones included (llama_cpp's own detokenize leaves out long ones)."""
    buffer = ctypes.create_string_buffer(1024)
    vocab = C.llama_model_get_vocab(llama.model)
    text = b""
    for token in tokens:
        n_bytes = C.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
        text += buffer.raw[:n_bytes]
    return text
