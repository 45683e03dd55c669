"""The families whose checkpoints keep all experts of a layer in one tensor, gates and ups fused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from gguf.constants import MODEL_ARCH, Keys

from edgemoe.converters.checkpoint import Checkpoint, Floats, StoredTensor
from edgemoe.converters.family import Family, Shapes, Sources, halves_of_rows, paired_queries_and_keys
from edgemoe.converters.gguf_file import Value
from edgemoe.converters.recipe import Change, Mxfp4, Stored
from edgemoe.converters.values import f32, u32
from edgemoe.errors import ConvertError

__all__ = ["GptOss", "GraniteMoe", "Llama4"]


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
        return paired_queries_and_keys(self, target)


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
        if self.config.rope_type == "yarn" and not self.config.rope_flag("truncate", default=True):
            self.notes.append(
                "llama.cpp rounds where yarn begins and ends to blend frequencies; this model was trained without that."
            )

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
        if config.says("no_rope_layers"):
            config.demand("no_rope_layers", rotates)
        config.demand("attention_chunk_size", 8192, default=8192)
        if not config.says("attn_temperature_tuning", default=True):  # true in some, a number in others
            config.refuse("has no attn_temperature_tuning, but llama.cpp always does it; it cannot be converted")
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


def _columns(pick: slice, weights: Floats) -> Floats:
    return weights[:, pick]


def _columns_as_rows(pick: slice, weights: Floats) -> Floats:
    return weights[:, pick].T
