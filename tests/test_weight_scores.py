"""AIMER equals a plain computation over the weights that the gguf package reads."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import EXPERT_TYPES, WIDE, write_tiny_model

from edgemoe.errors import ModelFileError
from edgemoe.index import ExpertIndex, read_index
from edgemoe.weight_scores import aimer


def plain(index: ExpertIndex) -> np.ndarray:
    """1 - mean(abs(w)) / rms(w), all tensors in memory."""
    weights: dict[tuple[int, int], list[np.ndarray]] = {}
    for path in index.files:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for expert_tensor in index.experts:
            if tensor := tensors.get(expert_tensor.name):
                for expert, values in enumerate(gguf.dequantize(tensor.data, tensor.tensor_type)):
                    weights.setdefault((expert_tensor.layer, expert), []).append(values.astype(np.float64).ravel())
    scores = [
        [
            1 - np.abs(w := np.concatenate(weights[layer, expert])).mean() / np.sqrt((w**2).mean())
            for expert in range(index.n_expert)
        ]
        for layer in index.moe_layers
    ]
    return np.array(scores)


@pytest.mark.parametrize("expert_type", ["f32", "f16", "bf16", "q4_0", "q8_0", "q4_k", "q6_k", "iq4_xs", "mxfp4"])
def test_equals_a_plain_computation(tmp_path: Path, expert_type: str) -> None:
    write_tiny_model(tmp_path / "m.gguf", "qwen3moe", expert_type=expert_type, **WIDE)
    index = read_index(tmp_path / "m.gguf")
    scores = aimer(index)
    assert scores.shape == (len(index.moe_layers), index.n_expert) and scores.dtype == np.float64
    np.testing.assert_allclose(scores, plain(index), rtol=1e-5)
    assert np.ptp(scores, axis=1).min() > 0


@pytest.mark.parametrize("name", ["deepseek2", "llama4", "nemotron_h_moe"])
def test_dense_layers_joined_tensors_and_split_files(tmp_path: Path, name: str) -> None:
    first, *_ = write_tiny_model(tmp_path / "m.gguf", name, split=7)
    index = read_index(first)
    assert len(index.files) > 1
    np.testing.assert_allclose(aimer(index), plain(index), rtol=1e-5)


def rewritten(tmp_path: Path, expert: int, values: np.ndarray) -> ExpertIndex:
    """A float32 model whose first tensors hold the given weights in one expert."""
    path = tmp_path / "m.gguf"
    write_tiny_model(path, "qwen3moe", expert_type="f32")
    index = read_index(path)
    with path.open("r+b") as file:
        for tensor in index.experts:
            if tensor.layer == index.moe_layers[0]:
                file.seek(tensor.offset + expert * tensor.slab_bytes)
                file.write(np.resize(values, tensor.slab_bytes // 4).astype(np.float32).tobytes())
    return index


def test_the_most_concentrated_expert_is_kept_first_the_flattest_last(tmp_path: Path) -> None:
    # One weight of every eight is 1, others 0: mean 1/8, rms sqrt(1/8), so AIMER is sqrt(1/8) = 0.354.
    scores = aimer(rewritten(tmp_path, 1, np.array([0, 0, 0, 1, 0, 0, 0, 0])))
    assert scores[0].argmax() == 1 and scores[0, 1] == pytest.approx(1 - 8**-0.5, abs=1e-6)
    scores = aimer(rewritten(tmp_path, 1, np.array([0.5, -0.5])))
    assert scores[0].argmin() == 1 and scores[0, 1] == 0
    scores = aimer(rewritten(tmp_path, 2, np.zeros(1)))
    assert scores[0].argmin() == 2 and scores[0, 2] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_broken_weights(tmp_path: Path, value: float) -> None:
    with pytest.raises(ModelFileError, match=r"in expert 2 of blk\.\d\.ffn_.*download"):
        aimer(rewritten(tmp_path, 2, np.array([0.1, value])))


@pytest.mark.parametrize("expert_type", ["q2_0"])
def test_a_type_that_cannot_be_unpacked(tmp_path: Path, expert_type: str) -> None:
    assert EXPERT_TYPES[expert_type] not in set(gguf.GGMLQuantizationType)
    write_tiny_model(tmp_path / "m.gguf", "qwen3moe", expert_type=expert_type, **WIDE)
    with pytest.raises(ModelFileError, match="as Q2_0, which the gguf package cannot unpack"):
        aimer(read_index(tmp_path / "m.gguf"))


def test_a_file_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_tiny_model(path, "qwen3moe")
    index = read_index(path)
    with path.open("r+b") as file:
        file.truncate(max(tensor.offset for tensor in index.experts) + 10)
    with pytest.raises(ModelFileError, match="became shorter"):
        aimer(index)
    path.unlink()
    with pytest.raises(ModelFileError, match="cannot be read"):
        aimer(index)
