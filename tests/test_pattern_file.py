from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save
from tiny_patterns import ROW, random_scores, tiny_model, tiny_pattern

from edgemoe import pattern_file
from edgemoe.errors import PatternError
from edgemoe.pattern import Pattern
from edgemoe.pattern_file import VERSION, decode, encode, read_pattern, write_pattern

PATTERN = tiny_pattern()
DATA = encode(PATTERN)
Arrays = dict[str, npt.NDArray[Any]]


def sealed(body: bytes) -> bytes:
    """A file that somebody made up, with a checksum that holds."""
    return body + hashlib.sha256(body).digest()


def forged(
    facts: Callable[[dict[str, Any]], object] = lambda facts: facts,
    arrays: Callable[[Arrays], object] = lambda arrays: arrays,
) -> bytes:
    """The tiny pattern's file after two functions changed its facts and arrays in place."""
    n = int.from_bytes(DATA[:8], "little")
    known = json.loads(json.loads(DATA[8 : 8 + n])["__metadata__"]["edgemoe_pattern"])
    tables = load(DATA)
    facts(known)
    arrays(tables)
    return sealed(save(tables, {"edgemoe_pattern": json.dumps(known)})[:-32])


def refusal(data: bytes) -> str:
    with pytest.raises(PatternError) as caught:
        decode(data)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    return str(caught.value)


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize(("n_layers", "n_expert", "n_documents"), [(3, 8, 2), (1, 8, 0), (2, 300, 1)])
def test_what_is_written_is_read(
    tmp_path: Path, n_layers: int, n_expert: int, n_documents: int, measured: bool
) -> None:
    pattern = tiny_pattern(model=tiny_model(n_layers, n_expert), n_documents=max(1, n_documents), measured=measured)
    empty = replace(pattern.documents, **{k: getattr(pattern.documents, k)[: 2 * n_documents] for k in DOCUMENT_FIELDS})
    pattern = replace(pattern, documents=empty)
    path = tmp_path / "maths.pattern"
    write_pattern(pattern, path)
    again = read_pattern(path)
    for name in ("task", "fingerprint", "criterion", "sources", "quality"):
        assert getattr(again, name) == getattr(pattern, name)
    for name in DOCUMENT_FIELDS:
        np.testing.assert_array_equal(getattr(again.documents, name), getattr(pattern.documents, name))
    np.testing.assert_array_equal(again.rankings, pattern.rankings)
    np.testing.assert_array_equal(again.vector, pattern.vector)
    assert list(again.scores) == list(pattern.scores)
    for name, scores in pattern.scores.items():
        largest = np.abs(scores).max(axis=1, keepdims=True)
        assert (np.abs(again.scores[name] - scores) <= largest * 2.0**-12).all()
    assert (again.sensitivity is None) == (pattern.sensitivity is None)
    if again.sensitivity and pattern.sensitivity:
        assert again.sensitivity.sizes == pattern.sensitivity.sizes
        np.testing.assert_array_equal(again.sensitivity.loss, pattern.sensitivity.loss)
    assert encode(again) == path.read_bytes(), "reading and writing loses nothing more"


DOCUMENT_FIELDS = ("document", "tokens", "shares")


def test_the_same_pattern_gives_the_same_bytes() -> None:
    assert encode(tiny_pattern()) == DATA


def test_scores_of_any_size_survive() -> None:
    scores = random_scores(tiny_model()) * np.array([[0], [1e-30], [1e38]], np.float32)
    again = decode(encode(tiny_pattern(scores={"peu": scores})))
    assert (again.scores["peu"][0] == 0).all()
    np.testing.assert_allclose(again.scores["peu"][1:], scores[1:], rtol=2.0**-11)


@given(st.data())
def test_any_flipped_byte_is_found(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(DATA) - 1))
    flip = data.draw(st.integers(1, 255))
    assert "its checksum is wrong" in refusal(DATA[:at] + bytes([DATA[at] ^ flip]) + DATA[at + 1 :])


