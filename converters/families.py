"""The families of Mixture-of-Experts models that can be converted, one class each.

What llama.cpp loads and computes for an architecture is written in its ``src/models``. Where it computes one variant of
a family only, the config has to be of that variant: a file that loads and answers wrongly is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from gguf.constants import MODEL_ARCH, ExpertGatingFuncType, GGUFValueType, Keys

from edgemoe.converters.checkpoint import Checkpoint, Floats, StoredTensor
from edgemoe.converters.family import Family, Shapes, Sources, array, f32, flag, halves_of_rows, rotary_pairs, u32
from edgemoe.converters.gguf_file import Value
from edgemoe.converters.recipe import Change, Mxfp4, Stored
from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["FAMILIES", "family_of"]

_GATING = {"softmax": ExpertGatingFuncType.SOFTMAX, "sigmoid": ExpertGatingFuncType.SIGMOID}


class Mixtral(Family):
    """Mixtral, an ordinary llama with experts."""

    title = "Mixtral"
    classes = ("MixtralForCausalLM",)
    architecture = MODEL_ARCH.LLAMA

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        window = self.config.integer("sliding_window", default=None)
        if window is not None and window < self.config.integer("max_position_embeddings"):
            self.config.refuse("has a sliding_window, which llama.cpp does not compute for this family; set it to null")

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        return self.norms("attn_norm", "ffn_norm") | self.attention() | self.experts(self.n_ff)

    def change(self, target: str) -> Change | None:
        """Turn queries and keys to llama.cpp's order of rotary pairs."""
        return _paired_queries_and_keys(self, target)


class Qwen2Moe(Family):
    """Qwen1.5-MoE and Qwen2-MoE."""

    title = "Qwen2-MoE"
    classes = ("Qwen2MoeForCausalLM",)
    architecture = MODEL_ARCH.QWEN2MOE
    loads_tied = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.n_ff_exp: int = self.config.integer("moe_intermediate_size")
        self.n_ff_shexp: int = self.config.integer("shared_expert_intermediate_size")
        _every_layer_routes(self)
        self.config.demand("norm_topk_prob", False, default=False)
        self.config.demand("qkv_bias", True, default=True)

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        shapes = self.norms("attn_norm", "ffn_norm") | self.attention(bias=True) | self.experts(self.n_ff_exp)
        return shapes | {"ffn_gate_inp_shexp.weight": (self.n_embd,)} | self.feed_forward(self.n_ff_shexp, "_shexp")

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone."""
        return {
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: u32(self.n_ff_exp),
            Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: u32(self.n_ff_shexp),
        }


class Qwen3Moe(Family):
    """Qwen3-MoE."""

    title = "Qwen3-MoE"
    classes = ("Qwen3MoeForCausalLM",)
    architecture = MODEL_ARCH.QWEN3MOE

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.n_ff_exp: int = self.config.integer("moe_intermediate_size")
        _every_layer_routes(self)
        self.config.demand("norm_topk_prob", True, default=False)
        self.config.demand("attention_bias", False, default=False)

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        norms = self.norms("attn_norm", "ffn_norm")
        return norms | self.attention() | self.head_norms() | self.experts(self.n_ff_exp)

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone."""
        return {Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: u32(self.n_ff_exp)}


class Olmoe(Family):
    """OLMoE."""

    title = "OLMoE"
    classes = ("OlmoeForCausalLM",)
    architecture = MODEL_ARCH.OLMOE
    loads_tied = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.config.demand("norm_topk_prob", False, default=False)
        self.config.demand("attention_bias", False, default=False)
        self.config.demand("clip_qkv", None, default=None)

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        norms = self.norms("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm")
        return norms | self.attention() | self.experts(self.n_ff)


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
        keys |= _group_keys(self, self.n_group)
        mscale = config.rope("mscale_all_dim", default=None)
        if config.rope_type == "yarn" and mscale:
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


