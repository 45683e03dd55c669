from __future__ import annotations

import io
import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf_bytes import string
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import ModelFileError
from edgemoe.file_window import FileWindow


def window(content: bytes, size: int | None = None) -> FileWindow:
    return FileWindow(io.BytesIO(content), Path("x.gguf"), len(content) if size is None else size)


def test_a_file_that_shrinks_while_it_is_read() -> None:
    with pytest.raises(ModelFileError, match="became shorter"):
        window(b"abc", size=10).take(10)
    shrinking = window(b"abc", size=100)
    shrinking.skip(50)
    with pytest.raises(ModelFileError, match="became shorter"):
        shrinking.take(1)


@given(
    st.lists(st.binary(max_size=40), max_size=30),
    st.integers(1, 64),
    st.lists(st.tuples(st.sampled_from(["take", "skip", "peek"]), st.integers(0, 30)), max_size=6),
)
def test_a_window_of_any_size_reads_the_same(words: list[bytes], size: int, moves: list[tuple[str, int]]) -> None:
    content = bytes(range(64)) + b"".join(map(string, words)) + b"end" + bytes(range(180))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgemoe.file_window._WINDOW", size)
        reader = window(content)
        assert reader.take(64) == bytes(range(64))
        reader.skip_strings(len(words))
        assert reader.take(3) == b"end"
        for move, n in moves:
            at = reader.position
            match move:
                case "take":
                    assert reader.take(n) == content[at : at + n]
                case "peek":
                    assert reader.peek(n) == content[at : at + n]
                case "skip":
                    reader.skip(n)
            assert reader.position == at + (n if move != "peek" else 0)
        rest = len(content) - reader.position
        assert reader.peek(10**6) == content[-rest:] if rest else not reader.peek(10**6)
        with pytest.raises(ModelFileError, match="cut short"):
            reader.skip(rest + 1)


class Endless(io.RawIOBase):
    """A file of zeros as long as anyone asks for, which counts what is read of it."""

    def __init__(self) -> None:
        self.n_read = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset

    def read(self, n: int = -1) -> bytes:
        self.n_read += n
        return bytes(n)


def test_a_huge_file_costs_no_more_than_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Endless()
    reader = FileWindow(file, Path("x.gguf"), 1 << 45)  # type: ignore[arg-type]
    reader.skip(100 << 20)
    reader.take(1 << 20)
    assert file.n_read == 1 << 20
    with pytest.raises(ModelFileError, match="above 256 MiB"):
        reader.take(200 << 20)
    with pytest.raises(ModelFileError, match="above 256 MiB"):
        reader.skip(1 << 40)
    with pytest.raises(ModelFileError, match="strings"):
        reader.skip_strings(1 << 30)
    assert file.n_read == 1 << 20
    monkeypatch.setattr("edgemoe.file_window._MAX_STRINGS", 1000)
    fresh = FileWindow(file, Path("x.gguf"), 1 << 45)  # type: ignore[arg-type]
    fresh.skip_strings(600)
    with pytest.raises(ModelFileError, match="claims 600 strings in the test"):
        fresh.doing = "the test"
        fresh.skip_strings(600)


def test_a_string_longer_than_the_file() -> None:
    for length in (1, 2**31, 2**63, 2**64 - 1):
        with pytest.raises(ModelFileError, match="cut short"):
            window(struct.pack("<Q", length)).skip_strings(1)


def test_walking_strings_keeps_one_window() -> None:
    content = string("x" * 30) * 200_000
    reader = window(content)
    tracemalloc.start()
    try:
        reader.skip_strings(200_000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert reader.position == len(content)
