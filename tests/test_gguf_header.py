from __future__ import annotations

import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    TYPE_F32,
    TYPE_Q2_0,
    TYPE_Q8_0,
    U8,
    U16,
    U32,
    U64,
    Raw,
    TensorBytes,
    array,
    check_sound,
    gguf_bytes,
    n_bytes,
    number,
    string,
)

from edgemoe.errors import ModelFileError
from edgemoe.gguf_header import ArraySummary, read_header

TINY_MOE = Path(__file__).parents[2] / "shared" / "models" / "tiny-moe"
Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write_file


def refusal(path: Path) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 400 + len(str(path))
    assert "; " in message, "no next step"
    return message


# Two keys and two tensors, written out by hand from the format's description.
KNOWN = b"".join(
    [
        b"GGUF", b"\x03\0\0\0", b"\x02" + bytes(7), b"\x02" + bytes(7),
        b"\x14" + bytes(7), b"general.architecture", b"\x08\0\0\0", b"\x05" + bytes(7), b"llama",
        b"\x03" + bytes(7), b"pi.", b"\x06\0\0\0", b"\xdb\x0f\x49\x40",
        b"\x01" + bytes(7), b"a", b"\x02\0\0\0", b"\x20" + bytes(7), b"\x03" + bytes(7),
        b"\x08\0\0\0", bytes(8),
        b"\x02" + bytes(7), b"bc", b"\x01\0\0\0", b"\x05" + bytes(7), b"\0\0\0\0", b"\x80" + bytes(7),
        bytes(29), b"q" * 102, bytes(26), b"f" * 20,
    ]
)  # fmt: skip


def test_known_bytes(write: Write) -> None:
    path = write(KNOWN)
    header = read_header(str(path))
    assert header.metadata == {
        "general.architecture": "llama",
        "pi.": struct.unpack("<f", b"\xdb\x0f\x49\x40")[0],
    }
    assert [(t.name, t.shape, t.ggml_type, t.offset, t.n_bytes) for t in header.tensors] == [
        ("a", (32, 3), TYPE_Q8_0, 192, 102),
        ("bc", (5,), TYPE_F32, 320, 20),
    ]
    assert (header.path, header.version, header.data_offset, header.alignment, header.file_size) == (
        path, 3, 192, 32, 340,
    )  # fmt: skip
    for tensor, byte in zip(header.tensors, b"qf", strict=True):
        assert KNOWN[tensor.offset : tensor.offset + tensor.n_bytes] == bytes([byte]) * tensor.n_bytes


def test_every_prefix_of_a_file_is_refused(write: Write) -> None:
    for length in range(len(KNOWN)):
        message = refusal(write(KNOWN[:length]))
        assert ("empty" if length == 0 else "not a GGUF" if length < 4 else "cut short") in message
    assert "'bc'" in refusal(write(KNOWN[:-1])) and "'a'" in refusal(write(KNOWN[:250]))
    read_header(write(KNOWN + b"trailing bytes are harmless"))


@pytest.mark.parametrize("name", ["tiny-moe-q4_k_m.gguf", "tiny-moe-q8_0.gguf"])
def test_a_real_model_reads_as_the_gguf_package_reads_it(name: str) -> None:
    path = TINY_MOE / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert [(t.name, t.shape, t.ggml_type, t.offset, t.n_bytes) for t in ours.tensors] == [
        (t.name, tuple(map(int, t.shape)), int(t.tensor_type), int(t.data_offset), int(t.n_bytes))
        for t in theirs.tensors
    ]
    assert (ours.data_offset, ours.alignment) == (theirs.data_offset, theirs.alignment)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, value in ours.metadata.items():
        if isinstance(value, ArraySummary):
            assert (value.type, value.length) == (fields[key].types[1].name.lower(), len(fields[key].data))
        else:
            assert value == (tuple(v) if isinstance(v := fields[key].contents(), list) else v)
    check_sound(ours)


