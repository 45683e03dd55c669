"""The tensors and hyperparameters of tiny MoE models, one entry per architecture of llama.cpp.

Names are those of llama.cpp (`llama-arch.cpp`). Shapes are in ggml order (`ne[0]` first) and written with
the names of dimensions, so that `embd` or `ff_exp` can be changed for all tensors of a model at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Axis = str  # an int, a dimension's name, or sums of products of these: "2*embd", "lora_kv+rot"
Tensors = dict[str, tuple[Axis, ...]]
Key = (
    bool | int | float | str | list[int] | list[float] | list[bool] | None
)  # a str is an Axis, None drops the key

DIMENSIONS: Mapping[str, Axis] = {
    "context": "512", "vocab": "288", "embd": "64", "head": "4", "head_kv": "2", "head_dim": "16", "rot": "head_dim",
    "q": "head*head_dim", "kv": "head_kv*head_dim", "key_length": "head_dim", "value_length": "head_dim",
    "ff": "96", "ff_exp": "32", "ff_shexp": "ff_exp", "expert": "16", "used": "4",
}  # fmt: skip

KEYS: Mapping[str, Key] = {
    "context_length": "context",
    "embedding_length": "embd",
    "feed_forward_length": "ff",
    "attention.head_count": "head",
    "attention.head_count_kv": "head_kv",
    "attention.key_length": "key_length",
    "attention.value_length": "value_length",
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": "rot",
    "expert_count": "expert",
    "expert_used_count": "used",
    "expert_feed_forward_length": "ff_exp",
}


def _tensors(table: str) -> Tensors:
    rows = (line.split() for line in table.strip().splitlines())
    return {name: tuple(axes) for name, *axes in rows}


OUTPUT = _tensors("""
    token_embd.weight   embd vocab
    output_norm.weight  embd
    output.weight       embd vocab
""")
TIED_OUTPUT = {name: axes for name, axes in OUTPUT.items() if name != "output.weight"}


@dataclass(frozen=True, slots=True)
class TinyArchitecture:
    """What `write_tiny_model` needs to know of one architecture.

    `layers` holds the tensors of each block without their `blk.<i>.` prefix, `keys` and `dimensions` are
    changes to `KEYS` and `DIMENSIONS`, `expert_type` is the type of the experts unless the caller asks for another.
    """

    layers: list[Tensors]
    keys: Mapping[str, Key] = field(default_factory=dict)
    dimensions: Mapping[str, Axis] = field(default_factory=dict)
    output: Tensors = field(default_factory=lambda: OUTPUT)
    expert_type: str = "f32"


# Attention

ATTN_NORM = _tensors("attn_norm.weight embd")
FFN_NORM = _tensors("ffn_norm.weight embd")
NORMS = ATTN_NORM | FFN_NORM
POST_NORM = _tensors("post_attention_norm.weight embd")
WO = _tensors("attn_output.weight q embd")
QKV = WO | _tensors("""
    attn_q.weight  embd q
    attn_k.weight  embd kv
    attn_v.weight  embd kv
""")
QKV_BIAS = _tensors("""
    attn_q.bias  q
    attn_k.bias  kv
    attn_v.bias  kv
""")
WO_BIAS = _tensors("attn_output.bias embd")
FUSED_QKV = WO | _tensors("attn_qkv.weight embd q+2*kv")
HEAD_NORMS = _tensors("""
    attn_q_norm.weight  head_dim
    attn_k_norm.weight  head_dim
""")
WIDE_HEAD_NORMS = _tensors("""
    attn_q_norm.weight  q
    attn_k_norm.weight  kv
""")
SINKS = _tensors("attn_sinks.weight head")
MLA = _tensors("""
    attn_q_a.weight       embd lora_q
    attn_q_a_norm.weight  lora_q
    attn_q_b.weight       lora_q head*key_mla
    attn_kv_a_mqa.weight  embd lora_kv+rot
    attn_kv_a_norm.weight lora_kv
    attn_k_b.weight       nope lora_kv head
    attn_v_b.weight       lora_kv value_mla head
    attn_output.weight    head*value_mla embd
""")
MLA_DIMENSIONS = {
    "lora_q": "32", "lora_kv": "32", "rot": "16", "nope": "16", "key_mla": "nope+rot", "value_mla": "16",
    "head_kv": "1", "key_length": "lora_kv+rot", "value_length": "lora_kv",
}  # fmt: skip
MLA_KEYS: Mapping[str, Key] = {
    "attention.q_lora_rank": "lora_q",
    "attention.kv_lora_rank": "lora_kv",
    "attention.key_length_mla": "key_mla",
    "attention.value_length_mla": "value_mla",
}

# Feed-forward

DENSE = _tensors("""
    ffn_gate.weight  embd ff
    ffn_up.weight    embd ff
    ffn_down.weight  ff embd
