"""Conversions: every weight arrives where it belongs, in the type it should have, or one sentence says why not."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_llama import SHARED_MODELS
from safetensors_bytes import (
    CONFIG,
    N_EXPERT,
    N_LAYER,
    bfloat16,
    qwen3moe_weights,
    write_checkpoint,
    write_safetensors,
)

from edgemoe import Llama
from edgemoe.cli import main
from edgemoe.cli.convert_hf import TYPES
from edgemoe.converters import hf_to_gguf
from edgemoe.converters.checkpoint import Checkpoint
from edgemoe.converters.families import FAMILIES, family_of
from edgemoe.converters.family import Family
from edgemoe.converters.gguf_layout import lay_out
from edgemoe.converters.hf_to_gguf import convert_checkpoint
from edgemoe.converters.quantize import FILE_TYPES, tensor_type
from edgemoe.errors import ConvertError
from edgemoe.evaluation import cut_windows
from edgemoe.index import read_index

Type = GGMLQuantizationType
Floats = npt.NDArray[np.float32]


def read(path: Path) -> dict[str, Floats]:
    """All tensors of a GGUF as float32, by the gguf package's own dequantization."""
    reader = GGUFReader(path)
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in reader.tensors
    }


def types(path: Path) -> dict[str, Type]:
    return {tensor.name: tensor.tensor_type for tensor in GGUFReader(path).tensors}


def refusal(folder: Path, output: Path, type_: str = "f32") -> str:
    """The one sentence; nothing has the output's name afterwards."""
    existed = output.exists()
    with pytest.raises(ConvertError) as caught:
        convert_checkpoint(folder, output, type_)
    assert output.exists() == existed
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


def test_every_weight_arrives(tmp_path: Path) -> None:
    weights = qwen3moe_weights()
    convert_checkpoint(write_checkpoint(tmp_path / "model"), tmp_path / "model.gguf", "f32")
    found = read(tmp_path / "model.gguf")
    assert np.array_equal(found.pop("token_embd.weight"), weights.pop("model.embed_tokens.weight"))
    for il in range(N_LAYER):
        block = f"model.layers.{il}.mlp.experts"
        for part in ("gate", "up", "down"):
            stack = np.stack([weights.pop(f"{block}.{expert}.{part}_proj.weight") for expert in range(N_EXPERT)])
            assert np.array_equal(found.pop(f"blk.{il}.ffn_{part}_exps.weight"), stack)
        # What is left of a layer is one tensor each.
        for ours, theirs in {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "ffn_gate_inp": "mlp.gate",
        }.items():
            assert np.array_equal(
                found.pop(f"blk.{il}.{ours}.weight"), weights.pop(f"model.layers.{il}.{theirs}.weight")
            )
    assert np.array_equal(found.pop("output_norm.weight"), weights.pop("model.norm.weight"))
    assert np.array_equal(found.pop("output.weight"), weights.pop("lm_head.weight"))
    assert not found and not weights


def test_shards_make_the_same_file(tmp_path: Path) -> None:
    for name, n_shards in (("one", 1), ("many", 4)):
        convert_checkpoint(
            write_checkpoint(tmp_path / name / "model", n_shards=n_shards), tmp_path / f"{name}.gguf", "q8_0"
        )
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_types_on_the_command_line() -> None:
    assert tuple(FILE_TYPES) == TYPES


def test_which_type_a_tensor_gets() -> None:
    q4_k, q8_0, q2_k = FILE_TYPES["q4_k"], FILE_TYPES["q8_0"], FILE_TYPES["q2_k"]
    assert tensor_type("blk.0.ffn_up_exps.weight", (8, 64, 256), q4_k) == Type.Q4_K
    assert (
        tensor_type("token_embd.weight", (99, 256), q4_k) == tensor_type("output.weight", (99, 256), q4_k) == Type.Q6_K
    )
    # Rows that do not fit: the next larger type that does, as llama.cpp's quantizer has it.
    assert tensor_type("blk.0.ffn_down_exps.weight", (8, 256, 96), q4_k) == Type.Q5_0
    assert tensor_type("blk.0.ffn_down_exps.weight", (8, 256, 96), q2_k) == Type.Q4_0
    assert tensor_type("token_embd.weight", (99, 96), q4_k) == Type.Q8_0
    assert tensor_type("blk.0.ffn_down_exps.weight", (8, 256, 48), q4_k) == Type.F16
    assert tensor_type("blk.0.ffn_down_exps.weight", (8, 256, 48), q8_0) == Type.F16
    for kept in (
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_gate_inp_shexp.weight",
        "blk.0.attn_q_norm.weight",
        "blk.0.ssm_conv1d.weight",
        "blk.0.shortconv.conv.weight",
        "blk.0.ffn_up_exps.bias",
        "blk.0.ssm_a",
    ):
        assert tensor_type(kept, (8, 256), q4_k) == Type.F32
    assert tensor_type("blk.0.exp_probs_b.bias", (256,), q4_k) == Type.F32


