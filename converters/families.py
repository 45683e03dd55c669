"""The families of Mixture-of-Experts models that can be converted, one class each.

What llama.cpp loads and computes for an architecture is written in its ``src/models``. Where it computes one variant of
a family only, the config has to be of that variant: a file that loads and answers wrongly is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguf.constants import MODEL_ARCH, ExpertGatingFuncType, Keys

from edgemoe.converters.checkpoint import Checkpoint
from edgemoe.converters.family import Family, Shapes, group_keys, paired_queries_and_keys
from edgemoe.converters.fused_experts import GptOss, GraniteMoe, Llama4
from edgemoe.converters.gguf_file import Value
from edgemoe.converters.hybrid_layers import Lfm2Moe, Qwen3Next
from edgemoe.converters.latent_attention import DeepSeek2
from edgemoe.converters.recipe import Change
from edgemoe.converters.values import f32, flag, u32
from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["FAMILIES", "family_of"]


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
        return paired_queries_and_keys(self, target)


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
            **group_keys(self, config.integer("n_group", default=1)),
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
    Qwen3Next,
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
