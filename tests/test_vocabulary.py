"""What a converted vocabulary makes of text in plain llama.cpp is what Hugging Face's tokenizers make of it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import sentencepiece
import tiny_tokenizers as tiny
from gguf.constants import Keys, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_llama import SHARED_MODELS
from tiny_tokenizers import AWKWARD, FAMILIES, PAGE, bytes_of, converted, tokens_of, write_json
from tokenizers import AddedToken, Tokenizer, processors

from edgemoe.converters.vocabulary import vocabulary_metadata
from edgemoe.errors import ConvertError

K = Keys.Tokenizer
TEXTS = st.lists(st.sampled_from(AWKWARD) | st.characters(codec="utf-8"), max_size=20).map("".join)


def refusal(folder: Path, n_vocab: int = tiny.N_VOCAB) -> str:
    with pytest.raises(ConvertError) as caught:
        vocabulary_metadata(folder, "llama", n_vocab)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


def texts_for(family: tiny.Family) -> list[str]:
    """The page, without what llama.cpp is known to take otherwise (it does not compose letters)."""
    composed = family.normalizer is None
    return [
        text
        for text in PAGE
        if not text.startswith(family.unlike or ("\0",)) and (composed or unicodedata.is_normalized("NFC", text))
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_byte_level(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = tiny.write_family(tmp_path, family)
    texts = texts_for(family)
    assert len(texts) >= len(PAGE) - 2
    texts += [f"a{added} b{added}{added}<|im_end|>{added[:-1]}" for added in family.added]
    metadata = vocabulary_metadata(tmp_path, family.architecture, tiny.N_VOCAB)
    assert metadata[K.PRE].value == family.pre
    with tiny.loaded(tmp_path, metadata) as llama:
        for text in texts:
            tokens = tokens_of(llama, text)
            assert tokens == tokenizer.encode(text, add_special_tokens=False).ids, text
            assert bytes_of(llama, tokens) == text.encode()


@pytest.mark.parametrize(("name", "other"), [("qwen2", "llama-bpe"), ("llama-3", "qwen2"), ("gpt-2", "refact")])
def test_another_name_gives_other_tokens(tmp_path: Path, name: str, other: str) -> None:
    """The page tells rules apart that differ in digits only."""
    tokenizer = tiny.write_family(tmp_path, FAMILIES[name])
    metadata = vocabulary_metadata(tmp_path, "llama", tiny.N_VOCAB)
    metadata[K.PRE] = type(metadata[K.PRE])(other, metadata[K.PRE].type)
    with tiny.loaded(tmp_path, metadata) as llama:
        unlike = [text for text in PAGE if tokens_of(llama, text) != tokenizer.encode(text).ids]
    assert 0 < len(unlike) < len(PAGE)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[llama_cpp.Llama, Tokenizer]]:
    folder = tmp_path_factory.mktemp("deepseek")
    tokenizer = tiny.write_family(folder, FAMILIES["deepseek-v3"])
    with converted(folder, "deepseek2") as llama:
        yield llama, tokenizer


@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_any_text_byte_level(deepseek: tuple[llama_cpp.Llama, Tokenizer], text: str) -> None:
    llama, tokenizer = deepseek
    tokens = tokens_of(llama, text)
    assert tokens == tokenizer.encode(text, add_special_tokens=False).ids
    assert bytes_of(llama, tokens) == text.encode()


@pytest.fixture(scope="module")
def mixtral() -> bytes:
    return tiny.train_sentencepiece()


@pytest.fixture(scope="module")
def mixtral_llama(
    tmp_path_factory: pytest.TempPathFactory, mixtral: bytes
) -> Iterator[tuple[llama_cpp.Llama, sentencepiece.SentencePieceProcessor]]:
    folder = tmp_path_factory.mktemp("mixtral")
    (folder / "tokenizer.model").write_bytes(mixtral)
    with converted(folder) as llama:
        yield llama, sentencepiece.SentencePieceProcessor(model_proto=mixtral)


def test_sentencepiece(mixtral_llama: tuple[llama_cpp.Llama, sentencepiece.SentencePieceProcessor]) -> None:
    llama, pieces = mixtral_llama
    for text in PAGE:
        if (
            "\0" not in text and "<s>" not in text
        ):  # SentencePiece ends text at NUL, and does not look for its own tokens
            tokens = tokens_of(llama, text)
            assert tokens == pieces.encode(text), text
            assert bytes_of(llama, tokens) == (b" " + text.encode() if text else b"")
    assert tokens_of(llama, "a", add_special=True) == [pieces.bos_id(), *pieces.encode("a")]


@given(text=TEXTS.filter(lambda text: "\0" not in text))
@settings(max_examples=150, deadline=None)
def test_any_text_sentencepiece(
    mixtral_llama: tuple[llama_cpp.Llama, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    llama, pieces = mixtral_llama
    tokens = tokens_of(llama, text)
    assert tokens == pieces.encode(text)
    # SentencePiece does not tell the sign that it writes for a space from a space.
    assert bytes_of(llama, tokens) == (f" {text}".replace("▁", " ").encode() if text else b"")


def write_sentencepiece_json(folder: Path, model: bytes, **changes: Any) -> Tokenizer:
    content = tiny.sentencepiece_json(model) | changes
    return tiny.write_tokenizer(folder, content, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def test_sentencepiece_from_tokenizer_json(tmp_path: Path, mixtral: bytes) -> None:
    tokenizer = write_sentencepiece_json(tmp_path, mixtral)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    from_json = vocabulary_metadata(tmp_path, "llama", tiny.N_VOCAB)
    (tmp_path / "tokenizer.model").write_bytes(mixtral)
    from_both = vocabulary_metadata(tmp_path, "llama", tiny.N_VOCAB)
    for metadata in (from_json, from_both):
        with tiny.loaded(tmp_path, metadata) as llama:
            for text in [*PAGE, "a<think>b</s> c<think><think> ", "<think>"]:
                tokens = tokens_of(llama, text, add_special=True)
                assert tokens == tokenizer.encode(text).ids, text
    different = {key for key in from_json if from_json[key] != from_both[key]}
    assert different == {K.SCORES}  # in the same order, but pieces that no merge makes come last


def test_space_prefix_off(tmp_path: Path, mixtral: bytes) -> None:
    never = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    tokenizer = write_sentencepiece_json(tmp_path, mixtral, normalizer=None, pre_tokenizer=never)
    with converted(tmp_path) as llama:
        for text in PAGE:
            tokens = tokens_of(llama, text)
            assert tokens == tokenizer.encode(text).ids
            assert bytes_of(llama, tokens) == text.encode()


def test_user_defined_pieces(tmp_path: Path) -> None:
    model = tiny.train_sentencepiece(user_defined_symbols=["<sep>", "a▁b"], add_dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    with converted(tmp_path) as llama:
        for text in ("x<sep>y", "ca bd a b", "<sep><sep> "):
            assert tokens_of(llama, text) == pieces.encode(text), text


def test_token_types_and_padding(tmp_path: Path) -> None:
    tiny.write_family(tmp_path, FAMILIES["deepseek-v3"])
    n_vocab = len(json.loads((tmp_path / "tokenizer.json").read_bytes())["model"]["vocab"]) + 2
    metadata = vocabulary_metadata(tmp_path, "deepseek2", n_vocab + 3)
    types = dict(zip(metadata[K.LIST].value, metadata[K.TOKEN_TYPE].value, strict=True))
    assert types["<|endoftext|>"] == types["<|im_end|>"] == TokenType.CONTROL
    # Not marked as special in the file, but by their looks.
    assert types["<｜User｜>"] == types["<｜begin▁of▁sentence｜>"] == TokenType.CONTROL  # noqa: RUF001
    assert types["a"] == TokenType.NORMAL
    assert metadata[K.LIST].value[-3:] == [f"[PAD{n_vocab + i}]" for i in range(3)]
    assert metadata[K.TOKEN_TYPE].value[-3:] == [TokenType.UNUSED] * 3
    assert len(vocabulary_metadata(tmp_path, "deepseek2", n_vocab)[K.LIST].value) == n_vocab


def test_added_tokens_of_all_files(tmp_path: Path) -> None:
    tiny.write_family(tmp_path, FAMILIES["gpt-2"])
    n_vocab = len(json.loads((tmp_path / "tokenizer.json").read_bytes())["model"]["vocab"])
    decoder = {str(n_vocab): {"content": "<x>", "special": True}, "1": {"content": "<|im_start|>", "special": True}}
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<x>", "added_tokens_decoder": decoder})
    write_json(tmp_path / "added_tokens.json", {"<x>": n_vocab, "<y>": n_vocab + 1})
    metadata = vocabulary_metadata(tmp_path, "gpt2", n_vocab + 2)
    assert metadata[K.LIST].value[n_vocab:] == ["<x>", "<y>"]
    assert metadata[K.TOKEN_TYPE].value[n_vocab:] == [TokenType.CONTROL, TokenType.USER_DEFINED]
    assert metadata[K.EOS_ID].value == n_vocab


@pytest.mark.skipif(not SHARED_MODELS.exists(), reason="needs ../shared")
def test_tiny_moe() -> None:
    """The trained model's own GGUF was made by llama.cpp's converter."""
    metadata = vocabulary_metadata(SHARED_MODELS / "hf", "qwen3moe", 4096)
    reader = gguf.GGUFReader(SHARED_MODELS / "tiny-moe-q8_0.gguf")
    stored = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    assert stored.pop(K.ADD_PREFIX) is False  # of no meaning to this kind of tokenizer
    assert {key: value.value for key, value in metadata.items()} == stored


Change = Callable[[dict[str, Any]], object]
DAMAGES: dict[str, tuple[Change, str]] = {
    "too many": (lambda json: json["model"]["vocab"].update(new=5000), "token 5000 ('new'), but the model only 2000"),
    "gap": (lambda json: json["model"]["vocab"].update(new=1999), "but no token 1500"),
    "one number for two": (lambda json: json["model"]["vocab"].update(new=400), "the same number"),
    "no number": (lambda json: json["model"]["vocab"].update(new="7"), "no token number"),
    "below zero": (lambda json: json["model"]["vocab"].update(new=-1), "no token number"),
    "added twice": (lambda json: json["added_tokens"].append({"id": 1500, "content": "a"}), "has 'a' twice"),
    "added over another": (lambda json: json["added_tokens"].append({"id": 300, "content": "zz"}), "among the added"),
    "added in two ways": (lambda json: json["added_tokens"].append({"id": 0, "content": "zz"}), "in another"),
    "taken name": (lambda json: json["added_tokens"].append({"id": 1500, "content": "[PAD1501]"}), "an unused one"),
    "NUL": (lambda json: json["added_tokens"].append({"id": 1500, "content": "a\0b"}), "NUL"),
    "no merge": (lambda json: json["model"]["merges"].append("a"), "has the merge 'a'"),
    "merge to nothing": (lambda json: json["model"]["merges"].append(["zz", "zz"]), "no pair of texts"),
    "no merges": (lambda json: json["model"].pop("merges"), "not laid out"),
    "no vocabulary": (lambda json: json["model"].pop("vocab"), "not laid out"),
    "no model": (lambda json: json.pop("model"), "not laid out"),
    "WordPiece": (lambda json: json["model"].update(type="WordPiece"), "type 'WordPiece'"),
    "Unigram": (lambda json: json["model"].update(type="Unigram"), "type 'Unigram'"),
    "no type": (lambda json: (json["model"].pop("type"), json["model"].pop("merges")), "type 'None'"),
    "word ends": (lambda json: json["model"].update(end_of_word_suffix="</w>"), "none like it"),
    "list": (lambda json: json.update(added_tokens=[[]]), "not laid out"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sound")
    tiny.write_family(folder, FAMILIES["gpt-2"])
    content: dict[str, Any] = json.loads((folder / "tokenizer.json").read_bytes())
    # Exactly 1500 tokens, so that the next number is free.
    vocab = content["model"]["vocab"]
    vocab |= {f"filler {number}": number for number in range(len(vocab), 1500)}
    return content


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(tmp_path: Path, sound: dict[str, Any], damage: str) -> None:
    content = json.loads(json.dumps(sound))
    change, expected = DAMAGES[damage]
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    write_json(tmp_path / "tokenizer.json", content)
    vocabulary_metadata(tmp_path, "gpt2", tiny.N_VOCAB)
    change(content)
    write_json(tmp_path / "tokenizer.json", content)
    assert expected in refusal(tmp_path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    assert "has no tokenizer.json and no tokenizer.model" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {')
    assert "is not JSON" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1]")
    assert "no JSON object" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's format under the same name
    assert "no SentencePiece model" in refusal(tmp_path)


def test_sentencepiece_models_that_llama_cpp_has_no_match_for(tmp_path: Path, mixtral: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    for options, expected in (
        ({"model_type": "unigram", "vocab_size": 620}, "is no BPE model"),
        ({"byte_fallback": False, "character_coverage": 1.0}, "no token for each byte"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"remove_extra_whitespaces": True}, "drops repeated spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
    ):
        path.write_bytes(tiny.train_sentencepiece(**options))
        assert expected in refusal(tmp_path)
    path.write_bytes(mixtral)
    write_sentencepiece_json(tmp_path, tiny.train_sentencepiece(vocab_size=900))
    assert "differ in token" in refusal(tmp_path)


def test_tokenizer_json_that_no_scores_stand_for(tmp_path: Path, mixtral: bytes) -> None:
    merges = tiny.sentencepiece_json(mixtral)["model"]["merges"]
    one_of_two = next(pair for pair in merges if sum(first + second == "".join(pair) for first, second in merges) > 1)

    def refusal_with(merges: list[list[str]], **changes: Any) -> str:
        content = tiny.sentencepiece_json(mixtral) | changes
        content["model"]["merges"] = merges
        write_json(tmp_path / "tokenizer.json", content)
        return refusal(tmp_path)

    assert "does not merge" in refusal_with([pair for pair in merges if pair != one_of_two])
    assert "in an order that no scores" in refusal_with([*merges, one_of_two])
    assert "prepares text by" in refusal_with(merges, normalizer={"type": "NFKC"})
    assert "prepares text by" in refusal_with(merges, pre_tokenizer={"type": "Whitespace"})
    # Cuts runs of spaces apart, for which there are pieces.
    assert "prepares text by" in refusal_with(merges, pre_tokenizer={"type": "Metaspace", "replacement": "▁"})


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage(tmp_path_factory: pytest.TempPathFactory, sound: dict[str, Any], data: st.DataObject) -> None:
    """Whatever stands in the place of whatever: a vocabulary, or one sentence."""
    content = json.loads(json.dumps(sound))
    vocab = content["model"]["vocab"] = {text: i for text, i in content["model"]["vocab"].items() if i < 270}
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) in vocab]
    content["post_processor"] = {"type": "Sequence", "processors": [{"type": "TemplateProcessing", "single": []}]}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    config: Any = {"eos_token": "<|endoftext|>", "chat_template": [{"name": "a", "template": "b"}]}
    place: Any = {"tokenizer": content, "config": config}
    for _ in range(data.draw(st.integers(1, 6))):
        keys = list(place) if isinstance(place, dict) else range(min(len(place), 3))
        key = data.draw(st.sampled_from([*keys][:12]))
        if not isinstance(place[key], dict | list) or not place[key]:
            break
        parent, place = place, place[key]
    else:
        place = parent
    if place not in (content, config):
        key = data.draw(st.sampled_from([*(place if isinstance(place, dict) else range(len(place)))][:12]))
    place[key] = data.draw(st.sampled_from([None, True, -1, 3.5, 10**30, "", "x", [], [1], [[]], {}, {"type": "x"}]))
    folder = tmp_path_factory.mktemp("damage")
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", config)
    try:
        metadata = vocabulary_metadata(folder, "gpt2", 300)
    except ConvertError as error:
        assert "\n" not in str(error) and "; " in str(error)
    else:
        assert len(metadata[K.LIST].value) == 300