# Root mean square error of each type on normal noise, relative to the noise, with some room.
ERRORS = {
    Type.F32: 0.0,
    Type.F16: 3e-4,
    Type.BF16: 0.0,  # the checkpoint is bfloat16
    Type.Q8_0: 8e-3,
    Type.Q6_K: 0.02,
    Type.Q5_1: 0.04,
    Type.Q5_0: 0.06,
    Type.Q5_K: 0.04,
    Type.Q4_K: 0.08,
    Type.Q4_0: 0.12,
    Type.Q3_K: 0.16,
    Type.Q2_K: 0.35,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hf") / "model")


@pytest.mark.parametrize("type_", FILE_TYPES)
def test_quantized_weights_are_near_the_originals(type_: str, checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "exact.gguf", "f32")
    written = convert_checkpoint(checkpoint, tmp_path / "model.gguf", type_)
    found, exact, kinds = read(tmp_path / "model.gguf"), read(tmp_path / "exact.gguf"), types(tmp_path / "model.gguf")
    for name, kind in kinds.items():
        error = np.sqrt(np.mean((found[name] - exact[name]) ** 2) / np.mean(exact[name] ** 2))
        assert error <= ERRORS[kind], name
    assert FILE_TYPES[type_].matrices in kinds.values()
    assert written.n_bytes == (tmp_path / "model.gguf").stat().st_size
    assert sum(written.types.values()) == written.n_tensors == len(kinds)
    assert read_index(tmp_path / "model.gguf").n_expert == N_EXPERT


def test_fallbacks_are_noted(checkpoint: Path, tmp_path: Path) -> None:
    (note,) = convert_checkpoint(checkpoint, tmp_path / "model.gguf", "q4_k").notes
    assert note == (
        "4 tensors (blk.0.attn_output.weight, ...) are Q5_0: rows of 64 weights do not fit the blocks of Q4_K."
    )


def test_an_existing_file_is_not_replaced_unasked(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    output.write_text("mine")
    assert "exists already; give another output, or --force" in refusal(checkpoint, output)
    assert output.read_text() == "mine"
    convert_checkpoint(checkpoint, output, "q8_0", force=True)
    assert output.read_bytes().startswith(b"GGUF")


def test_an_interrupted_conversion_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, tmp_path / "twice.gguf", "q4_k", on_progress=interrupt)
    assert not (tmp_path / "twice.gguf").exists()
    seen: list[tuple[int, int]] = []
    written = convert_checkpoint(checkpoint, tmp_path / "twice.gguf", "q4_k", on_progress=lambda *at: seen.append(at))
    assert 0 < written.resumed < written.n_tensors
    assert seen[0][0] > seen[0][1] / 3 and seen[-1][0] == seen[-1][1]
    convert_checkpoint(checkpoint, tmp_path / "once.gguf", "q4_k")
    assert (tmp_path / "twice.gguf").read_bytes() == (tmp_path / "once.gguf").read_bytes()


def test_a_full_disk(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = os.pwrite, [10**5]

    def full(fd: int, data: bytes, offset: int) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    message = refusal(checkpoint, tmp_path / "model.gguf")
    assert "No space left on device; make room and run the same command again" in message


Weights = dict[str, Floats]


def _named(name: str, value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name].flat[7] = value

    return change


def _without(name: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        del weights[name]

    return change


def _shaped(name: str, *shape: int) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: np.ones(shape, np.float32)})


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (_named(EXPERT, math.nan), {}, f"tensor '{EXPERT}' of * has a weight that is NaN or infinite"),
        (_named("lm_head.weight", math.inf), {}, "tensor 'lm_head.weight' of * has a weight that is NaN or infinite"),
        (_without(EXPERT), {}, "has no weights for blk.1.ffn_up_exps.weight, expert 3 of 4"),
        (_without("model.norm.weight"), {}, "has no weights for output_norm.weight"),
        (_shaped(EXPERT, 31, 256), {}, f"'{EXPERT}' of * gives shape (31, 256) where * implies (32, 256)"),
        (_shaped("model.layers.0.mlp.extra.weight", 2), {}, "extra.weight' of * is not known of Qwen3-MoE"),
        (_shaped("model.layers.0.self_attn.q_proj.bias", 64), {}, "q_proj.bias' of * has no place in llama.cpp"),
        (_shaped(EXPERT.replace("3", "4"), 32, 256), {}, "is of an expert more than the 4 that * promises"),
        (None, {"num_experts": 5}, "gives shape (4, 256) where * implies (5, 256)"),
        (None, {"hidden_size": 128, "head_dim": 32}, "gives shape (264, 256) where * implies (264, 128)"),
        (None, {"num_hidden_layers": 3}, "has no weights for blk.2.attn_norm.weight"),
        (None, {"vocab_size": 300}, "gives shape (264, 256) where * implies (300, 256)"),
        (None, {"num_attention_heads": None}, "does not say num_attention_heads"),
        (None, {"hidden_size": "large"}, "has hidden_size 'large', expected a whole number from 1 to"),
        (None, {"num_hidden_layers": 10**9}, "expected a whole number from 1 to 512"),
        (None, {"num_experts_per_tok": 9}, "uses 9 of 4 experts, which is impossible"),
        (None, {"norm_topk_prob": False}, "has norm_topk_prob 'False', but llama.cpp computes True only; it cannot"),
        (None, {"mlp_only_layers": [0]}, "has mlp_only_layers '[0]', but llama.cpp"),
        (None, {"rope_scaling": {"rope_type": "longrope"}}, "stretches positions by 'longrope'"),
        (None, {"architectures": ["BertModel"]}, "is no known family; known are Mixtral (MixtralForCausalLM), "),
        (None, {"architectures": None}, "is no known family"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted(
    change: Callable[[Weights], None] | None, config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    weights = qwen3moe_weights()
    if change is not None:
        change(weights)
    message = refusal(write_checkpoint(tmp_path / "model", weights, **config), tmp_path / "model.gguf")
    assert re.search(re.escape(said).replace(r"\*", ".*"), message), message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(max_size=5), items, max_size=3),
    max_leaves=5,
)
ROPE = ["rope_type", "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(FAMILIES),
    changes=st.dictionaries(st.sampled_from(sorted(CONFIG)), JSON, max_size=2),
    rope=st.none()
    | st.dictionaries(st.sampled_from(ROPE), JSON | st.sampled_from(["yarn", "llama3", 2.0, 64, -1, 0, 1e300])),
)
def test_any_config_is_read_or_refused(
    family: type[Family], changes: dict[str, Any], rope: dict[str, Any] | None, checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(checkpoint / name)
    said = {**CONFIG, "architectures": [family.classes[0]], "rope_scaling": rope, **changes}
    (tmp_path / "config.json").write_text(json.dumps(said))
    try:
        with Checkpoint(tmp_path) as opened:
            found = family_of(opened)
            lay_out(found.metadata(), [])
            found.recipes()
    except ConvertError as error:
        assert "\n" not in str(error)


def test_weights_too_large_for_float16(tmp_path: Path) -> None:
    weights = qwen3moe_weights()
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = -70000.0
    folder = write_checkpoint(tmp_path / "model", weights)
    for type_ in ("f16", "q8_0", "q4_k"):
        assert "blk.0.attn_q.weight has weights above 65504" in refusal(folder, tmp_path / "model.gguf", type_)
    convert_checkpoint(folder, tmp_path / "model.gguf", "bf16")


def test_names(tmp_path: Path) -> None:
    """A snapshot in a hub's cache has a hash for a name."""
    for folder, name in (("my-model", "my-model"), ("models--Qwen--Qwen3-30B-A3B/snapshots/0ac2e", "Qwen3-30B-A3B")):
        convert_checkpoint(write_checkpoint(tmp_path / folder), tmp_path / "model.gguf", "q8_0", force=True)
        assert read_index(tmp_path / "model.gguf").name == name


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    weights = qwen3moe_weights()
    for part in ("eh_proj", "enorm"):
        weights[f"model.layers.{N_LAYER}.{part}.weight"] = np.ones(4, np.float32)
    written = convert_checkpoint(write_checkpoint(tmp_path / "model", weights), tmp_path / "model.gguf", "f32")
    assert written.notes == (
        "2 of the checkpoint's tensors are left out: they see, or predict further tokens than the next.",
    )


def test_on_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    arguments = ["convert", "hf", str(checkpoint), "-o", str(output), "--type"]
    done = CliRunner().invoke(main, [*arguments, "q4_k"])
    assert done.exit_code == 0 and done.stdout == ""
    first, second = done.stderr.splitlines()
    assert re.fullmatch(rf"{output}: Qwen3-MoE \(qwen3moe\), .* KiB, tensors 2 Q6_K, 11 F32, 10 Q4_K, 4 Q5_0\.", first)
    assert second.startswith("4 tensors (blk.0.attn_output.weight, ...) are Q5_0")
    done = CliRunner().invoke(main, [*arguments, "q8_0"], prog_name="edgemoe")
    assert done.exit_code == 1
    assert done.stderr == f"edgemoe: {output} exists already; give another output, or --force to replace it\n"
    assert "'q4_0' is not one of" in CliRunner().invoke(main, [*arguments, "q4_0"]).stderr


def test_threads_hold_a_bounded_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are begun only while what is begun and not yet taken fits; one always is, however large."""
    monkeypatch.setattr(hf_to_gguf, "_BYTES_IN_FLIGHT", 100)
    for n_bytes, most in ((40, 2), (100, 1), (1000, 1)):
        taken = []

        def jobs(n_bytes: int = n_bytes, most: int = most, taken: list[int] = taken) -> Iterator[Any]:
            for number in range(20):
                assert number - len(taken) <= most
                yield n_bytes, lambda number=number: np.array([number])

        with hf_to_gguf._Threads() as threads:
            for result in threads.ordered(jobs()):
                taken.append(int(result[0]))
        assert taken == list(range(20))


def test_no_such_type(checkpoint: Path, tmp_path: Path) -> None:
    assert "there is no type 'q4_0'; give one of f32, f16, bf16" in refusal(checkpoint, tmp_path / "m.gguf", "q4_0")


def test_block_scaled_float8(tmp_path: Path) -> None:
    """DeepSeek-V3's way: half of the codes, twice the scale, the same weights."""
    weights, stored = qwen3moe_weights(), {}
    scales = np.random.default_rng(1).uniform(0.5, 2, 1000).astype(np.float32)
    for name, values in weights.items():
        if "experts" not in name:
            stored[name] = ("BF16", bfloat16(values))
            continue
        blocks = -(-values.shape[0] // 16), -(-values.shape[1] // 16)
        each = scales[: blocks[0] * blocks[1]].reshape(blocks)
        codes = np.full(values.shape, 0x38, np.uint8)  # 1.0
        codes[::2] = 0xC0  # -2.0
        weights[name] = np.where(codes == 0x38, 1, -2) * each.repeat(16, 0).repeat(16, 1)
        stored |= {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", each)}
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    folder = write_checkpoint(tmp_path / "model", {}, quantization_config=quantization)
    write_safetensors(folder / "model.safetensors", stored)
    convert_checkpoint(folder, tmp_path / "model.gguf", "f32")
    found = read(tmp_path / "model.gguf")["blk.1.ffn_down_exps.weight"]
    expected = np.stack(
        [weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] for expert in range(N_EXPERT)]
    )
    assert np.array_equal(found, expected.astype(np.float32))


HELD_OUT = SHARED_MODELS / "README.md"


@pytest.mark.skipif(not HELD_OUT.exists(), reason="the trained checkpoint is not there")
@pytest.mark.parametrize(("type_", "tolerance"), [("f16", 0.003), ("q8_0", 0.005), ("q4_k", 0.01)])
def test_perplexity_of_a_trained_model(type_: str, tolerance: float, tmp_path: Path) -> None:
    """As measured by the model's own training code, one domain for each type (all of them: LOG.md)."""
    convert_checkpoint(SHARED_MODELS / "hf", tmp_path / "model.gguf", type_)
    domain = {"f16": "french", "q8_0": "config", "q4_k": "chat"}[type_]
    row = re.search(rf"^\| {domain} \| 4096 \| [\d.]+ \| ([\d.]+) \|", HELD_OUT.read_text(), re.MULTILINE)
    assert row is not None
    with Llama(tmp_path / "model.gguf", ram="4GiB", n_ctx=512, logits_all=True, verbose=False) as llama:
        tokens: list[int] = []
        for line in (SHARED_MODELS / "eval" / f"{domain}.jsonl").read_text().splitlines():
            tokens += [*llama.tokenize(json.loads(line)["text"].encode(), add_bos=False, special=True), 0]
        nll = 0.0
        for window in cut_windows(tokens, 8, 512):
            llama.reset()
            llama.eval(list(window[:-1]))
            logits = llama.scores[:512].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(512), list(window[1:])]
            nll += float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())
    assert math.exp(nll / 4096) == pytest.approx(float(row[1]), rel=tolerance)