class GraniteMoe(Family):
    """Granite-MoE, with or without a shared expert."""

    title = "Granite-MoE"
    classes = ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")
    architecture = MODEL_ARCH.GRANITE_MOE

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.n_ff_shexp: int = self.config.integer("shared_intermediate_size", default=0, low=0)
        self.config.demand("attention_bias", False, default=False)

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        shapes = self.norms("attn_norm", "ffn_norm") | self.attention() | self.experts(self.n_ff)
        return shapes | self.feed_forward(self.n_ff_shexp, "_shexp") if self.n_ff_shexp else shapes

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone."""
        keys = {
            Keys.Attention.SCALE: f32(self.config.number("attention_multiplier", default=1.0)),
            Keys.LLM.EMBEDDING_SCALE: f32(self.config.number("embedding_multiplier", default=1.0)),
            Keys.LLM.RESIDUAL_SCALE: f32(self.config.number("residual_multiplier", default=1.0)),
            Keys.LLM.LOGIT_SCALE: f32(self.config.number("logits_scaling", default=1.0)),
        }
        if self.n_ff_shexp:
            keys[Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH] = u32(self.n_ff_shexp)
        return keys

    def sources(self, name: str, tensor: StoredTensor) -> Sources:
        """Split gates and ups, which are stored as one."""
        block, _, part = name.partition(".block_sparse_moe.input_linear")
        if part:
            names = [self.named(f"{block}.mlp.experts.{gate}_proj.weight", tensor) for gate in ("gate", "up")]
            yield from halves_of_rows(tensor, names)
            return
        block, _, part = name.partition(".shared_mlp.input_linear")
        if part:
            names = [self.named(f"{block}.mlp.shared_expert.{gate}_proj.weight", tensor) for gate in ("gate", "up")]
            yield from halves_of_rows(tensor, names)
            return
        yield from super().sources(name, tensor)

    def change(self, target: str) -> Change | None:
        """Turn queries and keys to llama.cpp's order of rotary pairs."""
        return _paired_queries_and_keys(self, target)


