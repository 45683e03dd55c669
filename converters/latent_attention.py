"""DeepSeek's families, whose attention keeps one latent vector for all heads (MLA)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from gguf.constants import MODEL_ARCH, ExpertGatingFuncType, Keys

from edgemoe.converters.checkpoint import Checkpoint, Floats, StoredTensor
from edgemoe.converters.family import Family, Shapes, Sources, group_keys
from edgemoe.converters.gguf_file import Value
from edgemoe.converters.recipe import Stored
from edgemoe.converters.values import f32, flag, u32
from edgemoe.gguf_header import show

__all__ = ["DeepSeek2"]

_GATING = {"softmax": ExpertGatingFuncType.SOFTMAX, "sigmoid": ExpertGatingFuncType.SIGMOID}


class DeepSeek2(Family):
    """DeepSeek-V2, V3 and R1, and what shares their classes (Kimi-K2, Moonlight)."""

    title = "DeepSeek-V2/V3"
    classes = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
    architecture = MODEL_ARCH.DEEPSEEK2

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.config
        v3 = "DeepseekV3ForCausalLM" in config.classes
        self.n_ff_exp: int = config.integer("moe_intermediate_size")
        self.n_dense: int = config.integer("first_k_dense_replace", default=0, low=0)
        self.n_shared: int = config.integer("n_shared_experts")
        self.q_rank: int | None = config.integer("q_lora_rank", default=None)
        self.kv_rank: int = config.integer("kv_lora_rank")
        self.n_rope: int = config.integer("qk_rope_head_dim")
        self.n_nope: int = config.integer("qk_nope_head_dim")
        self.n_value: int = config.integer("v_head_dim")
        self.n_group: int = config.integer("n_group", default=1)
        self.gating = config.text("scoring_func", default="sigmoid" if v3 else "softmax")
        self.chosen_with_bias = config.text("topk_method", default="noaux_tc" if v3 else "greedy") == "noaux_tc"
        self.rope_dim = self.n_rope
        if self.gating not in _GATING:
            config.refuse(f"has scoring_func {show(self.gating)}, expected {' or '.join(_GATING)}")
        config.demand("attention_bias", False, default=False)
        config.demand("moe_layer_freq", 1, default=1)
        config.demand("rope_interleave", True, default=True)
        if self.n_group > 1 and not self.chosen_with_bias:
            self.notes.append(
                "llama.cpp ranks groups of experts by their two best experts; this model was trained to rank them by"
                " the best one."
            )

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        n_query = self.n_head * (self.n_nope + self.n_rope)
        shapes = self.norms("attn_norm", "ffn_norm") | {"attn_kv_a_norm.weight": (self.kv_rank,)}
        if self.q_rank is None:
            shapes["attn_q.weight"] = (n_query, self.n_embd)
        else:
            shapes["attn_q_a.weight"] = (self.q_rank, self.n_embd)
            shapes["attn_q_a_norm.weight"] = (self.q_rank,)
            shapes["attn_q_b.weight"] = (n_query, self.q_rank)
        shapes["attn_kv_a_mqa.weight"] = (self.kv_rank + self.n_rope, self.n_embd)
        shapes["attn_k_b.weight"] = (self.n_head, self.kv_rank, self.n_nope)
        shapes["attn_v_b.weight"] = (self.n_head, self.n_value, self.kv_rank)
        shapes["attn_output.weight"] = (self.n_embd, self.n_head * self.n_value)
        if il < self.n_dense:
            return shapes | self.feed_forward(self.n_ff)
        if self.chosen_with_bias:
            shapes["exp_probs_b.bias"] = (self.n_expert,)
        return shapes | self.experts(self.n_ff_exp) | self.feed_forward(self.n_shared * self.n_ff_exp, "_shexp")

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone: latent attention is multi-query attention with one wide head."""
        config = self.config
        keys = {
            Keys.Attention.HEAD_COUNT_KV: u32(1),
            Keys.Attention.KEY_LENGTH: u32(self.kv_rank + self.n_rope),
            Keys.Attention.VALUE_LENGTH: u32(self.kv_rank),
            Keys.Attention.KEY_LENGTH_MLA: u32(self.n_nope + self.n_rope),
            Keys.Attention.VALUE_LENGTH_MLA: u32(self.n_value),
            # 0: queries are projected at once. Only for models of certain depths may llama.cpp do without the key.
            Keys.Attention.Q_LORA_RANK: u32(self.q_rank or 0),
            Keys.Attention.KV_LORA_RANK: u32(self.kv_rank),
            Keys.LLM.LEADING_DENSE_BLOCK_COUNT: u32(self.n_dense),
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: u32(self.n_ff_exp),
            Keys.LLM.EXPERT_SHARED_COUNT: u32(self.n_shared),
            Keys.LLM.EXPERT_WEIGHTS_SCALE: f32(config.number("routed_scaling_factor", default=1.0)),
            Keys.LLM.EXPERT_WEIGHTS_NORM: flag(config.flag("norm_topk_prob", default=False)),
            Keys.LLM.EXPERT_GATING_FUNC: u32(_GATING[self.gating]),
        }
        keys |= group_keys(self, self.n_group)
        mscale = config.rope("mscale_all_dim", default=None)
        if config.rope_type == "yarn" and mscale is not None:
            if config.rope("mscale", default=mscale) != mscale:
                config.refuse(
                    "has another mscale than mscale_all_dim, which llama.cpp takes to be the same; correct it"
                )
            # A tenth of it, as the reference converter writes it; llama.cpp undoes this for deepseek2.
            keys[Keys.Rope.SCALING_YARN_LOG_MUL] = f32(0.1 * mscale)
        return keys

    def sources(self, name: str, tensor: StoredTensor) -> Sources:
        """Split the up-projection of latent keys and values, keys transposed for the absorbed form of attention."""
        if not name.endswith(".kv_b_proj.weight"):
            yield from super().sources(name, tensor)
            return
        self.check(tensor, (self.n_head * (self.n_nope + self.n_value), self.kv_rank))
        block = name.removesuffix("kv_b_proj.weight")
        for part, rows, shape in (
            ("k_b_proj.weight", slice(None, self.n_nope), (self.n_head, self.kv_rank, self.n_nope)),
            ("v_b_proj.weight", slice(self.n_nope, None), (self.n_head, self.n_value, self.kv_rank)),
        ):
            change = partial(_rows_of_heads, self.n_head, rows, part.startswith("k"))
            yield self.named(block + part, tensor), None, Stored(tensor, shape, change=change)


def _rows_of_heads(n_head: int, rows: slice, transposed: bool, weights: Floats) -> Floats:
    """Take the same rows of each head, [n_head, rows, columns]."""
    taken = weights.reshape(n_head, -1, weights.shape[-1])[:, rows]
    return np.swapaxes(taken, 1, 2) if transposed else taken