@given(st.integers(0, len(DATA) - 1), st.integers(0, 64))
def test_any_cut_is_found(end: int, start: int) -> None:
    assert "its checksum is wrong" in refusal(DATA[:end])
    assert "its checksum is wrong" in refusal(DATA[start + 1 :] if start else DATA + b"\0")


def test_every_bit_of_the_header_matters() -> None:
    for at in range(8 + int.from_bytes(DATA[:8], "little")):
        refusal(DATA[:at] + bytes([DATA[at] ^ 1]) + DATA[at + 1 :])


@given(st.data())
def test_a_stranger_who_mends_the_checksum_gains_no_crash(data: st.DataObject) -> None:
    body = bytearray(DATA[:-32])
    header = 8 + int.from_bytes(DATA[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1) | st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'"[]{}:,0919-eE.\\'))
    try:
        found = decode(sealed(bytes(body)))
    except PatternError as error:
        assert str(error).isprintable()
    else:
        n_expert = found.n_expert
        assert (np.sort(found.rankings, axis=1) == np.arange(n_expert)).all()
        assert all(np.isfinite(scores).all() for scores in found.scores.values())
        assert decode(encode(found)).task == found.task


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda facts: facts.pop(key)


def put(value: object, *keys: str | int) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        inner: Any = facts
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "facts",
    [
        drop("task"),
        drop("sources"),
        drop("version"),
        put("1", "version"),
        put(True, "version"),
        put(0, "version"),
        put("../../.bashrc", "task"),
        put(["maths"], "task"),
        put("\x1b[2J", "fingerprint", "name"),
        put("\ud800", "fingerprint", "name"),
        put(None, "fingerprint"),
        put({}, "fingerprint", "layers"),
        put([1.0, 2.0, 3.0], "fingerprint", "layers"),
        put([True, 2, 3], "fingerprint", "layers"),
        put(10**400, "fingerprint", "n_expert"),
        put(7, "fingerprint", "n_expert"),
        put("extra", "fingerprint", "extra"),
        put(["peu", "peu"], "criteria"),
        put(["peu"], "criteria"),
        put("peu", "criteria"),
        put([[], {}], "criteria"),
        put({}, "sources"),
        put([1], "sources"),
        put(0, "sources", 0, "chat_template"),
        put(10**30, "sources", 0, "n_tokens"),
        put(float("nan"), "quality", 0, "kl"),
        put(10**400, "quality", 0, "kl"),
        put("0.5", "quality", 0, "kl"),
        put(None, "quality", 0, "mean_kept"),
        put(None, "quality"),
    ],
)
def test_forged_facts(facts: Callable[[dict[str, Any]], object]) -> None:
    assert "is no sound edgemoe pattern" in refusal(forged(facts=facts))


@pytest.mark.parametrize(
    "arrays",
    [
        drop("vector"),
        drop("piece_document"),
        drop("sensitivity_loss"),
        put(np.zeros(3, np.float32), "extra"),
        put(np.zeros(8, np.float64), "vector"),
        put(np.full(8, np.nan, np.float32), "vector"),
        put(np.zeros((), np.float32), "vector"),
        put(np.zeros((2, 8), np.uint8), "permutations"),
        put(np.full((2, 8), 255, np.uint8), "permutations"),
        put(np.zeros((2, 8), np.int64), "permutations"),
        put(np.zeros((0, 1 << 40), np.uint8), "permutations"),
        put(np.full((2, 3, 8), 2, np.float16), "scores"),
        put(np.full((2, 3, 8), np.nan, np.float16), "scores"),
        put(np.zeros((2, 3, 9), np.float16), "scores"),
        put(np.full((2, 3), np.inf, np.float32), "score_scales"),
        put(np.zeros((2, 2), np.float32), "score_scales"),
        put(np.zeros(3, np.int32), "piece_tokens"),
        put(np.full((4, 3, 8), -1, np.float16), "piece_shares"),
        put(np.array([4, 2, 8], np.int32), "sensitivity_sizes"),
        put(np.zeros(0, np.int32), "sensitivity_sizes"),
        put(np.arange(10**6, dtype=np.int32), "sensitivity_sizes"),
        put(np.full((3, 3), np.inf, np.float32), "sensitivity_loss"),
        put(np.zeros((3, 2), np.float32), "sensitivity_loss"),
    ],
)
def test_forged_arrays(arrays: Callable[[Arrays], object]) -> None:
    assert "is no sound edgemoe pattern" in refusal(forged(arrays=arrays))


