"""Calibration text: what a task is profiled with, read from files, folders or standard input.

- A file that ends in ``.jsonl`` or ``.ndjson`` holds one document a line: an object with ``messages`` (a list of
  ``role`` and ``content``), ``prompt`` or ``question`` (both with or without ``answer``) or ``text``, looked for in
  that order. Other keys are ignored.
- Any other file is plain text, one document as a whole: a blank line ends no thought, and no program.
- A folder gives its JSON lines, text, Markdown and source code files (`TEXT_SUFFIXES`), subfolders too, by name.
  Hidden ones and symbolic links to folders are skipped.
- ``-`` is standard input; it and pipes hold JSON lines if the first line is a JSON object, else plain text.

Text is UTF-8, with or without a byte order mark. Documents of white space only are skipped and counted.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from edgemoe.errors import DocumentError

__all__ = ["TEXT_SUFFIXES", "Document", "DocumentReader", "Message", "calibration_hash", "read_documents"]

_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = _LINES_SUFFIXES | {
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".css", ".xml", ".toml", ".yaml", ".yml", ".sql",
    ".bash", ".c", ".cc", ".clj", ".cpp", ".cs", ".cu", ".dart", ".ex", ".f90", ".go", ".h", ".hpp", ".hs", ".java",
    ".jl", ".js", ".jsx", ".kt", ".lua", ".m", ".ml", ".nim", ".php", ".pl", ".proto", ".py", ".pyi", ".r", ".rb",
    ".rs", ".scala", ".sh", ".swift", ".ts", ".tsx", ".v", ".vue", ".zig",
}  # fmt: skip
"""What is read of a folder, lower case; a file that is named is read whatever its name."""

_MAX_DOCUMENT_BYTES = 64 << 20
_KEYS = 'expected an object with "text", "prompt", "question" or "messages"'


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes
    ----------
    role : str
        ``system``, ``user``, ``assistant`` or what else the chat template knows.
    content : str
        What was said.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One sample of a task.

    Attributes
    ----------
    source : str
        File, and line of JSON lines, for messages.
    text : str
        All of it as plain text; the turns of a conversation are separated by blank lines.
    prompt : tuple of Message
        What the model is asked, empty for running text.
    answer : str or None
        The answer to the prompt, None where there is none.
    """

    source: str
    text: str
    prompt: tuple[Message, ...] = ()
    answer: str | None = None


