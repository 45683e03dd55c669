"""Parity of every family: a checkpoint of transformers, converted, gives transformers' logits in plain llama.cpp.

With float32 weights both compute the same up to the order of additions, so the tolerance is 1e-4 of the largest logit
(found: 2.5e-5 for Qwen3-Next, at most 5e-6 for the others). llama.cpp multiplies float16 weights by activations rounded
to float16, after which a router may fall to the other of two nearly equal experts: there the tolerance, 3e-3, is for
the median token.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from plain_llama import Logits, greedy, logits, plain_llama
from reference_conversions import TABLE, facts
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import CONFIGS, config_of, gpt_oss_mxfp4, random_model, save_checkpoint, torch_logits

from edgemoe.converters.checkpoint import Checkpoint
from edgemoe.converters.families import FAMILIES, family_of
from edgemoe.converters.hf_to_gguf import convert_checkpoint
from edgemoe.errors import ConvertError
from edgemoe.index import read_index

pytest.importorskip("transformers", reason="the other implementation, for comparison")

PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, 256, 24)]
N_TOKENS = 64


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make the checkpoint of a family once: its folder and its model."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str) -> tuple[Path, Any]:
        if family not in made:
            model = random_model(config_of(family))
            made[family] = save_checkpoint(model, tmp_path_factory.mktemp(family)), model
        return made[family]

    return make


def answers(path: Path, model: Any) -> tuple[Logits, Logits]:
    """Logits of llama.cpp and of transformers along llama.cpp's greedy answer, [1 + N_TOKENS, n_vocab] each."""
    # One thread: two wait for each other at every node, which takes minutes beside a busy neighbour.
    llama = plain_llama(path, n_ctx=256, n_batch=64, n_threads=1, n_threads_batch=1, type_k=0, type_v=0)
    answer = greedy(llama, PROMPT, N_TOKENS)
    ours = logits(llama, PROMPT, answer)
    llama.close()
    return ours, torch_logits(model, PROMPT + answer)[len(PROMPT) - 1 :]


@pytest.mark.parametrize("family", CONFIGS)
def test_parity_in_float32(family: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, model = checkpoints(family)
    convert_checkpoint(folder, tmp_path / "model.gguf", "f32")
    ours, theirs = answers(tmp_path / "model.gguf", model)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    # Each token is the likeliest to both, so both would have answered the same.
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).all()
    with Checkpoint(folder) as checkpoint:
        assert read_index(tmp_path / "model.gguf").n_expert == family_of(checkpoint).n_expert