def header(text: str | bytes, data: bytes = b"") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return sealed(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    "body",
    [
        header(""),
        header("{}"),
        header("[]"),
        header("\xff\xfe"),
        header("[" * 100_000),
        header('{"__metadata__": 5}'),
        header('{"__metadata__": {"edgemoe_pattern": 5}}'),
        header(json.dumps({"__metadata__": {"edgemoe_pattern": "[" * 100_000}})),
        header(json.dumps({"__metadata__": {"edgemoe_pattern": '{"version": 1}'}})),
        header(json.dumps({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}})),
        header(json.dumps({"__metadata__": {"edgemoe_pattern": '{"version": 1}'}, "a": {"dtype": "F8_E4M3"}})),
        sealed((1 << 63).to_bytes(8, "little")),
        sealed(b""),
        sealed(b"1234567"),
    ],
)
def test_containers_that_somebody_made_up(body: bytes) -> None:
    refusal(body)


def test_what_a_header_claims_takes_no_memory() -> None:
    huge = {"dtype": "F32", "shape": [1 << 31], "data_offsets": [0, 1 << 33]}
    text = json.dumps({"__metadata__": {"edgemoe_pattern": '{"version": 1}'}, "vector": huge})
    tracemalloc.start()
    try:
        refusal(header(text))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20


def test_a_newer_version_says_to_upgrade() -> None:
    newer = forged(facts=put(VERSION + 1, "version"), arrays=put(np.zeros(3, np.float32), "extra"))
    assert refusal(newer) == "is a pattern of format version 2, this edgemoe reads up to 1; upgrade edgemoe"
    refusal(forged(facts=put(10**4000, "version")))


def sentence(path: Path | str) -> str:
    with pytest.raises(PatternError) as caught:
        read_pattern(path)
    return str(caught.value)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maths.pattern"
    assert sentence(path) == f"{path} does not exist; check the path of the pattern"
    path.write_bytes(b"")
    assert sentence(path).startswith(f"{path} is damaged or no edgemoe pattern: its checksum is wrong; ")
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        assert "is not a regular file" in sentence(other)
    assert "cannot be a file name" in sentence("a\0b")
    monkeypatch.setattr(pattern_file, "_MAX_BYTES", 1 << 20)
    with path.open("wb") as file:
        file.truncate((1 << 20) + 1)
    assert "no pattern is above 1 MiB" in sentence(path)


def test_a_pattern_that_no_reader_would_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern_file, "_MAX_BYTES", len(DATA))
    assert encode(PATTERN) == DATA
    monkeypatch.setattr(pattern_file, "_MAX_BYTES", len(DATA) - 1)
    with pytest.raises(PatternError, match="keep fewer documents"):
        encode(PATTERN)
    monkeypatch.undo()
    with pytest.raises(PatternError, match="bytes for the header of its file, more than 1,048,576;") as found:
        encode(replace(PATTERN, quality=(replace(ROW, text="x" * 200),) * 4000))
    assert "MiB" not in str(found.value)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maths.pattern"
    write_pattern(PATTERN, path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PatternError, match=r"maths\.pattern cannot be written: No space left on device"):
        write_pattern(tiny_pattern(seed=9), path)
    assert path.read_bytes() == DATA and list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    write_pattern(PATTERN, tmp_path / "maths.pattern")
    (tmp_path / "plain").touch()
    assert (tmp_path / "maths.pattern").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(("n_layers", "n_expert", "limit"), [(8, 32, 60_000), (48, 128, 1.2e6), (58, 256, 2.8e6)])
def test_files_stay_small(n_layers: int, n_expert: int, limit: float) -> None:
    model = tiny_model(n_layers, n_expert)
    scores = {f"criterion-{i}": random_scores(model, i) for i in range(12)}
    pattern: Pattern = tiny_pattern(model=model, scores=scores, n_documents=40)
    assert len(encode(pattern)) < limit
