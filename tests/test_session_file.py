"""Sessions: files that say what was saved or are refused, and conversations that go on as if never left."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_llama import TINY_MOE, arena_share
from tiny_patterns import stored_patterns, tiny_model

from edgemoe.backend import Llama
from edgemoe.errors import SessionError
from edgemoe.fingerprint import fingerprint
from edgemoe.index import read_index
from edgemoe.session_file import VERSION, SavedSession, read_session, write_session

MODEL = tiny_model()  # layers 1 to 3 of 8 experts
SAVED = SavedSession("Be brief.", ("How?", "So: “ä”.\n"), 2, "maths", True, {1: (7, 0, 3), 3: (2,)})

texts = st.text(st.characters(exclude_categories=["Cs"]))
experts = st.lists(st.integers(0, 7), min_size=1, unique=True).map(tuple)
sessions = st.builds(
    SavedSession,
    system=texts,
    turns=st.lists(st.tuples(texts, texts), max_size=3).map(
        lambda pairs: tuple(text for pair in pairs for text in pair)
    ),
    n_asked=st.integers(0, 1 << 40),
    task=st.none() | st.sampled_from(["maths", "c++"]),
    pinned=st.booleans(),
    residents=st.dictionaries(st.sampled_from(MODEL.layers), experts),
)


@given(sessions)
@settings(max_examples=50)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, session: SavedSession) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_session(session, MODEL, path)
    assert read_session(path, MODEL) == session


def written(tmp_path: Path, **changes: Any) -> Path:
    """A file that is sound but for the changes; a field that becomes ``...`` is left out."""
    path = tmp_path / "talk.json"
    write_session(SAVED, MODEL, path)
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not ...}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"system": None},
        {"system": "\ud800"},
        {"turns": ["only a question"]},
        {"turns": ["a question", 5]},
        {"turns": {}},
        {"n_asked": -1},
        {"n_asked": True},
        {"task": "\x1b[31m"},
        {"task": 7},
        {"pinned": 1},
        {"residents": []},
        {"residents": {"1": []}},
        {"residents": {"1": [0, 0]}},
        {"residents": {"1": [-1]}},
        {"model": {"name": "x"}},
        {"model": "x"},
        {"pinned": ...},
        {"more": 1},
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SessionError, match=r"talk\.json is a damaged edgemoe session; give the path of another one"):
        read_session(written(tmp_path, **changes), MODEL)


@pytest.mark.parametrize("residents", [{"0": [1]}, {"4": [1]}, {"1": [8]}, {"01": [1]}, {"²": [1]}, {"1" * 5000: [1]}])
def test_experts_that_the_model_does_not_have(tmp_path: Path, residents: dict[str, list[int]]) -> None:
    with pytest.raises(SessionError, match=r"talk\.json names experts that .* does not have"):
        read_session(written(tmp_path, residents=residents), MODEL)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"5", b"\xff", b"{}", b'{"edgemoe_session": true}', b"[" * 100000])
def test_another_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(data)
    with pytest.raises(SessionError, match=r"other\.json is no edgemoe session, or a damaged one"):
        read_session(path, MODEL)


def test_a_newer_version_and_another_model(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"newer format than 1, .*; upgrade edgemoe$"):
        read_session(written(tmp_path, edgemoe_session=VERSION + 1), MODEL)
    stranger = replace(MODEL, router="f" * 64, name="stranger")
    with pytest.raises(SessionError, match=rf"is a session of {MODEL.name}, not of this stranger; open it with that"):
        read_session(written(tmp_path), stranger)
    assert read_session(written(tmp_path), replace(MODEL, quantization="f" * 64)) == SAVED


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"nowhere\.json cannot be read: No such file or directory; check"):
        read_session(tmp_path / "nowhere.json", MODEL)
    with pytest.raises(SessionError, match=r"is not a regular file"):
        read_session(tmp_path, MODEL)
    with pytest.raises(SessionError, match=r"cannot be read: ValueError"):
        read_session(tmp_path / "a\0b", MODEL)
    with pytest.raises(SessionError, match=r"cannot be written: No such file or directory; check the folder"):
        write_session(SAVED, MODEL, tmp_path / "no" / "talk.json")


@pytest.mark.parametrize("data", [b"", b"a letter", b"{}", b'{"edgemoe_session": true}'])
def test_nothing_but_a_session_is_replaced(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "over.txt"
    path.write_bytes(data)
    with pytest.raises(SessionError, match=r"over\.txt is no edgemoe session, or a damaged one; give the path of one"):
        write_session(SAVED, MODEL, path)
    assert path.read_bytes() == data


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link", tmp_path):
        with pytest.raises(SessionError, match=r"is not a regular file, expected an edgemoe session"):
            write_session(SAVED, MODEL, path)
    assert pipe.is_fifo()


def test_a_session_is_private_unless_it_was_opened_up(tmp_path: Path) -> None:
    path, link = tmp_path / "talk.json", tmp_path / "link.json"
    write_session(SAVED, MODEL, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    link.symlink_to(path.name)
    write_session(replace(SAVED, n_asked=3), MODEL, link)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert read_session(path, MODEL).n_asked == 3


# ---------------------------------------------------------------- conversations

QUESTIONS = ["Write a function that adds two numbers.", "And one that subtracts them?", "Tom has 3 apples and buys 4."]


def chat(*arguments: object, lines: list[str]) -> list[dict[str, Any]]:
    """Answers of a process of its own."""
    fixed = ["--ram", "94MiB", "--ctx", "512", "--temp", "0", "--max-tokens", "24", "--threads", "1", "--json"]
    command = [sys.executable, "-m", "edgemoe", "chat", str(TINY_MOE), *fixed, *map(str, arguments)]
    done = subprocess.run(command, input="".join(f"{line}\n" for line in lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def n_bytes(answer: dict[str, Any]) -> int:
    return answer["stats"]["prompt_bytes_read"] + answer["stats"]["generation_bytes_read"]


def test_a_conversation_goes_on_as_if_it_had_not_been_left(tmp_path: Path) -> None:
    warm, cold = tmp_path / "warm.json", tmp_path / "cold.json"
    *_, stayed = chat(lines=QUESTIONS)
    chat("--session", warm, lines=QUESTIONS[:2])
    saved = json.loads(warm.read_text())
    cold.write_text(json.dumps({**saved, "residents": {}}))
    (returned,) = chat("--session", warm, lines=QUESTIONS[2:])
    (started,) = chat("--session", cold, lines=QUESTIONS[2:])
    assert stayed["text"] == returned["text"] == started["text"]
    assert n_bytes(returned) < n_bytes(started)
    assert json.loads(warm.read_text())["turns"] == [*saved["turns"], QUESTIONS[2], returned["text"]]


def test_saving_and_loading_in_conversation(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    *_, stayed = chat("--seed", 3, lines=QUESTIONS[:2])
    *_, returned = chat(
        "--seed", 3, lines=["/system", QUESTIONS[0], f"/save {path}", "/reset", f"/load {path}", QUESTIONS[1]]
    )
    assert (returned["text"], returned["stats"]["seed"]) == (stayed["text"], stayed["stats"]["seed"]) != ("", 3)


@pytest.mark.parametrize("experts", ["auto", "task"])
def test_the_task_comes_back(tmp_path: Path, experts: str) -> None:
    path, tasks = tmp_path / "talk.json", stored_patterns(TINY_MOE, tmp_path / "tasks")
    options = ("--experts", experts, "--store", tasks, "--ram", "195MiB", "--session", path)
    chat(*options, lines=["/task law", QUESTIONS[0]])
    saved = read_session(path, fingerprint(read_index(TINY_MOE)))
    assert (saved.task, saved.pinned) == ("law", True)
    (returned,) = chat(*options, lines=QUESTIONS[1:2])
    assert returned["task"]["task"] == "law" and returned["task"]["pinned"] is True
    (overruled,) = chat(*options, "--task", "maths", lines=QUESTIONS[1:2])
    assert overruled["task"]["task"] == "maths"


def test_a_smaller_arena_takes_the_likeliest_of_every_layer() -> None:
    settings = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1}
    with arena_share(0.6), Llama(str(TINY_MOE), **settings) as llama:
        llama.eval(list(range(30, 60)))
        residents = llama.store.residents()
    with arena_share(0.3), Llama(str(TINY_MOE), **settings) as llama:
        switch = llama.residency.restore(residents, None)
        assert 0.8 * llama.plan.arena_bytes < switch.bytes_read
        stats = llama.store.stats()
        assert (stats.evictions, stats.hits, stats.misses) == (0, 0, 0)
        for layer, ids in llama.store.residents().items():
            assert set(ids) == set(residents[layer][: len(ids)])
        assert llama.store.residents().keys() == residents.keys()