def test_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(4096)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Größe 🐍")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 2.0])
    writer.add_array("bools", [True, False])
    writer.add_array("words", ["a", "", "ccc"])
    writer.add_array("many", list(range(5000)))
    writer.add_tensor("x", np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    writer.add_tensor("y", np.ones((1, 1, 1, 7), dtype=np.int32))
    writer.add_tensor("scalar", np.array(2.5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    expected = {
        "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u64": 2**64 - 1, "i64": -(2**63), "f64": 0.1,
        "yes": True, "text": "Größe 🐍", "ints": (1, -2, 3), "floats": (0.5, 2.0), "bools": (True, False),
        "words": ArraySummary("string", 3), "many": ArraySummary("int32", 5000),
    }  # fmt: skip
    assert {key: header.metadata[key] for key in expected} == expected
    assert header.metadata["yes"] is True and header.alignment == 4096
    content = path.read_bytes()
    by_name = {t.name: t for t in header.tensors}
    assert by_name["x"].shape == (4, 3, 2) and by_name["scalar"].shape == (1,)
    for name, dtype, values in (("x", "<f2", range(24)), ("y", "<i4", [1] * 7), ("scalar", "<f4", [2.5])):
        t = by_name[name]
        assert t.offset % 4096 == 0
        assert np.frombuffer(content[t.offset : t.offset + t.n_bytes], dtype).tolist() == list(values)


def test_version_2_has_the_same_layout(write: Write) -> None:
    header = read_header(write(KNOWN[:4] + b"\x02" + KNOWN[5:]))
    assert header.version == 2 and len(header.tensors) == 2


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, "version 1"),
        (0, "version 0"),
        (4, "version 4"),
        (3 << 24, "big-endian"),
        (2**32 - 1, "version 4294967295"),
    ],
)
def test_other_versions(version: int, expected: str, write: Write) -> None:
    assert expected in refusal(write(gguf_bytes({}, version=version)))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "guess"),
    [
        (b"", "is empty"),
        (struct.pack("<Q", 300) + b'{"__metadata__":{}}', "safetensors"),
        (zipped(), "zip"),
        (pickle.dumps({"a": 1}, protocol=2), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n\n <html>", "web page"),
        (b'{"error": "not found"}', "JSON"),
        (b"tjgg\1\0\0\0", "before GGUF"),
        (b"FUGG\0\0\0\3", "b'FUGG"),
        (b"G", "b'G'"),
        (b"\x1b[2J\x1b]0;evil\x07", "unknown data"),
        (bytes(5000), "unknown data"),
    ],
)
def test_files_that_are_no_gguf(content: bytes, guess: str, write: Write) -> None:
    message = refusal(write(content))
    assert guess in message and "GGUF" in message and message.isprintable()


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert "directory" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "gone.gguf")
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be read" in refusal(tmp_path / "loop")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    assert "cannot be read" in refusal(Path("/proc/self/mem/x"))
    for name in ("nul\0.gguf", "\ud800.gguf"):
        with pytest.raises(ModelFileError, match="file name"):
            read_header(name)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(13, "Permission denied"), "permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (FileNotFoundError(2, "No such file"), "does not exist"),
    ],
)
def test_files_that_cannot_be_opened(
    error: OSError, expected: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(KNOWN)

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Path, "open", refuse)
    assert expected in refusal(path)


GOOD = TensorBytes("good", (8,))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([TensorBytes("a", (8,), offset=16)], "offset 16, not a multiple of 32"),
        ([TensorBytes("a", (8,), offset=1 << 40)], "cut short"),
        ([TensorBytes("a", (8,), offset=(1 << 64) - 32)], "cut short"),
        ([GOOD, TensorBytes("a", (8,), offset=0)], "'a' overlapping"),
        ([TensorBytes("a", (64,)), TensorBytes("b", (8,), offset=32), GOOD], "'b' overlapping"),
        (
            [GOOD, TensorBytes("a", (8,), offset=64), TensorBytes("b", (8,))],
            "32 stray bytes before tensor 'a'",
        ),
        ([GOOD, GOOD], "two tensors named 'good'"),
        ([TensorBytes("a", (1, 1, 1, 1, 1))], "5 dimensions"),
        ([TensorBytes("a", (0,))], "impossible shape (0,)"),
        ([TensorBytes("a", (8, 0, 2))], "impossible shape"),
        ([TensorBytes("a", (1 << 62, 2), data=b"")], "impossible shape"),
        ([TensorBytes("a", (1 << 32, 1 << 32), data=b"")], "impossible shape"),
        ([TensorBytes("a", ((1 << 64) - 1,), data=b"")], "impossible shape"),
        ([TensorBytes("a", (1 << 61,), data=b"")], "cut short"),
        ([TensorBytes("a", ((1 << 63) - 1,), data=b"")], "cut short"),
        ([TensorBytes("a", (33,), TYPE_Q8_0, data=b"")], "not a multiple of 32"),
        ([TensorBytes("a", (32,), TYPE_Q2_0, data=b"")], "not a multiple of 64"),
        ([TensorBytes("", (8,))], "0 bytes as the name"),
        ([TensorBytes("x" * 64, (8,))], "64 bytes as the name"),
        ([TensorBytes(b"\xff\xfe", (8,))], "not UTF-8"),
        ([TensorBytes("a\0b", (8,))], "NUL"),
        ([TensorBytes("\x1b[2J", (8,), offset=1)], "x1b[2J"),
    ],
)
def test_unsound_tensors(tensors: list[TensorBytes], expected: str, write: Write) -> None:
    message = refusal(write(gguf_bytes({}, tensors)))
    assert expected in message and message.isprintable()


def test_names_up_to_ggmls_limit(write: Write) -> None:
    assert read_header(write(gguf_bytes({}, [TensorBytes("x" * 63, (8,))]))).tensors[0].name == "x" * 63


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"general.alignment": 0}, "general.alignment '0'"),
        ({"general.alignment": 48}, "general.alignment '48'"),
        ({"general.alignment": -32.0}, "general.alignment"),
        ({"general.alignment": number(I32, -32)}, "general.alignment"),
        ({"general.alignment": number(U64, 1 << 40)}, "general.alignment"),
        ({"general.alignment": "32"}, "general.alignment"),
        ({"general.alignment": True}, "general.alignment"),
        ({"general.alignment": [32]}, "general.alignment"),
        ({"k": Raw(13, bytes(8))}, "unknown type 13"),
        ({"k": Raw(2**32 - 1, bytes(8))}, "unknown type"),
        ({"k": Raw(ARRAY, struct.pack("<IQ", 99, 1))}, "array of unknown type 99"),
        ({"k": Raw(ARRAY, struct.pack("<IQ", ARRAY, 1) + array(U8, [1]).data)}, "array of arrays"),
        ({"k": Raw(ARRAY, struct.pack("<I", ARRAY) * 100_000)}, "array of arrays"),
        ({"k": Raw(ARRAY, struct.pack("<IQ", U8, 1 << 63))}, "cut short"),
        ({"k": Raw(ARRAY, struct.pack("<IQ", F64, (1 << 61) + 1))}, "cut short"),
        ({"k": Raw(ARRAY, struct.pack("<IQ", STRING, 1 << 20))}, "cut short"),
        ({"k": Raw(ARRAY, struct.pack("<IQ", STRING, 1 << 60))}, "strings"),
        ({"k": Raw(ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 60))}, "cut short"),
        ({"k": Raw(STRING, struct.pack("<Q", 1 << 50))}, "cut short"),
        ({"k": Raw(STRING, struct.pack("<Q", 1 << 63))}, "cut short"),
        ({"": 1}, "0 bytes as the name"),
        ({"x" * 70_000: 1}, "70000 bytes as the name"),
        ({"a\0b": 1}, "NUL"),
    ],
)
def test_unsound_metadata(metadata: dict[str, object], expected: str, write: Write) -> None:
    message = refusal(write(gguf_bytes(metadata, [GOOD])))
    assert expected in message and message.isprintable()


def test_keys_are_unique_and_utf8(write: Write) -> None:
    twice = gguf_bytes({}, n_keys=2) + (string("k") + struct.pack("<IB", U8, 1)) * 2
    assert "'k' twice" in refusal(write(twice))
    not_utf8 = gguf_bytes({}, n_keys=1) + string(b"\xc3\x28") + struct.pack("<IB", U8, 1)
    assert "not UTF-8" in refusal(write(not_utf8))
    stray_byte_in_a_value = {"k": Raw(STRING, string(b"caf\xe9"))}
    assert read_header(write(gguf_bytes(stray_byte_in_a_value))).metadata == {"k": "caf\ufffd"}


@pytest.mark.parametrize(
    "counts", [{"n_tensors": 2**64 - 1}, {"n_keys": 2**64 - 1}, {"n_tensors": 1 << 17}, {"n_keys": 1 << 30}]
)
def test_absurd_counts_cost_nothing(counts: dict[str, int], write: Write) -> None:
    read_header(write(KNOWN))  # imports and tables
    path = write(gguf_bytes({"k": 1}, [GOOD], **counts) + bytes(100_000))
    tracemalloc.start()
    try:
        assert "claims" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("counts", [{"n_tensors": (1 << 17) + 1}, {"n_keys": (1 << 16) + 1}])
