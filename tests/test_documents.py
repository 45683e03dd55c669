from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe import documents
from edgemoe.documents import Document, DocumentReader, Message, calibration_hash, read_documents
from edgemoe.errors import DocumentError

CALIBRATION = Path(__file__).parents[2] / "shared" / "models" / "tiny-moe" / "eval" / "calib"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(*paths: Path | str) -> str:
    with pytest.raises(DocumentError) as caught:
        list(read_documents(paths))
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


def one_line(tmp_path: Path, record: object) -> Document:
    (document,) = read_documents([write(tmp_path / "one.jsonl", json.dumps(record))])
    return document


def test_running_text_of_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"id": 1, "text": "one"}\n\n{"text": "two"}\r\n{"text": " "}\n')
    reader = read_documents([path])
    assert list(reader) == [Document(f"{path}:1", "one"), Document(f"{path}:3", "two")]
    assert reader.n_empty == 1


@pytest.mark.parametrize("key", ["prompt", "question"])
def test_prompts_with_and_without_answers(tmp_path: Path, key: str) -> None:
    asked = (Message("user", "2 + 2?"),)
    document = one_line(tmp_path, {key: "2 + 2?", "answer": "4"})
    assert (document.prompt, document.answer, document.text) == (asked, "4", "2 + 2?\n\n4")
    for record in ({key: "2 + 2?"}, {key: "2 + 2?", "answer": None}):
        document = one_line(tmp_path, record)
        assert (document.prompt, document.answer, document.text) == (asked, None, "2 + 2?")


def test_conversations_end_in_the_answer(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2?"), ("assistant", "4")]
    raw = [{"role": role, "content": content, "name": "x"} for role, content in turns]
    document = one_line(tmp_path, {"messages": raw})
    assert document.prompt == tuple(Message(*turn) for turn in turns[:-1])
    assert document.answer == "4"
    document = one_line(tmp_path, {"messages": raw[:-1]})
    assert (len(document.prompt), document.answer) == (4, None)


def test_a_lonely_answer_prompts_nothing(tmp_path: Path) -> None:
    document = one_line(tmp_path, {"messages": [{"role": "assistant", "content": "4"}]})
    assert (document.prompt, document.answer) == ((Message("assistant", "4"),), None)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": ', "is not JSON (Expecting value)"),
        ("plain words", "is not JSON"),
        ("[" * 100_000, "is not JSON (too long or too deep)"),
        ("9" * 10_000, "is not JSON"),
        ('["text"]', "is not a JSON object"),
        ("{}", 'has no keys; expected an object with "text", "prompt", "question" or "messages"'),
        ('{"body": "x", "\\u001b[2J": 1}', "has 'body', '\\x1b[2J'; expected"),
        ('{"text": 5}', 'has a "text" that is int, expected a string'),
        ('{"prompt": null, "answer": "x"}', 'has a "prompt" that is NoneType'),
        ('{"prompt": "x", "answer": ["y"]}', 'has a "answer" that is list'),
        ('{"messages": "x"}', '"messages" is no list of objects'),
        ('{"messages": [{"role": "user"}]}', '"messages" is no list of objects'),
        ('{"messages": [{"role": "user", "content": [{}]}]}', 'has a "content" that is list'),
        ('{"text": "\\ud800"}', "a character that is no text"),
        ('{"text": "a\\u0000b"}', "a character that is no text"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    message = refusal(path)
    assert f"{path}:2" in message and (complaint in message or line.startswith("9"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82", b"\0"])
def test_what_is_not_text_is_named_with_its_line(tmp_path: Path, name: str, bad: bytes) -> None:
    path = write(tmp_path / name, b'{"text": "fine"}\n{"text": "' + bad + b'"}\n')
    assert f"{path}:2 " in refusal(path)


def test_plain_text_is_one_document_for_each_file(tmp_path: Path) -> None:
    text = "One paragraph.\n\nAnother.\n"
    first, second = write(tmp_path / "a.txt", text), write(tmp_path / "Makefile", text)
    assert list(read_documents([first, str(second)])) == [Document(str(first), text), Document(str(second), text)]


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.txt", b"\xef\xbb\xbfplain"),
        write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "lines"}'),
    ]
    assert [document.text for document in read_documents(paths)] == ["plain", "lines"]


def test_folders_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/y.MD", ".git/c.txt", "a/.hidden.txt", "model.gguf", "photo.jpg", "c.json"):
        write(tmp_path / name, name)
    write(tmp_path / "c.jsonl", '{"text": "line"}\n')
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert [document.text for document in read_documents([tmp_path])] == ["b.txt", "line", "a/y.MD", "a/z.py"]


def test_folders_without_text_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "GGUF")
    assert f"{tmp_path} holds no JSON lines, text or source code files" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        (b"Words,\n\nmore words.\n", ["Words,\n\nmore words.\n"]),
        (b'{\n"key": 1\n}\n', ['{\n"key": 1\n}\n']),
    ],
)
def test_standard_input_tells_by_its_first_line(
    monkeypatch: pytest.MonkeyPatch, content: bytes, texts: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = list(read_documents(["-"]))
    assert [document.text for document in found] == texts
    assert found[0].source.startswith("standard input")


def test_pipes_tell_by_their_first_line_too(tmp_path: Path) -> None:
    path = tmp_path / "63"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b'{"text": "one"}\n',))
    writer.start()
    assert [document.text for document in read_documents([path])] == ["one"]
    writer.join()


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    blank, lines = write(tmp_path / "a.txt", " \n"), write(tmp_path / "a.jsonl", '{"prompt": "", "answer": ""}')
    assert "(2 empty ones)" in refusal(blank, lines)
    assert "no documents in nothing" in refusal()


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'} cannot be read: No such file" in refusal(tmp_path / "none")
    assert "cannot be a file name" in refusal("a\0b")


def test_endless_documents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_MAX_DOCUMENT_BYTES", 100)
    for name in ("a.txt", "a.jsonl"):
        assert f"{tmp_path / name}:1 begins a document above" in refusal(write(tmp_path / name, "a" * 101))
    assert "above" in refusal("/dev/zero")


def test_the_hash_tells_what_is_said_not_where() -> None:
    first, second = Document("a:1", "one"), Document("b:2", "two", (Message("user", "two"),))
    known = calibration_hash([first, second])
    assert len(known) == 64
    assert known == calibration_hash([Document("elsewhere", "two", second.prompt), first])
    assert known != calibration_hash([first])
    assert known != calibration_hash([first, second, second])
    assert known != calibration_hash([first, Document("b:2", "two")])


@given(st.binary(max_size=200), st.sampled_from(["a.txt", "a.jsonl"]))
def test_any_bytes_give_documents_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, name: str
) -> None:
    path = write(tmp_path_factory.mktemp("any") / name, raw)
    try:
        found = list(read_documents([path]))
    except DocumentError as error:
        assert str(path) in str(error)
    else:
        assert all(document.text.strip() for document in found)
        assert isinstance(calibration_hash(found), str)


def test_calibration_text_of_the_tiny_model() -> None:
    if not CALIBRATION.is_dir():
        pytest.skip("needs the shared models")
    reader = read_documents([CALIBRATION])
    assert isinstance(reader, DocumentReader)
    assert sum(1 for _ in reader) > 400 and reader.n_empty == 0
