"""What is written can be read back by both readers, and nothing half-written ever has the final name."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.converters import gguf_file
from edgemoe.converters.gguf_file import GgufFile, TensorInfo, Value
from edgemoe.errors import ConvertError
from edgemoe.ggml_types import type_blocks
from edgemoe.gguf_header import ArraySummary, read_header

F32, F16, Q8_0, Q4_K = 0, 1, 8, 12
METADATA = {"general.architecture": Value("qwen3moe", Kind.STRING), "some.number": Value(7, Kind.UINT32)}


def tensor(name: str, shape: tuple[int, ...], ggml_type: int = F32) -> TensorInfo:
    blocks = type_blocks(ggml_type)
    assert blocks is not None
    return TensorInfo(name, shape, ggml_type, prod(shape) // blocks[0] * blocks[1])


TENSORS = [tensor("a", (3,)), tensor("b", (256, 2, 4), Q4_K), tensor("c", (32, 5), Q8_0), tensor("d", (1,))]


def data_of(info: TensorInfo) -> bytes:
    return np.random.default_rng(len(info.name) + info.n_bytes).bytes(info.n_bytes)


def write(path: Path, tensors: Sequence[TensorInfo] = TENSORS, **options: object) -> None:
    with GgufFile(path, METADATA, tensors, **options) as file:  # type: ignore[arg-type]
        for info in tensors:
            file.write(info.name, [data_of(info)])
        file.finish()


def refusal(path: Path, tensors: Sequence[TensorInfo] = TENSORS, **options: object) -> str:
    with pytest.raises(ConvertError) as caught:
        write(path, tensors, **options)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


INTEGERS = {
    Kind.UINT8: (0, 2**8 - 1),
    Kind.INT8: (-(2**7), 2**7 - 1),
    Kind.UINT16: (0, 2**16 - 1),
    Kind.INT16: (-(2**15), 2**15 - 1),
    Kind.UINT32: (0, 2**32 - 1),
    Kind.INT32: (-(2**31), 2**31 - 1),
    Kind.UINT64: (0, 2**64 - 1),
    Kind.INT64: (-(2**63), 2**63 - 1),
}
ITEMS = {
    **{kind: st.integers(low, high) for kind, (low, high) in INTEGERS.items()},
    Kind.FLOAT32: st.floats(width=32, allow_nan=False),
    Kind.FLOAT64: st.floats(allow_nan=False),
    Kind.BOOL: st.booleans(),
    Kind.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
}


@st.composite
def values(draw: st.DrawFn) -> Value:
    kind = draw(st.sampled_from(list(ITEMS)))
    if draw(st.booleans()):
        return Value(draw(ITEMS[kind]), kind)
    # The gguf package cannot read an empty array of strings.
    return Value(draw(st.lists(ITEMS[kind], min_size=1, max_size=9)), Kind.ARRAY, kind)


NAMES = st.text(string.ascii_lowercase + "._", min_size=1, max_size=12)


@st.composite
def tensor_infos(draw: st.DrawFn) -> list[TensorInfo]:
    infos = []
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        kind = draw(st.sampled_from([F32, F16, Q8_0, Q4_K]))
        blocks = type_blocks(kind)
        assert blocks is not None
        row = blocks[0] * draw(st.integers(1, 3))
        infos.append(tensor(name, (row, *draw(st.lists(st.integers(1, 3), max_size=3))), kind))
    return infos


@settings(max_examples=100, deadline=None)
@given(
    keys=st.dictionaries(NAMES.map("x.{}".format), values(), max_size=8),
    infos=tensor_infos(),
    alignment=st.sampled_from([32, 64, 4096]),
    order=st.randoms(use_true_random=False),
    n_chunk=st.integers(1, 3000),
)
def test_both_readers_read_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    keys: Mapping[str, Value],
    infos: list[TensorInfo],
    alignment: int,
    order: object,
    n_chunk: int,
) -> None:
    path = tmp_path_factory.mktemp("written") / "m.gguf"
    metadata = {"general.architecture": Value("llama", Kind.STRING), **keys}
    with GgufFile(path, metadata, infos, alignment=alignment) as file:
        for info in order.sample(infos, len(infos)):  # type: ignore[attr-defined]
            data = data_of(info)
            file.write(info.name, (data[i : i + n_chunk] for i in range(0, len(data), n_chunk)))
        file.finish()
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]
    header = read_header(path)
    assert header.alignment == alignment
    assert header.file_size == path.stat().st_size == file.file_size
    assert [(t.name, t.shape, t.ggml_type, t.n_bytes) for t in header.tensors] == [
        (t.name, t.shape, t.ggml_type, t.n_bytes) for t in infos
    ]
    content = path.read_bytes()
    for found, info in zip(header.tensors, infos, strict=True):
        assert found.offset % alignment == 0
        assert content[found.offset : found.offset + found.n_bytes] == data_of(info)
    for key, value in metadata.items():
        kept = header.metadata[key]
        if value.element == Kind.STRING:
            assert kept == ArraySummary("string", len(value.value))
        else:
            assert kept == (tuple(value.value) if value.element is not None else value.value)
    reader = gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    extra = [] if alignment == 32 else ["general.alignment"]
    assert list(fields) == [*metadata, *extra]
    for key, value in metadata.items():
        assert fields[key].types == [value.type] + ([value.element] if value.element is not None else [])
        assert fields[key].contents() == value.value
    for found, info in zip(reader.tensors, infos, strict=True):
        assert found.name == info.name
        assert found.data.tobytes() == data_of(info)


def test_an_empty_array_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata = {"empty": Value([], Kind.ARRAY, Kind.STRING), "bytes": Value([b"\xff\xfe"], Kind.ARRAY, Kind.STRING)}
    with GgufFile(path, metadata, []) as file:
        file.finish()
    assert read_header(path).metadata["empty"] == ArraySummary("string", 0)
    assert b"\2\0\0\0\0\0\0\0\xff\xfe" in path.read_bytes()


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("at", range(len(TENSORS)))
@pytest.mark.parametrize("amid", [False, True])
def test_an_interruption_at_any_tensor_is_taken_up_again(at: int, amid: bool, tmp_path: Path) -> None:
    write(tmp_path / "expected.gguf")
    path = tmp_path / "m.gguf"
    with pytest.raises(Interrupted), GgufFile(path, METADATA, TENSORS) as file:
        for info in TENSORS[:at]:
            file.write(info.name, [data_of(info)])
        if amid:
            file.write(TENSORS[at].name, stopping(data_of(TENSORS[at])))
        raise Interrupted
    assert not path.exists()
    assert (tmp_path / "m.gguf.partial").exists() == (at > 0)
    with GgufFile(path, METADATA, TENSORS) as file:
        assert file.done == {info.name for info in TENSORS[:at]}
        for info in TENSORS:
            file.write(info.name, never() if info.name in file.done else [data_of(info)])
        file.finish()
    assert path.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert not (tmp_path / "m.gguf.partial").exists()


def stopping(data: bytes) -> object:
    yield data[: len(data) // 2]
    raise Interrupted


def never() -> object:
    raise AssertionError("nothing is asked for data that is there")
    yield


def test_a_process_that_was_killed_loses_what_the_disk_did_not_have(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with mock.patch.multiple(gguf_file, _SYNC_BYTES=TENSORS[1].n_bytes, _SYNC_SECONDS=float("inf")):
        killed = GgufFile(path, METADATA, TENSORS)
        for info in TENSORS[:3]:
            killed.write(info.name, [data_of(info)])
        os.close(killed._fd)  # as a kill does: nothing more is written
        with GgufFile(path, METADATA, TENSORS) as file:
            assert file.done == {"a", "b"}, "c waits for the next portion"


WRITES_SLOWLY = """
import sys, time
sys.path.append(sys.argv[1])
from pathlib import Path
from test_gguf_file import METADATA, TENSORS, data_of
from edgemoe.converters.gguf_file import GgufFile

