"""Writes safetensors files byte by byte, damaged as wanted, and a small Qwen3-MoE checkpoint of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_checkpoints import N_VOCAB, write_tokenizer

Array = npt.NDArray[Any]

# Rows of 256 fit every type, rows of 32 and 64 do not.
N_LAYER, N_EMBD, N_FF, N_EXPERT, N_HEAD, HEAD_DIM = 2, 256, 32, 4, 2, 32

CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": N_VOCAB,
    "hidden_size": N_EMBD,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": N_HEAD,
    "num_key_value_heads": N_HEAD,
    "head_dim": HEAD_DIM,
    "num_experts": N_EXPERT,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": N_FF,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def bfloat16(values: Array) -> Array:
    """Upper halves of float32, which is what bfloat16 is."""
    return np.asarray(np.asarray(values, np.float32).view(np.uint32) >> 16, np.uint16)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    """Write tensors given as (dtype, data as it is stored)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    write_raw(path, header, b"".join(data.tobytes() for _, data in tensors.values()))


def write_raw(path: Path, header: object, data: bytes) -> None:
    """Write any header before any data."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def qwen3moe_weights(seed: int = 0) -> dict[str, Array]:
    """Weights of the checkpoint that `CONFIG` describes, float32 that bfloat16 holds."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (N_VOCAB, N_EMBD)}
    for il in range(N_LAYER):
        block = f"model.layers.{il}"
        shapes |= {f"{block}.{part}_layernorm.weight": (N_EMBD,) for part in ("input", "post_attention")}
        shapes |= {f"{block}.self_attn.{part}_proj.weight": (N_HEAD * HEAD_DIM, N_EMBD) for part in "qkv"}
        shapes |= {f"{block}.self_attn.{part}_norm.weight": (HEAD_DIM,) for part in "qk"}
        shapes[f"{block}.self_attn.o_proj.weight"] = (N_EMBD, N_HEAD * HEAD_DIM)
        shapes[f"{block}.mlp.gate.weight"] = (N_EXPERT, N_EMBD)
        for expert in range(N_EXPERT):
            shapes |= {f"{block}.mlp.experts.{expert}.{part}_proj.weight": (N_FF, N_EMBD) for part in ("gate", "up")}
            shapes[f"{block}.mlp.experts.{expert}.down_proj.weight"] = (N_EMBD, N_FF)
    shapes |= {"model.norm.weight": (N_EMBD,), "lm_head.weight": (N_VOCAB, N_EMBD)}
    weights = {name: rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1]) for name, shape in shapes.items()}
    return {name: (bfloat16(values).astype(np.uint32) << 16).view(np.float32) for name, values in weights.items()}


def write_checkpoint(
    folder: Path, weights: Mapping[str, Array] | None = None, *, n_shards: int = 1, **config: Any
) -> Path:
    """Write a bfloat16 checkpoint with its tokenizer; a config value of None leaves the key out."""
    weights = qwen3moe_weights() if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    said = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(said))
    write_tokenizer(folder)
    stored = {name: ("BF16", bfloat16(values)) for name, values in weights.items()}
    if n_shards == 1:
        write_safetensors(folder / "model.safetensors", stored)
        return folder
    places = {}
    for number in range(n_shards):
        name = f"model-{number + 1:05}-of-{n_shards:05}.safetensors"
        part = dict(list(stored.items())[number::n_shards])
        write_safetensors(folder / name, part)
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder
