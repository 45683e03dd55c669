"""Checkpoints: what is read is what is stored, and whatever is wrong is one sentence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors_bytes import bfloat16, write_checkpoint, write_raw, write_safetensors

from edgemoe.converters.checkpoint import Checkpoint
from edgemoe.errors import ConvertError

NOISE = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)


def folder_of(tmp_path: Path, tensors: dict[str, tuple[str, Any]], **config: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ConvertError) as caught, Checkpoint(folder) as checkpoint:
        for tensor in checkpoint.tensors.values():
            checkpoint.floats(tensor)
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


@pytest.mark.parametrize(
    ("dtype", "stored", "expected"),
    [
        ("F32", NOISE, NOISE),
        ("F64", NOISE.astype(np.float64), NOISE),
        ("F16", NOISE.astype(np.float16), NOISE.astype(np.float16).astype(np.float32)),
        ("BF16", bfloat16(NOISE), (NOISE.view(np.uint32) & 0xFFFF0000).view(np.float32)),
    ],
)
def test_floats_are_what_is_stored(dtype: str, stored: Any, expected: Any, tmp_path: Path) -> None:
    first = ("U8", np.arange(3, dtype=np.uint8))  # so that nothing is aligned
    with Checkpoint(folder_of(tmp_path, {"a": first, "w": (dtype, stored)})) as checkpoint:
        tensor = checkpoint.tensors["w"]
        assert np.array_equal(checkpoint.floats(tensor), expected)
        assert np.array_equal(checkpoint.floats(tensor, 1, 4), expected[1:4])
        assert checkpoint.floats(tensor).dtype == np.float32
        assert np.array_equal(checkpoint.raw(checkpoint.tensors["a"]), [0, 1, 2])


def test_float8_is_scaled_by_blocks(tmp_path: Path) -> None:
    # Codes of float8 E4M3: 1, -1, 448 (the largest), 2**-9 (the smallest), 0.
    values = {0x38: 1.0, 0xB8: -1.0, 0x7E: 448.0, 0x01: 2.0**-9, 0x00: 0.0}
    codes = np.random.default_rng(0).choice(list(values), (5, 7)).astype(np.uint8)
    scales = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    tensors = {"w": ("F8_E4M3", codes), "w_scale_inv": ("F32", scales)}
    quantization = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    expected = np.vectorize(values.__getitem__)(codes) * scales.repeat(2, axis=0).repeat(4, axis=1)[:5, :7]
    with Checkpoint(folder_of(tmp_path, tensors, quantization_config=quantization)) as checkpoint:
        tensor = checkpoint.tensors["w"]
        assert np.array_equal(checkpoint.floats(tensor), expected)
        assert np.array_equal(checkpoint.floats(tensor, 3, 5), expected[3:5])


def test_float8_without_scales(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"w": ("F8_E4M3", np.zeros((2, 2), np.uint8))})
    assert "float8 without block scales" in refusal(folder)


def test_float8_with_scales_of_another_shape(tmp_path: Path) -> None:
    tensors = {"w": ("F8_E4M3", np.zeros((2, 2), np.uint8)), "w_scale_inv": ("F32", np.ones((2, 1), np.float32))}
    quantization = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    assert "has shape (2, 1), expected (1, 1)" in refusal(
        folder_of(tmp_path, tensors, quantization_config=quantization)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_that_are_no_numbers(value: float, dtype: str, tmp_path: Path) -> None:
    damaged = NOISE.copy()
    damaged[3, 2] = value
    stored = {"F32": damaged, "F16": damaged.astype(np.float16), "BF16": bfloat16(damaged)}[dtype]
    message = refusal(folder_of(tmp_path, {"fine": ("F32", NOISE), "model.bad": (dtype, stored)}))
    assert "tensor 'model.bad'" in message and "NaN or infinite" in message


def test_shards_and_links(tmp_path: Path) -> None:
    """A hub's cache keeps files elsewhere and links to them."""
    original = write_checkpoint(tmp_path / "blobs", n_shards=3)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in original.iterdir():
        (linked / path.name).symlink_to(path)
    with Checkpoint(original) as one, Checkpoint(linked) as other:
        assert len(one.files) == 4 and list(one.tensors) == list(other.tensors)
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        assert np.array_equal(one.floats(one.tensors[name]), other.floats(other.tensors[name]))


def test_close_closes_every_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, n_shards=3)

    def n_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = n_open()
    with Checkpoint(folder):
        assert n_open() == before + 3
    assert n_open() == before


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def _cut(name: str, n_bytes: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size - n_bytes)

    return cut


def _only_a_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK\x03\x04")


def _without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / SHARD).unlink()


SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove(SHARD), f"{SHARD} cannot be read: No such file or directory; download the missing shard"),
        (_without_index, "lacks shard 2 of 00003; download the missing shard"),
        (_cut(SHARD, 1), "is cut short"),
        (_cut(SHARD, 10**4), "is cut short"),
        (_write(SHARD, "version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        (_write(SHARD, ""), "is no safetensors file"),
        (_remove("config.json"), "config.json cannot be read"),
        (_write("config.json", "{"), "is not JSON"),
        (_write("config.json", "[]"), "holds no JSON object"),
        (_write("model.safetensors.index.json", "{}"), "has no weight_map"),
        (_write("model.safetensors.index.json", '{"weight_map": {"a": "../model.safetensors"}}'), "has no weight_map"),
        (_write("model.safetensors.index.json", f'{{"weight_map": {{"a": "{SHARD}"}}}}'), "lacks tensor 'a'"),
        (_only_a_pickle, "is a PyTorch pickle, which can run any code when it is opened"),
        (_write("config.json", '{"quantization_config": {"quant_method": "gptq"}}'), "are quantized ('gptq')"),
        (_write("config.json", '{"quantization_config": {"quant_method": "awq"}}'), "are quantized ('awq')"),
        (_write("config.json", '{"quantization_config": {"load_in_4bit": true}}'), "are quantized ('None')"),
        (_write("config.json", '{"quantization_config": {"quant_method": "fp8"}}'), "are quantized ('fp8')"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", n_shards=3)
    damage(folder)
    assert said in refusal(folder)


def test_no_folder_and_no_weights(tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    assert "has no model.safetensors" in refusal(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert "is a GGUF already" in refusal(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "entry",
    [
        {**ENTRY, "dtype": "F7"},
        {**ENTRY, "shape": [2, -3]},
        {**ENTRY, "shape": [2, 4]},
        {**ENTRY, "shape": [0, 3], "data_offsets": [0, 0]},
        {**ENTRY, "shape": [1 << 62, 1 << 62]},
        {**ENTRY, "shape": None},
        {**ENTRY, "data_offsets": [8, 32]},
        {**ENTRY, "data_offsets": [24, 0]},
        {**ENTRY, "data_offsets": [0, 24, 48]},
        {"dtype": "F32"},
        7,
    ],
)
def test_hostile_headers(entry: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_raw(tmp_path / "model.safetensors", {"w": entry}, bytes(24))
    refusal(tmp_path)


def test_a_name_twice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    text = b'{"w": {}, "w": {}}'
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "a name appears twice" in refusal(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_found_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a": ("F32", NOISE), "b": ("BF16", bfloat16(NOISE))})
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        with Checkpoint(folder) as checkpoint:
            for tensor in checkpoint.tensors.values():
                assert np.isfinite(checkpoint.floats(tensor)).all()
    except ConvertError as error:
        assert "\n" not in str(error)