@pytest.mark.parametrize("family", ["mixtral", "deepseek3", "gpt-oss", "lfm2moe"])
def test_parity_in_float16(family: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, model = checkpoints(family)
    convert_checkpoint(folder, tmp_path / "model.gguf", "f16")
    ours, theirs = answers(tmp_path / "model.gguf", model)
    each = np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max()
    assert np.median(each) < 3e-3
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.95


@pytest.mark.parametrize("family", CONFIGS)
def test_as_the_reference_converter_has_it(family: str, checkpoints: Any, tmp_path: Path) -> None:
    """Same tensors, same types, and no metadata of the reference is missing or different."""
    folder, _ = checkpoints(family)
    convert_checkpoint(folder, tmp_path / "model.gguf", "f16")
    ours, theirs = facts(tmp_path / "model.gguf"), json.loads(TABLE.read_text())[family]
    assert ours["tensors"] == theirs["tensors"]
    # One group of experts is no group, and which layers are recurrent follows from full_attention_interval.
    needless = {"glm4moe.expert_group_count", "glm4moe.expert_group_used_count", "qwen3next.attention.recurrent_layers"}
    assert {key: ours["metadata"].get(key) for key in theirs["metadata"].keys() - needless} == {
        key: value for key, value in theirs["metadata"].items() if key not in needless
    }


def test_mxfp4_stays_as_it_is(tmp_path: Path) -> None:
    """gpt-oss's blocks, laid out anew: worth what the format's own definition says, exactly.

    llama.cpp multiplies them by activations in Q8_0, so its logits are only near (found: 1.1 % for the median token).
    """
    model, worth = gpt_oss_mxfp4(tmp_path / "model")
    convert_checkpoint(tmp_path / "model", tmp_path / "model.gguf", "f32")
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    for name, weights in worth.items():
        assert stored[name].tensor_type == GGMLQuantizationType.MXFP4
        found = dequantize(stored[name].data, stored[name].tensor_type)
        assert np.array_equal(found.reshape(weights.shape), weights), name
    ours, theirs = answers(tmp_path / "model.gguf", model)
    each = np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max()
    assert np.median(each) < 0.05


def test_fused_experts_of_transformers(checkpoints: Any, tmp_path: Path) -> None:
    """Newer releases can save all experts of a layer as one tensor; they arrive the same."""
    folder, model = checkpoints("qwen3moe")
    fused = save_checkpoint(model, tmp_path / folder.name, save_original_format=False)
    with Checkpoint(fused) as checkpoint:
        assert "model.layers.0.mlp.experts.gate_up_proj" in checkpoint.tensors
    for source, name in ((folder, "apart"), (fused, "fused")):
        convert_checkpoint(source, tmp_path / f"{name}.gguf", "f32")
    assert (tmp_path / "apart.gguf").read_bytes() == (tmp_path / "fused.gguf").read_bytes()


def test_llama_4_as_it_is_published(tmp_path: Path) -> None:
    """Inside a model that sees, with an empty list of layers without positions, and factors that leave no middle."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0, "original_max_position_embeddings": 64}
    model = random_model(config_of("llama4", rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 1.0}))
    plain = save_checkpoint(model, tmp_path / "plain")
    published = shutil.copytree(plain, tmp_path / "published")
    said = json.loads((plain / "config.json").read_text()) | {"no_rope_layers": [], "attn_temperature_tuning": 4}
    outer = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": said}
    (published / "config.json").write_text(json.dumps(outer))
    tensors = {f"language_model.{name}": values for name, values in load_file(plain / "model.safetensors").items()}
    tensors["vision_model.patch_embedding.linear.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, published / "model.safetensors")
    (note,) = convert_checkpoint(published, tmp_path / "model.gguf", "f32").notes
    assert note.startswith("1 of the checkpoint's tensors are left out: they see")
    ours, theirs = answers(tmp_path / "model.gguf", model)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_gpt_oss_blends_frequencies_otherwise(checkpoints: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("gpt-oss")[0], tmp_path / "model")
    said = json.loads((folder / "config.json").read_text())
    said["rope_parameters"]["truncate"] = False
    (folder / "config.json").write_text(json.dumps(said))
    (note,) = convert_checkpoint(folder, tmp_path / "model.gguf", "f32").notes
    assert note.startswith("llama.cpp rounds where yarn begins")


def test_deepseek_v2_ranks_groups_otherwise(tmp_path: Path) -> None:
    config = config_of("deepseek2", topk_method="group_limited_greedy", n_group=4, topk_group=2)
    folder = save_checkpoint(random_model(config), tmp_path / "model")
    (note,) = convert_checkpoint(folder, tmp_path / "model.gguf", "f32").notes
    assert note.startswith("llama.cpp ranks groups of experts by their two best experts")


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("mixtral", {"sliding_window": 64}, "has a sliding_window, which llama.cpp does not compute"),
        ("olmoe", {"clip_qkv": 8.0}, "has clip_qkv '8.0'"),
        ("deepseek3", {"scoring_func": "sparsemax"}, "has scoring_func 'sparsemax'"),
        ("deepseek3", {"topk_group": 4}, "routes 16 experts by 4 of 4 groups"),
        ("llama4", {"attn_temperature_tuning": False}, "has no attn_temperature_tuning"),
        ("lfm2moe", {"routed_scaling_factor": 2.0}, "has routed_scaling_factor '2.0'"),
        ("qwen3next", {"linear_value_head_dim": 32}, "has linear_value_head_dim '32'"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "has swiglu_limit '5.0'"),
        ("gpt-oss", {"intermediate_size": 64}, "implies (8, 64, 64)"),
    ],
)
def test_variants_that_llama_cpp_does_not_compute(
    family: str, config: dict[str, Any], said: str, checkpoints: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints(family)[0], tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ConvertError, match=re.escape(said)):
        convert_checkpoint(folder, tmp_path / "model.gguf", "f32")


def test_each_class_has_one_family() -> None:
    classes = [name for family in FAMILIES for name in family.classes]
    assert len(classes) == len(set(classes))
