"""A stored index is as good as the tensor table, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_bytes import I32, U16, U64, Raw, array, gguf_bytes, moe_metadata, moe_tensors, number
from test_split_files import write_parts

from edgemoe.errors import ModelFileError
from edgemoe.expert_offsets import OFFSETS, STRIDES
from edgemoe.index import read_index

TENSORS = moe_tensors()  # an embedding, then for two layers a router and three stacks of 4 experts of 16 KiB
STARTS = [2560 + layer * (1024 + 3 * 65536) + 1024 + part * 65536 for layer in range(2) for part in range(3)]
INDEX = {OFFSETS: array(U64, STARTS), STRIDES: array(U64, [16384] * 6)}


def write(folder: Path, index: dict[str, object]) -> Path:
    path = folder / "m.gguf"
    path.write_bytes(gguf_bytes({**moe_metadata(), **index}, TENSORS))
    return path


def test_an_index_that_agrees(tmp_path: Path) -> None:
    index = read_index(write(tmp_path, INDEX))
    data = index.file_bytes - STARTS[-1] - 65536
    assert [tensor.offset - data for tensor in index.experts] == STARTS


def test_other_metadata_may_change(tmp_path: Path) -> None:
    assert read_index(write(tmp_path, {**INDEX, "general.description": "x" * 1000})).experts


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {OFFSETS: array(U64, [*STARTS[:-1], STARTS[-1] + 32])},
            f"{OFFSETS} says {STARTS[-1] + 32} for expert tensor 6",
        ),
        ({STRIDES: array(U64, [16384, 16416] + [16384] * 4)}, f"{STRIDES} says 16416 for expert tensor 2"),
        ({OFFSETS: array(U64, STARTS[1:])}, f"{OFFSETS} has 5 items"),
        ({OFFSETS: array(U64, [0] * 5000)}, f"{OFFSETS} has 5000 items"),
        ({OFFSETS: array(U64, [])}, f"{OFFSETS} has 0 items"),
        ({OFFSETS: number(U64, STARTS[0])}, f"{OFFSETS} is no array"),
        ({OFFSETS: ["a", "b"]}, f"{OFFSETS} has 2 items"),
        ({OFFSETS: None}, f"{OFFSETS} is missing"),
        ({STRIDES: None}, f"{STRIDES} is missing"),
    ],
)
def test_an_index_that_disagrees(changes: dict[str, Raw | list[str] | None], expected: str, tmp_path: Path) -> None:
    index = {key: item for key, item in {**INDEX, **changes}.items() if item is not None}
    with pytest.raises(ModelFileError) as caught:
        read_index(write(tmp_path, index))
    message = str(caught.value)
    assert f"disagrees with its 6 expert tensors: {expected}" in message and "; the file is damaged" in message


def test_parts_of_a_split_model_count_their_own_offsets(tmp_path: Path) -> None:
    """gguf-split copies all keys into the first part, where the numbers no longer hold."""
    keys = {**moe_metadata(), **INDEX, "split.count": number(U16, 2), "split.tensors.count": number(I32, len(TENSORS))}
    path = write_parts(tmp_path, (TENSORS[:4], TENSORS[4:]), changes={0: keys})[0]
    assert len(read_index(path).experts) == 6
