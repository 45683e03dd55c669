"""Tiny checkpoints of all families with random weights, made and saved by `transformers`, and its answers.

The tokenizer is byte-level: 256 bytes and a few control tokens. `transformers` is needed for tests only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

N_VOCAB = 264
N_CTX = 256

_COMMON: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}

# Family -> (model_type, what its config says beyond _COMMON).
CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3}),
    "qwen2moe": (
        "qwen2_moe",
        {
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3moe": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "moe_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("olmoe", {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek2": (
        "deepseek_v2",
        {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "moe_intermediate_size": 32,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.0,
        },
    ),
    "deepseek3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "moe_intermediate_size": 32,
            "q_lora_rank": 48,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_routed_experts": 16,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 1.5,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "shared_intermediate_size": 48,
            "attention_multiplier": 0.2,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 32,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
    ),
    "glm4moe": (
        "glm4_moe",
        {
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size": 48,
            "intermediate_size_mlp": 96,
            "num_hidden_layers": 5,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
    ),
    "lfm2moe": (
        "lfm2_moe",
        {
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_dense_layers": 1,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
        },
    ),
    "qwen3next": (
        "qwen3_next",
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "shared_expert_intermediate_size": 48,
            "num_experts_per_tok": 3,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
}


def config_of(family: str, **changes: Any) -> Any:
    """A tiny config of a family, as transformers' own class."""
    from transformers import AutoConfig

    model_type, own = CONFIGS[family]
    return AutoConfig.for_model(model_type, **{**_COMMON, **own, **changes})


def random_model(config: Any, seed: int = 0) -> Any:
    """A model whose weights fit float16: matrices keep the size of their input, norms are near 1, biases small."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weights in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(weights.shape)
            if "norm" in name and name.endswith("weight"):
                noise = 1 + 0.1 * noise
            elif weights.ndim < 2 or "bias" in name or "sinks" in name:
                noise = 0.1 * noise
            elif "embed_tokens" in name:
                noise = 1.5 * noise
            else:
                noise = 1.5 * noise / weights.shape[-1] ** 0.5
            if "inv_freq" not in name:
                weights.copy_(noise.half().float())
    return model


def save_checkpoint(model: Any, folder: Path, **options: Any) -> Path:
    """Save weights, config and a byte-level tokenizer."""
    model.save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write the files of a byte-level tokenizer of `N_VOCAB` tokens."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(c) for c in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    control = ["<|begin|>", "<|end|>", "<|pad|>", *(f"<|control{i}|>" for i in range(N_VOCAB - 259))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": 256 + i, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for i, token in enumerate(control)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>",
                "pad_token": "<|pad|>", "add_bos_token": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def torch_logits(model: Any, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits of transformers after each token, [len(tokens), n_vocab]."""
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor([list(tokens)])).logits[0].numpy(), dtype=np.float32)


def gpt_oss_mxfp4(folder: Path) -> tuple[Any, dict[str, npt.NDArray[np.float32]]]:
    """Save a gpt-oss checkpoint with MXFP4 experts.

    Gives the model with what they are worth as its weights, and that by GGUF name, [n_expert, rows, columns].
    """
    import torch
    from safetensors.numpy import load_file, save_file

    kinds = ["sliding_attention", "full_attention"]
    model = random_model(config_of("gpt-oss", num_hidden_layers=2, intermediate_size=64, layer_types=kinds))
    save_checkpoint(model, folder)
    tensors = load_file(folder / "model.safetensors")
    rng, worth = np.random.default_rng(0), {}
    halves = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32) / 2  # E2M1
    values = np.concatenate([halves, -halves])
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_expert, n_columns, n_rows = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (n_expert, n_rows, n_columns // 32, 16)).astype(np.uint8)
        scales = rng.integers(121, 125, (n_expert, n_rows, n_columns // 32)).astype(np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weights = values[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*scales.shape, 32)
        weights = (weights * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(n_expert, n_rows, n_columns)
        with torch.no_grad():
            model.get_parameter(name).copy_(torch.from_numpy(weights.swapaxes(1, 2).copy()))
        block = f"blk.{name.split('.')[2]}"
        if name.endswith("down_proj"):
            worth[f"{block}.ffn_down_exps.weight"] = weights
        else:
            worth |= {f"{block}.ffn_gate_exps.weight": weights[:, ::2], f"{block}.ffn_up_exps.weight": weights[:, 1::2]}
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    return model, worth
