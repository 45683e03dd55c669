from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from gguf_bytes import I32, U16, TensorBytes, gguf_bytes, number

from edgemoe.errors import ModelFileError
from edgemoe.gguf_header import read_header
from edgemoe.split_files import read_headers

TENSORS = [TensorBytes(f"t{i}", (8,)) for i in range(5)]


def write_parts(
    folder: Path,
    parts: Sequence[Sequence[TensorBytes]] = (TENSORS[:2], TENSORS[2:4], TENSORS[4:]),
    changes: Mapping[int, Mapping[str, object]] = {},
) -> list[Path]:
    """A split model as gguf-split writes it; `changes` replaces keys of the parts given, None removes one."""
    paths = []
    for i, tensors in enumerate(parts):
        keys: dict[str, object] = {
            "split.no": number(U16, i),
            "split.count": number(U16, len(parts)),
            "split.tensors.count": number(I32, sum(map(len, parts))),
        }
        keys |= changes.get(i, {})
        paths.append(folder / f"m-{i + 1:05}-of-{len(parts):05}.gguf")
        paths[-1].write_bytes(gguf_bytes({k: v for k, v in keys.items() if v is not None}, tensors))
    return paths


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_headers(path)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


def test_all_parts_in_order(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    headers = read_headers(str(paths[0]))
    assert [header.path for header in headers] == paths
    assert [tensor.name for header in headers for tensor in header.tensors] == ["t0", "t1", "t2", "t3", "t4"]
    assert headers == tuple(map(read_header, paths))


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, ([], TENSORS))
    assert [len(header.tensors) for header in read_headers(paths[0])] == [0, 5]


@pytest.mark.parametrize("metadata", [{}, {"split.count": number(U16, 0)}, {"split.count": number(U16, 1)}])
def test_a_single_file_has_any_name(metadata: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(gguf_bytes(metadata, TENSORS))
    assert read_headers(path) == (read_header(path),)


@pytest.mark.parametrize("part", [2, 3])
def test_a_missing_part_is_named(part: int, tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[part - 1].unlink()
    assert f"{paths[part - 1]} is missing" in refusal(paths[0])


def test_a_later_part_names_the_first(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    message = refusal(paths[2])
    assert "part 3 of 3" in message and f"give {paths[0]} instead" in message
    renamed = paths[2].rename(tmp_path / "other.gguf")
    assert "-00001-of-00003.gguf" in refusal(renamed)


@pytest.mark.parametrize("name", ["model.gguf", "m-00002-of-00003.gguf", "m-00001-of-00004.gguf", "m-1-of-3.gguf"])
def test_parts_are_found_by_name_alone(name: str, tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[1].unlink()
    renamed = paths[0].rename(tmp_path / name)
    message = refusal(renamed)
    assert "-00001-of-00003.gguf" in message and "names" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({1: {"split.no": number(U16, 2)}}, "m-00002-of-00003.gguf does not say that it is part 2"),
        ({2: {"split.no": None}}, "m-00003-of-00003.gguf has no split.no"),
        ({1: {"split.count": number(U16, 4)}}, "does not belong to a set of 3"),
        ({0: {"split.tensors.count": number(I32, 6)}}, "hold 5 tensors, expected 6"),
        ({0: {"split.tensors.count": None}}, "has no split.tensors.count"),
        ({0: {"split.count": number(I32, -3)}}, "split.count '-3'"),
        ({0: {"split.count": "3"}}, "split.count '3'"),
        ({0: {"split.count": True}}, "split.count 'True'"),
        ({0: {"split.no": 0.5}}, "split.no '0.5'"),
    ],
)
def test_parts_that_do_not_fit_together(changes: dict[int, dict[str, object]], expected: str, tmp_path: Path) -> None:
    assert expected in refusal(write_parts(tmp_path, changes=changes)[0])


def test_a_later_part_may_leave_the_count_out(tmp_path: Path) -> None:
    assert len(read_headers(write_parts(tmp_path, changes={1: {"split.count": None}})[0])) == 3


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, (TENSORS[:2], TENSORS[1:3]))
    assert "'t1'" in refusal(paths[0])


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    assert str(paths[1]) in refusal(paths[0])
    paths[1].unlink()
    paths[1].mkdir()
    assert f"{paths[1]} is a directory" in refusal(paths[0])
