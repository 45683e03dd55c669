"""The families of Mixture-of-Experts models that can be converted, one class each.

What llama.cpp loads and computes for an architecture is written in its ``src/models``; where it computes one variant of
a family only, the config has to be of that variant, for a file that loads and answers wrongly is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguf.constants import MODEL_ARCH, Keys

from edgemoe.converters.checkpoint import Checkpoint
from edgemoe.converters.family import Family, Shapes, u32
from edgemoe.converters.gguf_file import Value
from edgemoe.errors import ConvertError
from edgemoe.gguf_header import show

__all__ = ["FAMILIES", "family_of"]


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


def _every_layer_routes(family: Family) -> None:
    """Refuse Qwen's variants with dense layers or sliding windows, which llama.cpp does not compute."""
    family.config.demand("decoder_sparse_step", 1, default=1)
    family.config.demand("mlp_only_layers", [], default=[])
    family.config.demand("use_sliding_window", False, default=False)


FAMILIES: tuple[type[Family], ...] = (Qwen3Moe,)
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