class DocumentReader(Iterator[Document]):
    """Documents, one at a time.

    Attributes
    ----------
    n_empty : int
        Documents skipped so far, because there was nothing but white space in them.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self.n_empty = 0
        self._paths = [os.fspath(path) for path in paths]
        self._documents = self._read()

    def __next__(self) -> Document:
        return next(self._documents)

    def _read(self) -> Iterator[Document]:
        empty = True
        for path in self._paths:
            for document in _read_path(path):
                if _is_empty(document):
                    self.n_empty += 1
                    continue
                empty = False
                yield document
        if empty:
            where = ", ".join(self._paths) or "nothing"
            skipped = f" ({self.n_empty} empty ones)" if self.n_empty else ""
            raise DocumentError(f"no documents in {where}{skipped}; give files with text of the task")


def read_documents(paths: Iterable[str | os.PathLike[str]]) -> DocumentReader:
    """Read calibration text.

    Parameters
    ----------
    paths : iterable of str or path-like
        Files and folders; ``-`` is standard input.

    Returns
    -------
    DocumentReader
        An iterator in order of the paths. Its next item raises `DocumentError` where a file cannot be read, is not
        UTF-8 or has a line that is no document, and at the end if there was no document at all.
    """
    return DocumentReader(paths)


def calibration_hash(documents: Iterable[Document]) -> str:
    """Hash what documents say, whatever their order and the names of their files.

    Returns
    -------
    str
        SHA-256, 64 hexadecimal digits.
    """
    contents = (
        [document.text, [[turn.role, turn.content] for turn in document.prompt], document.answer]
        for document in documents
    )
    digests = sorted(hashlib.sha256(json.dumps(content).encode()).digest() for content in contents)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _read_path(path: str) -> Iterator[Document]:
    try:
        if path == "-":
            yield from _read_stream(sys.stdin.buffer, "standard input", lines=None)
            return
        if not Path(path).is_dir():
            yield from _read_file(Path(path))
            return
        files = list(_walk(path))
        if not files:
            raise DocumentError(
                f"{path} holds no JSON lines, text or source code files; name the files to read, or another folder"
            )
        for file in files:
            yield from _read_file(file)
    except OSError as error:
        name = path if error.filename is None else os.fspath(error.filename)
        raise DocumentError(f"{name} cannot be read: {error.strerror}; check the path and its permissions") from None
    except ValueError:  # a NUL character, or text that no file name can hold
        raise DocumentError(f"{path!a} cannot be a file name; check the path") from None


def _walk(folder: str) -> Iterator[Path]:
    def fail(error: OSError) -> NoReturn:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(parent, name)
            if not name.startswith(".") and file.suffix.lower() in TEXT_SUFFIXES and file.is_file():
                yield file


def _read_file(path: Path) -> Iterator[Document]:
    # A pipe has no name to tell by.
    lines = path.suffix.lower() in _LINES_SUFFIXES if path.is_file() else None
    with path.open("rb") as file:
        yield from _read_stream(file, str(path), lines)


def _read_stream(file: BinaryIO, name: str, lines: bool | None) -> Iterator[Document]:
    """Give the documents of an open file: JSON lines, plain text, or (None) what its first line looks like."""
    first = file.readline(_MAX_DOCUMENT_BYTES + 1)
    if lines is None:
        lines = _is_json_object(first)
    if not lines:
        raw = first + file.read(_MAX_DOCUMENT_BYTES + 1 - len(first))
        yield Document(name, _text(raw, name))
        return
    number, line = 1, first
    while line:
        text = _text(line, name, number)
        if text.strip():
            yield _parse_line(text, f"{name}:{number}")
        line = file.readline(_MAX_DOCUMENT_BYTES + 1)
        number += 1


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _text(raw: bytes, name: str, line: int = 1) -> str:
    """Decode text that begins at a line."""
    if len(raw) > _MAX_DOCUMENT_BYTES:
        raise DocumentError(f"{name}:{line} begins a document above {_MAX_DOCUMENT_BYTES >> 20} MiB; split it")
    if line == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DocumentError(f"{name}:{line} is not UTF-8 text; convert the file with iconv, or leave it out") from None
    if "\0" in text:
        line += raw.count(b"\n", 0, raw.index(b"\0"))
        raise DocumentError(f"{name}:{line} holds a NUL character, so this is no text; leave the file out")
    return text


def _parse_line(line: str, source: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else "too long or too deep"
        raise DocumentError(f"{source} is not JSON ({what}); {_KEYS} on each line, repair or remove the line") from None
    if not isinstance(record, dict):
        raise DocumentError(f"{source} is not a JSON object; {_KEYS}")
    if "messages" in record:
        return _conversation(_messages(record["messages"], source), source)
    for key in ("prompt", "question"):
        if key in record:
            question = Message("user", _string(record[key], key, source))
            answer = record.get("answer")
            turns = () if answer is None else (Message("assistant", _string(answer, "answer", source)),)
            return _conversation((question, *turns), source)
    if "text" in record:
        return Document(source, _string(record["text"], "text", source))
    found = ", ".join(map(ascii, list(record)[:4])) or "no keys"
    raise DocumentError(f"{source} has {found[:100]}; {_KEYS}")


def _messages(raw: Any, source: str) -> tuple[Message, ...]:
    sound = isinstance(raw, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in raw)
    if not sound:
        raise DocumentError(f'{source}: "messages" is no list of objects with "role" and "content"; repair the line')
    return tuple(
        Message(_string(turn["role"], "role", source), _string(turn["content"], "content", source)) for turn in raw
    )


def _string(raw: Any, key: str, source: str) -> str:
    if not isinstance(raw, str):
        raise DocumentError(f'{source} has a "{key}" that is {type(raw).__name__}, expected a string; repair the line')
    # JSON can name half a surrogate pair, which UTF-8 cannot hold, and a NUL would end the text in llama.cpp.
    if "\0" in raw or raw.encode(errors="ignore").decode() != raw:
        raise DocumentError(f'{source} has a "{key}" with a character that is no text; repair the line')
    return raw


def _conversation(turns: tuple[Message, ...], source: str) -> Document:
    """Split off the last turn where it is an answer to the ones before."""
    text = "\n\n".join(turn.content for turn in turns)
    if len(turns) < 2 or turns[-1].role != "assistant":
        return Document(source, text, turns)
    return Document(source, text, turns[:-1], turns[-1].content if turns[-1].content.strip() else None)


def _is_empty(document: Document) -> bool:
    said = [turn.content for turn in document.prompt] if document.prompt else [document.text]
    return not any(content.strip() for content in said)