class GptOss(Family):
    """gpt-oss, whose experts are MXFP4 and stay so bit for bit, or bfloat16."""

    title = "gpt-oss"
    classes = ("GptOssForCausalLM",)
    architecture = MODEL_ARCH.GPT_OSS
    loads_tied = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        alternating = [("sliding_attention", "full_attention")[il % 2] for il in range(self.n_layer)]
        self.config.demand("layer_types", alternating, default=alternating)
        self.config.demand("swiglu_limit", 7.0, default=7.0)
        self.config.demand("attention_bias", True, default=True)

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        shapes = self.norms("attn_norm", "post_attention_norm") | self.attention(bias=True)
        shapes |= {"attn_output.bias": (self.n_embd,), "attn_sinks.weight": (self.n_head,)}
        shapes |= self.experts(self.n_ff) | {"ffn_gate_inp.bias": (self.n_expert,)}
        shapes |= {f"ffn_{part}_exps.bias": (self.n_expert, self.n_ff) for part in ("gate", "up")}
        return shapes | {"ffn_down_exps.bias": (self.n_expert, self.n_embd)}

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone."""
        return {
            Keys.Attention.SLIDING_WINDOW: u32(self.config.integer("sliding_window")),
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: u32(self.n_ff),
        }

    def sources(self, name: str, tensor: StoredTensor) -> Sources:
        """Take experts apart: gates and ups alternate, and bfloat16 matrices are transposed."""
        if name.endswith(".self_attn.sinks"):
            yield self.named(f"{name}.weight", tensor), None, Stored(tensor, tensor.shape)
            return
        stem, _, part = name.partition(".experts.")
        if not part or part.endswith("_scales"):
            if not part:
                yield from super().sources(name, tensor)
            return
        self.check_experts(tensor, part)
        projection = part.removesuffix("_blocks").removesuffix("_bias")
        picks = {
            "gate_up_proj": (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))),
            "down_proj": (("down", slice(None)),),
        }
        for what, pick in picks.get(projection, ()):
            weights = self.named(f"{stem}.experts.{what}_proj.weight", tensor)
            if part.endswith("_bias"):
                shape = (self.n_expert, len(range(tensor.shape[1])[pick]))
                change = partial(_columns, pick)
                yield weights.removesuffix("weight") + "bias", None, Stored(tensor, shape, change=change)
                continue
            for expert in range(self.n_expert):
                if part.endswith("_blocks"):
                    scales = self.checkpoint.tensors[tensor.name.removesuffix("_blocks") + "_scales"]
                    yield weights, expert, Mxfp4(tensor, scales, expert, pick)
                else:
                    shape = (len(range(tensor.shape[2])[pick]), tensor.shape[1])
                    yield weights, expert, Stored(tensor, shape, expert, change=partial(_columns_as_rows, pick))

    def check_experts(self, tensor: StoredTensor, part: str) -> None:
        """Refuse stacks of experts whose shapes do not fit the config or each other."""
        if part.endswith("_blocks"):
            scales = self.checkpoint.tensors.get(tensor.name.removesuffix("_blocks") + "_scales")
            if scales is None or tensor.dtype != "U8" or scales.dtype != "U8":
                raise ConvertError(f"{tensor} is no MXFP4 with its scales; download the checkpoint again")
            n_rows, n_weights = {"g": (2 * self.n_ff, self.n_embd), "d": (self.n_embd, self.n_ff)}[part[0]]
            self.check(tensor, (self.n_expert, n_rows, n_weights // 32, 16))
            self.check(scales, (self.n_expert, n_rows, n_weights // 32))
        elif part.endswith("_bias"):
            self.check(tensor, (self.n_expert, 2 * self.n_ff if part[0] == "g" else self.n_embd))
        else:
            shapes = {"g": (self.n_embd, 2 * self.n_ff), "d": (self.n_ff, self.n_embd)}
            self.check(tensor, (self.n_expert, *shapes[part[0]]))


class Glm4Moe(Family):
    """GLM-4.5, 4.6 and 4.7."""

    title = "GLM-4-MoE"
    classes = ("Glm4MoeForCausalLM",)
    architecture = MODEL_ARCH.GLM4_MOE

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.config
        self.n_ff_exp: int = config.integer("moe_intermediate_size")
        self.n_dense: int = config.integer("first_k_dense_replace", default=0, low=0)
        self.n_shared: int = config.integer("n_shared_experts")
        self.rope_dim = int(self.head_dim * config.rope("partial_rotary_factor", default=0.5))

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        shapes = self.norms("attn_norm", "post_attention_norm")
        shapes |= self.attention(bias=self.config.flag("attention_bias", default=False))
        if self.config.flag("use_qk_norm", default=False):
            shapes |= self.head_norms()
        if il < self.n_dense:
            return shapes | self.feed_forward(self.n_ff)
        shapes |= self.experts(self.n_ff_exp) | {"exp_probs_b.bias": (self.n_expert,)}
        return shapes | self.feed_forward(self.n_shared * self.n_ff_exp, "_shexp")

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone."""
        config = self.config
        return {
            Keys.LLM.LEADING_DENSE_BLOCK_COUNT: u32(self.n_dense),
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: u32(self.n_ff_exp),
            Keys.LLM.EXPERT_SHARED_COUNT: u32(self.n_shared),
            Keys.LLM.EXPERT_WEIGHTS_SCALE: f32(config.number("routed_scaling_factor", default=1.0)),
            Keys.LLM.EXPERT_WEIGHTS_NORM: flag(config.flag("norm_topk_prob", default=True)),
            Keys.LLM.EXPERT_GATING_FUNC: u32(ExpertGatingFuncType.SIGMOID),
            **_group_keys(self, config.integer("n_group", default=1)),
        }


