"""The families that have attention in some layers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from gguf.constants import MODEL_ARCH, ExpertGatingFuncType, GGUFValueType, Keys

from edgemoe.converters.checkpoint import Checkpoint, Floats, StoredTensor
from edgemoe.converters.family import Family, Shapes, Sources
from edgemoe.converters.gguf_file import Value
from edgemoe.converters.recipe import Change, Stored
from edgemoe.converters.values import array, u32

__all__ = ["Lfm2Moe", "Qwen3Next"]


class Lfm2Moe(Family):
    """LFM2-MoE: short convolutions in most layers, attention in the others."""

    title = "LFM2-MoE"
    classes = ("Lfm2MoeForCausalLM",)
    architecture = MODEL_ARCH.LFM2MOE
    output_norm = "token_embd_norm.weight"  # a slip of llama.cpp's first files that became the rule

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.config
        self.n_ff_exp: int = config.integer("moe_intermediate_size")
        self.n_dense: int = config.integer("num_dense_layers", low=0)
        self.n_conv: int = config.integer("conv_L_cache")
        self.layer_types: list[str] = config.texts("layer_types", self.n_layer)
        config.demand("conv_bias", False, default=False)
        config.demand("norm_topk_prob", True, default=True)
        config.demand("use_expert_bias", True, default=True)
        config.demand("routed_scaling_factor", 1.0, default=1.0)

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        shapes = self.norms("attn_norm", "ffn_norm")
        if self.layer_types[il] == "full_attention":
            shapes |= self.attention() | self.head_norms()
        else:
            shapes["shortconv.conv.weight"] = (self.n_embd, self.n_conv)
            shapes["shortconv.in_proj.weight"] = (3 * self.n_embd, self.n_embd)
            shapes["shortconv.out_proj.weight"] = (self.n_embd, self.n_embd)
        if il < self.n_dense:
            return shapes | self.feed_forward(self.n_ff)
        return shapes | self.experts(self.n_ff_exp) | {"exp_probs_b.bias": (self.n_expert,)}

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone; no key-value heads is how llama.cpp knows a convolution."""
        heads = [self.n_head_kv if kind == "full_attention" else 0 for kind in self.layer_types]
        return {
            Keys.Attention.HEAD_COUNT_KV: array(heads, GGUFValueType.INT32),
            Keys.LLM.LEADING_DENSE_BLOCK_COUNT: u32(self.n_dense),
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: u32(self.n_ff_exp),
            Keys.LLM.EXPERT_GATING_FUNC: u32(ExpertGatingFuncType.SIGMOID),
            Keys.ShortConv.L_CACHE: u32(self.n_conv),
        }


class Qwen3Next(Family):
    """Qwen3-Next: gated delta nets in three layers of four."""

    title = "Qwen3-Next"
    classes = ("Qwen3NextForCausalLM",)
    architecture = MODEL_ARCH.QWEN3NEXT

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.config
        self.n_ff_exp: int = config.integer("moe_intermediate_size")
        self.n_ff_shexp: int = config.integer("shared_expert_intermediate_size")
        self.n_key_head: int = config.integer("linear_num_key_heads")
        self.n_value_head: int = config.integer("linear_num_value_heads")
        self.state: int = config.integer("linear_key_head_dim")
        self.n_conv: int = config.integer("linear_conv_kernel_dim")
        self.rope_dim = int(self.head_dim * config.rope("partial_rotary_factor", default=0.25))
        self.interval: int = config.integer("full_attention_interval", default=4)
        usual = [("linear_attention", "full_attention")[(il + 1) % self.interval == 0] for il in range(self.n_layer)]
        config.demand("layer_types", usual, default=usual)
        config.demand("linear_value_head_dim", self.state)
        config.demand("decoder_sparse_step", 1, default=1)
        config.demand("mlp_only_layers", [], default=[])
        config.demand("norm_topk_prob", True, default=True)
        config.demand("attention_bias", False, default=False)
        if self.n_value_head % self.n_key_head:
            config.refuse(f"has {self.n_value_head} value heads for {self.n_key_head} key heads; correct it")

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        shapes = self.norms("attn_norm", "post_attention_norm")
        if (il + 1) % self.interval == 0:
            shapes |= self.attention() | self.head_norms()
            shapes["attn_q.weight"] = (2 * self.n_head * self.head_dim, self.n_embd)  # each head's gate behind it
        else:
            n_keys, n_values = self.n_key_head * self.state, self.n_value_head * self.state
            shapes |= {
                "attn_qkv.weight": (2 * n_keys + n_values, self.n_embd),
                "attn_gate.weight": (n_values, self.n_embd),
                "ssm_conv1d.weight": (2 * n_keys + n_values, self.n_conv),
                "ssm_dt.bias": (self.n_value_head,),
                "ssm_a": (self.n_value_head,),
                "ssm_ba.weight": (2 * self.n_value_head, self.n_embd),
                "ssm_norm.weight": (self.state,),
                "ssm_out.weight": (self.n_embd, n_values),
            }
        shapes |= self.experts(self.n_ff_exp) | {"ffn_gate_inp_shexp.weight": (self.n_embd,)}
        return shapes | self.feed_forward(self.n_ff_shexp, "_shexp")

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone."""
        return {
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: u32(self.n_ff_exp),
            Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: u32(self.n_ff_shexp),
            Keys.LLM.FULL_ATTENTION_INTERVAL: u32(self.interval),
            Keys.SSM.CONV_KERNEL: u32(self.n_conv),
            Keys.SSM.STATE_SIZE: u32(self.state),
            Keys.SSM.GROUP_COUNT: u32(self.n_key_head),
            Keys.SSM.TIME_STEP_RANK: u32(self.n_value_head),
            Keys.SSM.INNER_SIZE: u32(self.n_value_head * self.state),
        }

    def ignores(self, name: str) -> bool:
        """Leave out what predicts further tokens."""
        return name.startswith("mtp.")

    def sources(self, name: str, tensor: StoredTensor) -> Sources:
        """Sort the rows of the joint projection, which go by key head, into queries, keys and values, and gates."""
        if name.endswith(".linear_attn.dt_bias"):
            target = self.named(name.removesuffix("dt_bias") + "dt_proj.bias", tensor)
            yield target, None, Stored(tensor, tensor.shape)
            return
        if not name.endswith(".linear_attn.in_proj_qkvz.weight"):
            yield from super().sources(name, tensor)
            return
        n_values = self.n_value_head * self.state
        n_rows = 2 * self.n_key_head * self.state + n_values
        self.check(tensor, (n_rows + n_values, self.n_embd))
        block = self.named(name, tensor).rpartition(".ssm_in.")[0]
        each = self.n_value_head // self.n_key_head * self.state
        heads = partial(_rows_by_kind, self.n_key_head, (self.state, self.state, each, each))
        for part, shape, kinds in (
            ("attn_qkv.weight", (n_rows, self.n_embd), slice(0, 3)),
            ("attn_gate.weight", (n_values, self.n_embd), slice(3, 4)),
        ):
            yield f"{block}.{part}", None, Stored(tensor, shape, change=partial(heads, kinds))

    def change(self, target: str) -> Change | None:
        """Norms are stored as their difference from 1, the decay of states as the logarithm of its rate."""
        if target.endswith("_norm.weight") and not target.endswith(".ssm_norm.weight"):
            return _plus_one
        return _decay if target.endswith(".ssm_a") else None


def _rows_by_kind(n_head: int, sizes: Sequence[int], kinds: slice, weights: Floats) -> Floats:
    """Rows of all heads that are of some kinds, kind by kind; each head has `sizes` rows of each kind."""
    by_head = weights.reshape(n_head, sum(sizes), -1)
    parts = np.split(by_head, np.cumsum(sizes)[:-1], axis=1)[kinds]
    return np.concatenate([part.reshape(-1, weights.shape[-1]) for part in parts])


def _plus_one(weights: Floats) -> Floats:
    return weights + 1


def _decay(weights: Floats) -> Floats:
    return -np.exp(weights)