""")
ROUTER = _tensors("ffn_gate_inp.weight embd expert")
EXPERTS = ROUTER | _tensors("""
    ffn_gate_exps.weight  embd ff_exp expert
    ffn_up_exps.weight    embd ff_exp expert
    ffn_down_exps.weight  ff_exp embd expert
""")
MERGED_EXPERTS = ROUTER | _tensors("""
    ffn_gate_up_exps.weight  embd 2*ff_exp expert
    ffn_down_exps.weight     ff_exp embd expert
""")
EXPERT_BIAS = _tensors("""
    ffn_gate_inp.bias   expert
    ffn_gate_exps.bias  ff_exp expert
    ffn_up_exps.bias    ff_exp expert
    ffn_down_exps.bias  embd expert
""")
SELECTION_BIAS = _tensors("exp_probs_b.bias expert")
SHARED = _tensors("""
    ffn_gate_shexp.weight  embd ff_shexp
    ffn_up_shexp.weight    embd ff_shexp
    ffn_down_shexp.weight  ff_shexp embd
""")
SHARED_GATE = _tensors("ffn_gate_inp_shexp.weight embd")
NEXTN = _tensors("""
    nextn.eh_proj.weight           2*embd embd
    nextn.enorm.weight             embd
    nextn.hnorm.weight             embd
    nextn.shared_head_norm.weight  embd
""")

# llama.cpp's llama_expert_gating_func_type
SOFTMAX, SIGMOID = 1, 2

# Some architectures give the experts the width of feed_forward_length.
FF_IS_EXPERT: Mapping[str, Axis] = {"ff": "ff_exp"}
NO_EXPERT_FF: Mapping[str, Key] = {"expert_feed_forward_length": None}

TINY_ARCHITECTURES: dict[str, TinyArchitecture] = {
    "qwen3moe": TinyArchitecture(3 * [NORMS | QKV | HEAD_NORMS | EXPERTS]),
    "llama": TinyArchitecture(
        3 * [NORMS | QKV | EXPERTS], NO_EXPERT_FF, {**FF_IS_EXPERT, "expert": "8", "used": "2"}
    ),
    "deepseek2": TinyArchitecture(
        1 * [NORMS | MLA | DENSE] + 2 * [NORMS | MLA | EXPERTS | SELECTION_BIAS | SHARED],
        {
            **MLA_KEYS,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_gating_func": SIGMOID,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
        },
        MLA_DIMENSIONS,
    ),
    "gpt-oss": TinyArchitecture(
        3 * [ATTN_NORM | POST_NORM | QKV | QKV_BIAS | WO_BIAS | SINKS | EXPERTS | EXPERT_BIAS],
        {"attention.sliding_window": 32},
        expert_type="mxfp4",
    ),
    "olmoe": TinyArchitecture(
        3 * [NORMS | QKV | WIDE_HEAD_NORMS | EXPERTS], NO_EXPERT_FF, {**FF_IS_EXPERT, "head_kv": "head"}
    ),
    "qwen2moe": TinyArchitecture(
        3 * [NORMS | QKV | QKV_BIAS | EXPERTS | SHARED | SHARED_GATE],
        {"expert_shared_feed_forward_length": "ff_shexp"},
        {"ff_shexp": "64"},
    ),
    "deepseek": TinyArchitecture(
        1 * [NORMS | QKV | DENSE] + 2 * [NORMS | QKV | EXPERTS | SHARED],
        {"leading_dense_block_count": 1, "expert_shared_count": 2, "expert_weights_scale": 1.0},
        {"ff_shexp": "2*ff_exp"},
    ),
    "llama4": TinyArchitecture(
        2 * [NORMS | QKV | DENSE, NORMS | QKV | EXPERTS | SHARED],
        {"interleave_moe_layer_step": 2},
        {"used": "1"},
    ),
    "granitemoe": TinyArchitecture(
        3 * [NORMS | QKV | EXPERTS | SHARED],
        {
            **NO_EXPERT_FF,
            "expert_shared_feed_forward_length": "ff_shexp",
            "embedding_scale": 12.0,
            "residual_scale": 0.22,
            "attention.scale": 0.25,
            "logit_scale": 0.5,
        },
        FF_IS_EXPERT,
        TIED_OUTPUT,
    ),
}