class Llama4(Family):
    """Llama 4 (the language model of it)."""

    title = "Llama-4"
    classes = ("Llama4ForConditionalGeneration", "Llama4ForCausalLM")
    architecture = MODEL_ARCH.LLAMA4

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.config
        self.n_ff_exp, self.n_ff = self.n_ff, config.integer("intermediate_size_mlp")
        self.step: int = config.integer("interleave_moe_layer_step", default=1)
        # llama.cpp knows these of the architecture, and of its two sizes.
        rotates = [int((il + 1) % 4 != 0) for il in range(self.n_layer)]
        config.demand("no_rope_layers", rotates, default=rotates)
        config.demand("attention_chunk_size", 8192, default=8192)
        config.demand("attn_temperature_tuning", True, default=True)
        config.demand("floor_scale", 8192, default=8192)
        config.demand("attn_scale", 0.1, default=0.1)
        config.demand("use_qk_norm", self.n_expert != 128, default=True)
        config.demand("attention_bias", False, default=False)

    def layer(self, il: int) -> Shapes:
        """Tensors of a layer."""
        shapes = self.norms("attn_norm", "ffn_norm") | self.attention()
        if (il + 1) % self.step:
            return shapes | self.feed_forward(self.n_ff)
        return shapes | self.experts(self.n_ff_exp) | self.feed_forward(self.n_ff_exp, "_shexp")

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone."""
        return {
            Keys.LLM.INTERLEAVE_MOE_LAYER_STEP: u32(self.step),
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: u32(self.n_ff_exp),
        }

    def ignores(self, name: str) -> bool:
        """Leave out what sees."""
        return "vision_model." in name or "multi_modal_projector." in name

    def sources(self, name: str, tensor: StoredTensor) -> Sources:
        """Transpose experts; gates and ups are stored side by side."""
        stem, _, part = name.partition(".experts.")
        halves = {"gate": slice(0, self.n_ff_exp), "up": slice(self.n_ff_exp, None)}
        picks = {"gate_up_proj": halves, "down_proj": {"down": slice(None)}}.get(part)
        if picks is None:
            yield from super().sources(name, tensor)
            return
        n_in, n_out = (self.n_embd, 2 * self.n_ff_exp) if "gate" in picks else (self.n_ff_exp, self.n_embd)
        self.check(tensor, (self.n_expert, n_in, n_out))
        for what, pick in picks.items():
            target, n_rows = self.named(f"{stem}.experts.{what}_proj.weight", tensor), len(range(n_out)[pick])
            for expert in range(self.n_expert):
                yield target, expert, Stored(tensor, (n_rows, n_in), expert, change=partial(_columns_as_rows, pick))


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


FAMILIES: tuple[type[Family], ...] = (
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    Olmoe,
    DeepSeek2,
    GraniteMoe,
    GptOss,
    Glm4Moe,
    Llama4,
    Lfm2Moe,
)
"""All families."""


def family_of(checkpoint: Checkpoint) -> Family:
    """Recognise the family of a checkpoint.

    Raises
    ------
    ConvertError
        If it is none of the known ones (they are listed), or the config lacks what the family needs.
    """
    classes = checkpoint.config.get("architectures")
    for name in classes if isinstance(classes, list) else []:
        for family in FAMILIES:
            if name in family.classes:
                return family(checkpoint)
    known = ", ".join(f"{family.title} ({', '.join(family.classes)})" for family in FAMILIES)
    raise ConvertError(
        f"{checkpoint.folder / 'config.json'} is of {show(str(classes))}, which is no known family; known are {known}"
    )


def _every_layer_routes(family: Family) -> None:
    """Refuse Qwen's variants with dense layers or sliding windows, which llama.cpp does not compute."""
    family.config.demand("decoder_sparse_step", 1, default=1)
    family.config.demand("mlp_only_layers", [], default=[])
    family.config.demand("use_sliding_window", False, default=False)


def _group_keys(family: Family, n_group: int) -> Mapping[str, Value]:
    """Metadata of routing by groups of experts first."""
    if n_group == 1:
        return {}
    used: int = family.config.integer("topk_group")
    if family.n_expert % n_group or used >= n_group:
        family.config.refuse(f"routes {family.n_expert} experts by {used} of {n_group} groups, which is impossible")
    return {Keys.LLM.EXPERT_GROUP_COUNT: u32(n_group), Keys.LLM.EXPERT_GROUP_USED_COUNT: u32(used)}


def _paired_queries_and_keys(family: Family, target: str) -> Change | None:
    if target.endswith(".attn_q.weight"):
        return rotary_pairs(family.n_head)
    return rotary_pairs(family.n_head_kv) if target.endswith(".attn_k.weight") else None


def _rows_of_heads(n_head: int, rows: slice, transposed: bool, weights: Floats) -> Floats:
    """Take the same rows of each head, [n_head, rows, columns]."""
    taken = weights.reshape(n_head, -1, weights.shape[-1])[:, rows]
    return np.swapaxes(taken, 1, 2) if transposed else taken


def _columns(pick: slice, weights: Floats) -> Floats:
    return weights[:, pick]


def _columns_as_rows(pick: slice, weights: Floats) -> Floats:
    return weights[:, pick].T