def late(data):
    time.sleep(0.6)
    yield data

with GgufFile(Path(sys.argv[2]), METADATA, TENSORS) as file:
    for info in TENSORS[:2]:
        file.write(info.name, late(data_of(info)))
    print("two are written", flush=True)
    time.sleep(600)
"""


def test_a_process_that_was_killed_has_noted_what_it_finished(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    command = [sys.executable, "-c", WRITES_SLOWLY, str(Path(__file__).parent), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stdout.readline() == "two are written\n"
        running.kill()
    with GgufFile(path, METADATA, TENSORS) as file:
        assert file.done == {"a", "b"}


def test_nothing_is_noted_that_the_disk_did_not_take(tmp_path: Path) -> None:
    refuses = mock.Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO)))
    with (
        mock.patch.multiple(gguf_file, _SYNC_SECONDS=0.0),
        mock.patch.object(gguf_file.os, "fdatasync", refuses),
        pytest.raises(ConvertError, match="cannot be written: Input/output error"),
        GgufFile(tmp_path / "m.gguf", METADATA, TENSORS) as file,
    ):
        file.write("a", [data_of(TENSORS[0])])
    with GgufFile(tmp_path / "m.gguf", METADATA, TENSORS) as file:
        assert not file.done


def partial_file(path: Path, sources: Sequence[Path] = ()) -> Path:
    with GgufFile(path, METADATA, TENSORS, sources=sources) as file:
        file.write("a", [data_of(TENSORS[0])])
    return file.partial


def test_another_plan_is_begun_anew(tmp_path: Path) -> None:
    path, source = tmp_path / "m.gguf", tmp_path / "source"
    source.write_bytes(b"1")
    partial_file(path, [source])
    with GgufFile(path, METADATA, TENSORS, sources=[source]) as file:
        assert file.done == {"a"}
    with GgufFile(path, {**METADATA, "more": Value(1, Kind.UINT8)}, TENSORS, sources=[source]) as file:
        assert not file.done
    partial_file(path, [source])
    os.utime(source, ns=(1, 1))
    with GgufFile(path, METADATA, TENSORS, sources=[source]) as file:
        assert not file.done, "another source may be other weights"


def test_a_partial_file_that_is_something_else_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    (tmp_path / "m.gguf.partial").write_bytes(b"something" * 1000)
    write(path)
    write(tmp_path / "expected.gguf")
    assert path.read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize("chunks", [[b"1"], [bytes(13)], [bytes(6), bytes(7)], []])
def test_data_of_another_size_is_refused(chunks: list[bytes], tmp_path: Path) -> None:
    with GgufFile(tmp_path / "m.gguf", METADATA, TENSORS) as file:
        with pytest.raises(ConvertError, match="tensor 'a' is not the 12 bytes"):
            file.write("a", chunks)
        with pytest.raises(KeyError):
            file.write("z", chunks)
        assert not file.done


def test_a_file_that_lacks_a_tensor_gets_no_name(tmp_path: Path) -> None:
    with GgufFile(tmp_path / "m.gguf", METADATA, TENSORS) as file:
        file.write("a", [data_of(TENSORS[0])])
        with pytest.raises(ConvertError, match="no data of tensor 'b'"):
            file.finish()
    assert not (tmp_path / "m.gguf").exists()


def test_an_existing_file_is_replaced_by_force_only(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"mine")
    assert f"{path} exists already" in refusal(path)
    assert path.read_bytes() == b"mine"
    with GgufFile(path, METADATA, TENSORS, force=True) as file:
        file.write("a", [data_of(TENSORS[0])])
    assert path.read_bytes() == b"mine", "it stays until the new one is complete"
    write(path, force=True)
    assert len(read_header(path).tensors) == 4


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with GgufFile(path, METADATA, []) as file:
        path.write_bytes(b"mine")
        with pytest.raises(ConvertError, match="exists already"):
            file.finish()
    assert path.read_bytes() == b"mine"


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(b"weights")
    assert "is what is to be converted" in refusal(source, sources=[source], force=True)
    assert "is a directory" in refusal(tmp_path, force=True)
    assert "is a directory" in refusal(Path())
    assert "missing is not a directory" in refusal(tmp_path / "missing" / "m.gguf")
    assert "is not a regular file" in refusal(Path("/dev/null"), force=True)
    assert "cannot be read" in refusal(tmp_path / "m.gguf", sources=[tmp_path / "gone"])
    assert "File name too long" in refusal(tmp_path / ("x" * 250))
    assert source.read_bytes() == b"weights"


def test_two_processes_cannot_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    partial = partial_file(path)
    before = partial.read_bytes()
    with partial.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in refusal(path)
    assert partial.read_bytes() == before


def test_what_another_process_finished_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    partial = partial_file(path)
    before = partial.read_bytes()
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        partial.rename(path)
        real(fd, operation)

    with mock.patch.object(gguf_file.fcntl, "flock", flock):
        assert "another process" in refusal(path)
    assert path.read_bytes() == before


def test_room_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    huge = tensor("a", (1 << 40, 1 << 10))
    message = refusal(tmp_path / "m.gguf", [huge])
    assert "needs 4.00 PiB" in message or "needs 4096 TiB" in message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk(small_disk: Path) -> None:
    path, big = small_disk / "m.gguf", [tensor("a", (1 << 17,)), tensor("b", (1 << 18,))]
    assert "needs 1.50 MiB but its disk has 1.00 MiB free; make room" in refusal(path, big)
    assert not list(small_disk.iterdir())
    plenty = mock.Mock(free=1 << 40)  # as if it filled up later
    with mock.patch.object(gguf_file.shutil, "disk_usage", return_value=plenty):
        assert "No space left on device" in refusal(path, big)
    assert [file.name for file in small_disk.iterdir()] == ["m.gguf.partial"], "with what is complete"
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    with GgufFile(path, METADATA, big) as file:
        assert file.done == {"a"}
    write(path, big)
    assert [file.name for file in small_disk.iterdir()] == ["m.gguf"]


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    """The disk fills up while the file is written: what is complete is kept, and later taken up again."""
    path = tmp_path / "m.gguf"
    real, room = os.pwrite, 5000

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(fd, bytes(data)[:room], offset)
        room -= taken
        return taken

    big = [tensor("a", (500,)), tensor("b", (1000,))]
    with mock.patch.object(gguf_file.os, "pwrite", pwrite):
        message = refusal(path, big)
    assert "No space left on device" in message and "goes on where it stopped" in message
    assert not path.exists()
    write(path, big)
    assert path.read_bytes().endswith(data_of(big[1]))
