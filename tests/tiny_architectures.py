"""One tiny model per MoE architecture of llama.cpp: the parts of its layers and its hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tiny_blocks import OUTPUT, TIED_OUTPUT, Axis, Tensors, tensors

# A str is an Axis, also within a list; None drops the key.
Key = bool | int | float | str | list[bool] | list[float] | list[str] | None
Keys = Mapping[str, Key]
Dimensions = Mapping[str, Axis]

DIMENSIONS: Dimensions = {
    "context": "512", "vocab": "288", "embd": "64", "head": "4", "head_kv": "2", "head_dim": "16",
    "q": "head*head_dim", "kv": "head_kv*head_dim", "key_length": "head_dim", "value_length": "head_dim",
    "rot": "head_dim",
    "ff": "96", "ff_exp": "32", "ff_shexp": "ff_exp", "expert": "16", "used": "4"
}  # fmt: skip

KEYS: Keys = {
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


@dataclass(frozen=True, slots=True)
class TinyArchitecture:
    """What `write_tiny_model` needs to know of one architecture.

    `layers` names the parts of each layer (see `tiny_blocks`), `keys` and `dimensions` change `KEYS` and
    `DIMENSIONS`, `output` holds the tensors outside the layers, `expert_type` is the experts' usual type.
    """

    layers: list[str]
    keys: Keys = field(default_factory=dict)
    dimensions: Dimensions = field(default_factory=dict)
    output: Tensors = field(default_factory=lambda: OUTPUT)
    expert_type: str = "f32"


NORMED = "attn-norm ffn-norm"
QK_NORMED = f"{NORMED} qkv norm-per-head"
BIASED_AND_SHARED = "experts selection-bias shared"

# llama.cpp's llama_expert_gating_func_type
SIGMOID, SQRT_SOFTPLUS = 2, 4

# Some architectures give the experts the width of feed_forward_length.
FF_IS_EXPERT: Dimensions = {"ff": "ff_exp"}
NO_EXPERT_FF: Keys = {"expert_feed_forward_length": None}

SHARED_FF: Keys = {"expert_shared_feed_forward_length": "ff_shexp"}
FIRST_IS_DENSE: Keys = {"leading_dense_block_count": 1}
NORMALIZED_SIGMOID: Keys = {
    "expert_gating_func": SIGMOID,
    "expert_weights_norm": True,
    "expert_weights_scale": 2.5,
}
GROUPS: Keys = {"expert_group_count": 4, "expert_group_used_count": 2}
GRANITE_SCALES: Keys = {
    "embedding_scale": 2.0,
    "residual_scale": 0.5,
    "attention.scale": 0.25,
    "logit_scale": 0.5,
}
LAYER_NORM: Keys = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5}
WINDOW: Keys = {"attention.sliding_window": 8}
TWO_OF_THREE_WINDOWED: Keys = {**WINDOW, "attention.sliding_window_pattern": [True, True, False]}
SECOND_IS_ATTENTION: Keys = {"attention.head_count_kv": ["0", "head_kv", "0"]}

MLA_DIMENSIONS: Dimensions = {
    "lora_q": "32", "lora_kv": "32", "rot": "16", "nope": "16", "key_mla": "nope+rot", "value_mla": "16",
    "head_kv": "1", "key_length": "lora_kv+rot", "value_length": "lora_kv"
}  # fmt: skip
MLA_KEYS: Keys = {
    "attention.kv_lora_rank": "lora_kv",
    "attention.key_length_mla": "key_mla",
    "attention.value_length_mla": "value_mla",
}
LORA_Q: Keys = {"attention.q_lora_rank": "lora_q"}
DEEPSEEK_KEYS: Keys = {**MLA_KEYS, **LORA_Q, **FIRST_IS_DENSE, **NORMALIZED_SIGMOID, "expert_shared_count": 1}
INDEXER_DIMENSIONS: Dimensions = {"head_index": "4", "index": "64"}
INDEXER_KEYS: Keys = {
    "attention.indexer.head_count": "head_index",
    "attention.indexer.key_length": "index",
    "attention.indexer.top_k": 16,
}
GROUPED_MLA_DIMENSIONS: Dimensions = {
    "lora_q": "32", "lora_out": "16", "group_out": "2", "q_group": "2*head_dim",
    "head_kv": "1", "rot": "8", "hyper": "4", "hyper_mix": "2*hyper+hyper*hyper"
}  # fmt: skip

SSM_DIMENSIONS: Dimensions = {
    "inner": "2*embd", "state": "16", "group": "1", "group_width": "inner", "dt": "8", "conv": "4"
}  # fmt: skip
SSM_KEYS: Keys = {
    "ssm.conv_kernel": "conv",
    "ssm.inner_size": "inner",
    "ssm.state_size": "state",
    "ssm.time_step_rank": "dt",
    "ssm.group_count": "group",
}
DELTA_NET_DIMENSIONS: Dimensions = {
    **SSM_DIMENSIONS,
    "group": "2",
    "dt": "4",
    "inner": "dt*state",
    "rot": "8",
}
EVERY_SECOND_IS_ATTENTION: Keys = {"full_attention_interval": 2}

TINY_ARCHITECTURES: dict[str, TinyArchitecture] = {
    "afmoe": TinyArchitecture(
        1 * [f"{QK_NORMED} gate-per-element post-attn-norm post-ffn-norm dense"]
        + 3 * [f"{QK_NORMED} gate-per-element post-attn-norm post-ffn-norm {BIASED_AND_SHARED}"],
        {**FIRST_IS_DENSE, **NORMALIZED_SIGMOID, **WINDOW, "expert_shared_count": 1},
    ),
    "arctic": TinyArchitecture(
        3 * [f"{NORMED} qkv dense norm-of-experts experts"], NO_EXPERT_FF, {"ff": "embd", "ff_exp": "embd"}
    ),
    "bailingmoe": TinyArchitecture(
        3 * [f"{NORMED} qkv experts shared"],
        {"expert_shared_count": 2, "expert_weights_norm": True, "expert_weights_scale": 1.0},
        {"ff_shexp": "2*ff_exp"},
    ),
    "bailingmoe2": TinyArchitecture(
        1 * [f"{NORMED} fused-qkv norm-per-head dense"] + 2 * [f"{NORMED} fused-qkv norm-per-head {BIASED_AND_SHARED}"],
        {**FIRST_IS_DENSE, **NORMALIZED_SIGMOID, **GROUPS, **SHARED_FF, "expert_shared_count": 1},
    ),
    "cohere2moe": TinyArchitecture(
        1 * ["attn-norm qkv dense"] + 3 * ["attn-norm qkv merged-experts shared"],
        {
            **FIRST_IS_DENSE,
            **LAYER_NORM,
            **SHARED_FF,
            **WINDOW,
            "expert_gating_func": SIGMOID,
            "expert_shared_count": 1,
            "logit_scale": 0.5,
        },
        output=TIED_OUTPUT,
    ),
    "dbrx": TinyArchitecture(
        3 * ["attn-norm fused-qkv attn-out-norm experts"],
        {**NO_EXPERT_FF, **LAYER_NORM, "attention.clamp_kqv": 8.0},
        FF_IS_EXPERT,
    ),
    "deepseek": TinyArchitecture(
        1 * [f"{NORMED} qkv dense"] + 2 * [f"{NORMED} qkv experts shared"],
        {**FIRST_IS_DENSE, "expert_shared_count": 2, "expert_weights_scale": 1.0},
        {"ff_shexp": "2*ff_exp"},
    ),
    "deepseek2": TinyArchitecture(
        1 * [f"{NORMED} mla-query mla dense"] + 2 * [f"{NORMED} mla-query mla {BIASED_AND_SHARED}"],
        {**DEEPSEEK_KEYS, **GROUPS},
        MLA_DIMENSIONS,
    ),
    "deepseek32": TinyArchitecture(
        1 * [f"{NORMED} mla-query mla indexer dense"] + 2 * [f"{NORMED} mla-query mla indexer {BIASED_AND_SHARED}"],
        {**DEEPSEEK_KEYS, **INDEXER_KEYS},
        {**MLA_DIMENSIONS, **INDEXER_DIMENSIONS},
    ),
    "deepseek4": TinyArchitecture(
        [
            f"{NORMED} grouped-mla sinks hyper-connections experts selection-by-token shared",
            f"{NORMED} grouped-mla sinks hyper-connections {BIASED_AND_SHARED}",
            f"{NORMED} grouped-mla compressed-by-4 sinks hyper-connections {BIASED_AND_SHARED}",
            f"{NORMED} grouped-mla compressed-by-128 sinks hyper-connections {BIASED_AND_SHARED}",
        ],
        {
            **NORMALIZED_SIGMOID,
            **INDEXER_KEYS,
            **LORA_Q,
            **WINDOW,
            "expert_gating_func": SQRT_SOFTPLUS,
            "expert_shared_count": 1,
            "hash_layer_count": 1,
            "swiglu_clamp_exp": [10.0, 10.0, 10.0, 10.0],
            "attention.output_group_count": "group_out",
            "attention.output_lora_rank": "lora_out",
            "attention.compress_ratios": ["0", "0", "4", "128"],
            "attention.compress_rope_freq_base": 160000.0,
            "hyper_connection.count": "hyper",
            "hyper_connection.sinkhorn_iterations": 2,
            "hyper_connection.epsilon": 1e-6,
        },
        {**INDEXER_DIMENSIONS, **GROUPED_MLA_DIMENSIONS},
        OUTPUT
        | tensors("""
            output_hc_fn.weight     hyper*embd hyper
            output_hc_base.weight   hyper
            output_hc_scale.weight  1
        """),
    ),
    "dots1": TinyArchitecture(
        1 * [f"{QK_NORMED} dense"] + 2 * [f"{QK_NORMED} {BIASED_AND_SHARED}"],
        {**FIRST_IS_DENSE, **NORMALIZED_SIGMOID, "expert_shared_count": 2},
        {"head_kv": "head", "ff_shexp": "2*ff_exp"},
    ),
    "ernie4_5-moe": TinyArchitecture(
        1 * [f"{NORMED} qkv dense"] + 2 * [f"{NORMED} qkv {BIASED_AND_SHARED}"],
        {**FIRST_IS_DENSE, **SHARED_FF, "interleave_moe_layer_step": 1},
    ),
    "exaone-moe": TinyArchitecture(
        1 * [f"{QK_NORMED} dense"] + 3 * [f"{QK_NORMED} {BIASED_AND_SHARED}"],
        {**FIRST_IS_DENSE, **NORMALIZED_SIGMOID, **SHARED_FF, **WINDOW, "expert_shared_count": 1},
    ),
    "gemma4": TinyArchitecture(
        3 * [f"{QK_NORMED} post-attn-norm post-ffn-norm dense merged-experts norms-of-both-paths"],
        {
            **TWO_OF_THREE_WINDOWED,
            "attention.key_length_swa": "head_dim",
            "attention.value_length_swa": "head_dim",
            "rope.dimension_count_swa": "rot",
            "rope.freq_base_swa": 10000.0,
            "embedding_length_per_layer_input": 0,
            "final_logit_softcapping": 30.0,
        },
        {"half_rot": "8", "rot": "2*half_rot"},
        OUTPUT | tensors("rope_freqs.weight half_rot"),
    ),
    "glm-dsa": TinyArchitecture(
        1 * [f"{NORMED} mla-query mla indexer dense"] + 2 * [f"{NORMED} mla-query mla indexer {BIASED_AND_SHARED}"],
        {**DEEPSEEK_KEYS, **INDEXER_KEYS},
        {**MLA_DIMENSIONS, **INDEXER_DIMENSIONS},
    ),
    "glm4moe": TinyArchitecture(
        1 * ["attn-norm post-attn-norm qkv qkv-bias norm-per-head dense"]
        + 2 * [f"attn-norm post-attn-norm qkv qkv-bias norm-per-head {BIASED_AND_SHARED}"]
        + 1 * [f"attn-norm post-attn-norm qkv qkv-bias norm-per-head {BIASED_AND_SHARED} nextn"],
        {**FIRST_IS_DENSE, **NORMALIZED_SIGMOID, "expert_shared_count": 1, "nextn_predict_layers": 1},
        {"rot": "8"},
    ),
    "gpt-oss": TinyArchitecture(
        3 * ["attn-norm post-attn-norm qkv qkv-bias attn-out-bias sinks experts expert-biases"],
        WINDOW,
        expert_type="mxfp4",
    ),
    "granite_swa": TinyArchitecture(
        3 * [f"{NORMED} qkv sinks merged-experts merged-shared"],
        {**NO_EXPERT_FF, **SHARED_FF, **GRANITE_SCALES, **TWO_OF_THREE_WINDOWED},
        FF_IS_EXPERT,
    ),
    "granitehybrid": TinyArchitecture(
        [
            f"{NORMED} mamba2 experts shared",
            f"{NORMED} qkv experts shared",
            f"{NORMED} mamba2 experts shared",
        ],
        {**NO_EXPERT_FF, **SHARED_FF, **GRANITE_SCALES, **SSM_KEYS, **SECOND_IS_ATTENTION},
        {**FF_IS_EXPERT, **SSM_DIMENSIONS},
    ),
    "granitemoe": TinyArchitecture(
        3 * [f"{NORMED} qkv experts shared"], {**NO_EXPERT_FF, **SHARED_FF, **GRANITE_SCALES}, FF_IS_EXPERT
    ),
    "grok": TinyArchitecture(
        3 * [f"{NORMED} qkv attn-out-norm post-ffn-norm dense experts"],
        {"embedding_scale": 2.0, "logit_scale": 1.0},
        {"expert": "8", "used": "2"},
    ),
    "grovemoe": TinyArchitecture(
        3 * [f"{QK_NORMED} experts chunk-experts"],
        {"expert_chunk_feed_forward_length": "ff_chunk", "expert_group_scale": 0.05, "experts_per_group": 2},
        {"ff_chunk": "16", "chunk": "8", "expert": "2*chunk"},
    ),
    "hunyuan-moe": TinyArchitecture(3 * [f"{QK_NORMED} experts shared"], SHARED_FF, FF_IS_EXPERT, TIED_OUTPUT),
    "hy_v3": TinyArchitecture(
        1 * [f"{QK_NORMED} dense"] + 2 * [f"{QK_NORMED} experts shared selection-bias-without-suffix"],
        {**NORMALIZED_SIGMOID, **SHARED_FF},
    ),
    "jamba": TinyArchitecture(
        [
            f"{NORMED} mamba1 dense",
            f"{NORMED} qkv experts",
            f"{NORMED} mamba1 dense",
            f"{NORMED} mamba1 experts",
        ],
        {**NO_EXPERT_FF, **SSM_KEYS, "attention.head_count_kv": ["0", "head_kv", "0", "0"]},
        {**FF_IS_EXPERT, **SSM_DIMENSIONS, "used": "2"},
    ),
    "kimi-linear": TinyArchitecture(
        [
            f"{NORMED} kimi-delta dense",
            f"{NORMED} mla-plain-query mla {BIASED_AND_SHARED}",
            f"{NORMED} kimi-delta {BIASED_AND_SHARED}",
        ],
        {
            **MLA_KEYS,
            **FIRST_IS_DENSE,
            **NORMALIZED_SIGMOID,
            **SECOND_IS_ATTENTION,
            "expert_shared_count": 1,
            "ssm.conv_kernel": "conv",
            "kda.head_dim": "head_dim",
        },
        {**MLA_DIMENSIONS, "conv": "4"},
    ),
    "laguna": TinyArchitecture(
        1 * [f"{QK_NORMED} gate-per-head dense"] + 3 * [f"{QK_NORMED} gate-per-head {BIASED_AND_SHARED}"],
        {**FIRST_IS_DENSE, **NORMALIZED_SIGMOID, **SHARED_FF, **WINDOW},
    ),
    "lfm2moe": TinyArchitecture(
        [
            f"{NORMED} short-conv dense",
            f"{QK_NORMED} experts selection-bias",
            f"{NORMED} short-conv experts selection-bias",
        ],
        {**FIRST_IS_DENSE, **SECOND_IS_ATTENTION, "expert_gating_func": SIGMOID, "shortconv.l_cache": "conv"},
        {"conv": "3"},
        tensors("""
            token_embd.weight       embd vocab
            token_embd_norm.weight  embd
        """),
    ),
    "llama": TinyArchitecture(
        3 * [f"{NORMED} qkv experts"], NO_EXPERT_FF, {**FF_IS_EXPERT, "expert": "8", "used": "2"}
    ),
    "llama4": TinyArchitecture(
        2 * [f"{NORMED} qkv dense", f"{NORMED} qkv experts shared"],
        {"interleave_moe_layer_step": 2},
        {"used": "1"},
    ),
    "maple": TinyArchitecture(
        3 * [f"{QK_NORMED} experts"], {**TWO_OF_THREE_WINDOWED, "swiglu_clamp_exp": [7.0, 7.0, 7.0]}
    ),
    "mellum": TinyArchitecture(4 * [f"{QK_NORMED} experts"], WINDOW),
    "mimo2": TinyArchitecture(
        1 * [f"{NORMED} qkv sinks dense"] + 2 * [f"{NORMED} qkv sinks experts selection-bias"],
        {**TWO_OF_THREE_WINDOWED, "expert_gating_func": SIGMOID},
    ),
    "minimax-01": TinyArchitecture(
        2 * [f"{NORMED} lightning-attention experts", f"{NORMED} qkv experts"],
        {**NO_EXPERT_FF, **EVERY_SECOND_IS_ATTENTION, "residual_scale": 3.5},
        FF_IS_EXPERT,
    ),
    "minimax-m2": TinyArchitecture(
        3 * [f"{NORMED} qkv norm-of-all-heads experts selection-bias"],
        {"expert_gating_func": SIGMOID},
        {**FF_IS_EXPERT, "rot": "8"},
    ),
    "nemotron_h_moe": TinyArchitecture(
        [
            "attn-norm mamba2",
            "attn-norm qkv",
            "attn-norm selection-bias latent-experts",
            "attn-norm selection-bias latent-experts of-half-width",
        ],
        {
            **NORMALIZED_SIGMOID,
            **SHARED_FF,
            **SSM_KEYS,
            "attention.layer_norm_epsilon": 1e-5,
            "attention.head_count_kv": ["0", "head_kv", "0", "0"],
            "feed_forward_length": ["0", "0", "ff", "ff"],
            "expert_feed_forward_length": ["0", "0", "ff_exp", "ff_half"],
            "expert_used_count": ["0", "0", "used", "2"],
            "expert_shared_count": 1,
            "moe_latent_size": "latent",
        },
        {
            **SSM_DIMENSIONS,
            "group": "2",
            "group_width": "embd",
            "latent": "32",
            "ff_exp": "64",
            "ff_half": "32",
        },
    ),
    "olmoe": TinyArchitecture(
        3 * [f"{NORMED} qkv norm-of-all-heads experts"], NO_EXPERT_FF, {**FF_IS_EXPERT, "head_kv": "head"}
    ),
    "phimoe": TinyArchitecture(
        3 * [f"{NORMED} norm-biases qkv qkv-bias attn-out-bias experts"],
        NO_EXPERT_FF,
        {**FF_IS_EXPERT, "used": "2"},
        OUTPUT
        | tensors("""
            output_norm.bias  embd
            output.bias       vocab
        """),
    ),
    "qwen2moe": TinyArchitecture(
        3 * [f"{NORMED} qkv qkv-bias experts shared shared-gate"], SHARED_FF, {"ff_shexp": "64"}
    ),
    "qwen35moe": TinyArchitecture(
        2
        * [
            "attn-norm post-attn-norm delta-net alpha-and-beta merged-experts shared shared-gate",
            "attn-norm post-attn-norm gated-qkv norm-per-head merged-experts shared shared-gate",
        ],
        {
            **SHARED_FF,
            **SSM_KEYS,
            **EVERY_SECOND_IS_ATTENTION,
            "rope.dimension_sections": ["2", "1", "1", "0"],
        },
        DELTA_NET_DIMENSIONS,
    ),
    "qwen3moe": TinyArchitecture(3 * [f"{QK_NORMED} experts"]),
    "qwen3next": TinyArchitecture(
        2
        * [
            "attn-norm post-attn-norm delta-net merged-alpha-and-beta experts shared shared-gate",
            "attn-norm post-attn-norm gated-qkv norm-per-head experts shared shared-gate",
        ],
        {**SHARED_FF, **SSM_KEYS, **EVERY_SECOND_IS_ATTENTION},
        DELTA_NET_DIMENSIONS,
    ),
    "qwen3vlmoe": TinyArchitecture(
        3 * [f"{QK_NORMED} experts"],
        {"rope.dimension_sections": ["3", "3", "2", "0"], "n_deepstack_layers": 0},
    ),
    "smallthinker": TinyArchitecture(
        4 * [f"{NORMED} qkv experts"], {"attention.sliding_window": 4096, "expert_gating_func": SIGMOID}
    ),
    "step35": TinyArchitecture(
        1 * [f"{QK_NORMED} gate-per-head dense"] + 2 * [f"{QK_NORMED} gate-per-head {BIASED_AND_SHARED}"],
        {**NORMALIZED_SIGMOID, **SHARED_FF, **TWO_OF_THREE_WINDOWED},
    ),
}