def test_a_large_file_does_not_justify_absurd_counts(counts: dict[str, int], write: Write) -> None:
    path = write(gguf_bytes({"k": 1}, [GOOD], **counts))
    os.truncate(path, 1 << 30)
    assert "expected at most" in refusal(path)


def test_all_numeric_types_and_their_arrays(write: Write) -> None:
    values: dict[int, list[float]] = {
        U8: [0, 255], I8: [-128, 127], U16: [0, 65535], I16: [-32768, 7], U32: [0, 2**32 - 1],
        I32: [-(2**31), 5], F32: [0.5, -2.0], F64: [0.1, 1e300], U64: [0, 2**64 - 1], I64: [-(2**63), 2**63 - 1],
    }  # fmt: skip
    metadata: dict[str, object] = {f"one.{kind}": number(kind, items[0]) for kind, items in values.items()}
    metadata |= {f"all.{kind}": array(kind, items) for kind, items in values.items()}
    metadata |= {"odd bool": Raw(BOOL, b"\x07"), "none": array(U32, []), "no words": array(STRING, [])}
    metadata |= {"kept": array(U8, [1] * 4096), "not kept": array(U8, [1] * 4097)}
    read = read_header(write(gguf_bytes(metadata))).metadata
    for kind, items in values.items():
        assert read[f"one.{kind}"] == items[0] and read[f"all.{kind}"] == tuple(items)
    assert read["odd bool"] is True and read["none"] == () and read["no words"] == ArraySummary("string", 0)
    assert read["kept"] == (1,) * 4096 and read["not kept"] == ArraySummary("uint8", 4097)


def test_long_texts_are_skipped(write: Write) -> None:
    metadata = {"kept": "a" * (1 << 20), "skipped": "b" * ((1 << 20) + 1), "after": 7}
    read = read_header(write(gguf_bytes(metadata))).metadata
    assert read == {"kept": "a" * (1 << 20), "skipped": ArraySummary("utf8", (1 << 20) + 1), "after": 7}


def test_a_large_vocabulary_is_walked_not_kept(write: Write) -> None:
    tokens = [f"token{i:06}" for i in range(150_000)]
    read_header(write(KNOWN))
    path = write(gguf_bytes({"t": array(STRING, tokens), "s": array(F32, [0.0] * 150_000), "after": 7}, [GOOD]))
    assert path.stat().st_size > 3_000_000
    start = time.process_time()
    header = read_header(path)
    assert time.process_time() - start < 2, "some 0.05 s are usual"
    assert header.metadata == {
        "t": ArraySummary("string", 150_000),
        "s": ArraySummary("float32", 150_000),
        "after": 7,
    }
    tracemalloc.start()
    try:
        read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_type_gguf_does_not_know_is_sized_by_llama_cpps_blocks(write: Write) -> None:
    tensor = TensorBytes("q", (64, 3), TYPE_Q2_0, data=b"q" * 54)
    first, second = read_header(write(gguf_bytes({}, [tensor, GOOD]))).tensors
    assert (first.n_bytes, second.offset - first.offset) == (54, 64)


@pytest.mark.parametrize("last", [False, True])
def test_a_type_nobody_knows_is_sized_by_the_gap_to_whole_rows(last: bool, write: Write) -> None:
    new = TensorBytes("new", (100, 40, 2), 99, data=b"n" * (80 * 13))
    (tensor,) = (
        t for t in read_header(write(gguf_bytes({}, [GOOD, new] if last else [new, GOOD]))).tensors if t.name == "new"
    )
    assert tensor.n_bytes == 80 * 13


def test_a_type_nobody_knows_needs_a_byte_for_every_row(write: Write) -> None:
    new = TensorBytes("new", (100, 400), 99, data=b"n" * 32)
    assert "'new'" in refusal(write(gguf_bytes({}, [new, GOOD])))
    backwards = [TensorBytes("new", (4,), 99, bytes(32), offset=32), TensorBytes("a", (8,), offset=0)]
    assert "unknown type 99" in refusal(write(gguf_bytes({}, backwards)))


def test_a_file_without_tensors(write: Write) -> None:
    content = gguf_bytes({"k": 1})
    header = read_header(write(content))
    assert header.tensors == () and header.data_offset == len(content)


def test_sizes_of_the_builder_are_ggmls() -> None:
    assert n_bytes(TensorBytes("", (64, 2), TYPE_Q8_0)) == 2 * 2 * 34
