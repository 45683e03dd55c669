"""What all families of Mixture-of-Experts models have in common: numbers, metadata, names and shapes of tensors.

A family says which tensors the pinned llama.cpp loads for it, with their shapes, as they follow from the config
(`load_arch_tensors` of llama.cpp). The tensors of the checkpoint have to be exactly those: a name is translated by
`gguf.tensor_mapping`, and whatever is missing, left over or of another shape is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import numpy as np
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, Keys
from gguf.tensor_mapping import get_tensor_name_map

from edgemoe.converters.checkpoint import Checkpoint, Floats, StoredTensor
from edgemoe.converters.gguf_file import Metadata, Value
from edgemoe.converters.model_config import ModelConfig
from edgemoe.converters.recipe import Change, Part, Recipe, Shape, Stored
from edgemoe.converters.rope import rope_factors, rope_keys
from edgemoe.converters.values import f32, u32
from edgemoe.errors import ConvertError

__all__ = ["Family", "Shapes", "Sources", "group_keys", "halves_of_rows", "paired_queries_and_keys"]

Shapes = dict[str, Shape]
Sources = Iterator[tuple[str, int | None, Part]]
"""GGUF name, the expert it is of (None: the whole tensor), and where the weights are."""

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# What is added to the router's probabilities when experts are chosen, as gguf's name map spells it.
_SELECTION_BIASES = {".e_score_correction_bias": ".e_score_correction.bias", ".expert_bias": ".expert_bias.bias"}
_NOT_WEIGHTS = (".rotary_emb.inv_freq", "_scale_inv")  # computed anew; read along with the weights they belong to


class Family:
    """One family; the subclasses are in `edgemoe.converters.families`.

    Parameters
    ----------
    checkpoint : Checkpoint
        A checkpoint of this family.

    Attributes
    ----------
    title : str
        What people call it.
    classes : tuple of str
        Names in the config's ``architectures``.
    architecture : MODEL_ARCH
        llama.cpp's architecture.
    loads_tied : bool
        Whether llama.cpp uses the token embeddings as output when there is no output tensor.
    output_norm : str
        llama.cpp's name of the last normalization.
    notes : list of str
        What whoever converts should know.

    Raises
    ------
    ConvertError
        If the config lacks a number, or asks for something that llama.cpp does not compute.
    """

    title: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    architecture: ClassVar[MODEL_ARCH]
    loads_tied: ClassVar[bool] = True
    output_norm: ClassVar[str] = "output_norm.weight"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = config = ModelConfig(checkpoint.folder / "config.json", checkpoint.config)
        self.n_layer: int = config.integer("num_hidden_layers", high=_MAX_LAYERS)
        self.n_vocab: int = config.integer("vocab_size")
        self.n_embd: int = config.integer("hidden_size")
        self.n_head: int = config.integer("num_attention_heads")
        self.n_head_kv: int = config.integer("num_key_value_heads", default=self.n_head)
        self.head_dim: int = config.integer("head_dim", default=self.n_embd // self.n_head)
        self.n_expert: int = config.integer("num_local_experts", "num_experts", "n_routed_experts", high=_MAX_EXPERTS)
        self.n_expert_used: int = config.integer("num_experts_per_tok")
        self.n_ff: int = config.integer("intermediate_size")
        self.rope_dim = self.head_dim
        self.tied: bool = config.flag("tie_word_embeddings", default="lm_head.weight" not in checkpoint.tensors)
        self.notes: list[str] = []
        config.demand("hidden_act", "silu", default="silu")
        if self.n_expert_used > self.n_expert:
            config.refuse(f"uses {self.n_expert_used} of {self.n_expert} experts, which is impossible; correct it")
        self._names = get_tensor_name_map(self.architecture, self.n_layer)

    # What a family says of itself.

    def layer(self, il: int) -> Shapes:
        """Tensors that llama.cpp loads for layer `il`, without ``blk.N.``, and their shapes."""
        raise NotImplementedError

    def keys(self) -> Mapping[str, Value]:
        """Metadata of this family alone; keys without the architecture's name."""
        return {}

    def ignores(self, name: str) -> bool:
        """Whether a tensor is no part of the language model that llama.cpp runs."""
        return False

    def sources(self, name: str, tensor: StoredTensor) -> Sources:
        """Say which GGUF tensors come from a stored tensor.

        Parameters
        ----------
        name : str
            Its name, without what an outer model puts before it.
        tensor : StoredTensor
            Where it is.
        """
        match = _ONE_EXPERT.fullmatch(name)
        if match:
            yield self.named(f"{match[1]}.{match[3]}", tensor), int(match[2]), Stored(tensor, tensor.shape)
        elif name.endswith((".experts.gate_up_proj", ".experts.gate_up_proj.weight")):
            stem = name[: name.rindex(".gate_up_proj")]
            names = [self.named(f"{stem}.{part}_proj.weight", tensor) for part in ("gate", "up")]
            yield from halves_of_rows(tensor, names)
        elif name.endswith((".experts.down_proj", ".experts.down_proj.weight")):
            target = self.named(name.removesuffix(".weight") + ".weight", tensor)
            yield target, None, Stored(tensor, tensor.shape)
        else:
            for end, bias in _SELECTION_BIASES.items():
                if name.endswith(end):
                    name = name.removesuffix(end) + bias
            target = self.named(name, tensor)
            yield target, None, Stored(tensor, tensor.shape, change=self.change(target))

    def change(self, target: str) -> Change | None:
        """Say what a whole tensor goes through on its way into the GGUF; its shape stays."""
        return None

    # Building blocks of `layer`.

    def attention(self, *, bias: bool = False) -> Shapes:
        """Give query, key, value and output of ordinary attention."""
        n_q, n_kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        shapes: Shapes = {"attn_q.weight": (n_q, self.n_embd)}
        shapes |= {f"attn_{part}.weight": (n_kv, self.n_embd) for part in "kv"}
        shapes["attn_output.weight"] = (self.n_embd, n_q)
        if bias:
            shapes |= {"attn_q.bias": (n_q,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,)}
        return shapes

    def head_norms(self) -> Shapes:
        """Give the norms of each head's queries and keys."""
        return {"attn_q_norm.weight": (self.head_dim,), "attn_k_norm.weight": (self.head_dim,)}

    def norms(self, *names: str) -> Shapes:
        """Give norms of the residual stream."""
        return {f"{name}.weight": (self.n_embd,) for name in names}

    def experts(self, n_ff: int) -> Shapes:
        """Give the router and the stacks of experts."""
        return {
            "ffn_gate_inp.weight": (self.n_expert, self.n_embd),
            "ffn_gate_exps.weight": (self.n_expert, n_ff, self.n_embd),
            "ffn_up_exps.weight": (self.n_expert, n_ff, self.n_embd),
            "ffn_down_exps.weight": (self.n_expert, self.n_embd, n_ff),
        }

    def feed_forward(self, n_ff: int, suffix: str = "") -> Shapes:
        """Give a dense feed-forward network, or shared experts (suffix ``_shexp``)."""
        return {
            f"ffn_gate{suffix}.weight": (n_ff, self.n_embd),
            f"ffn_up{suffix}.weight": (n_ff, self.n_embd),
            f"ffn_down{suffix}.weight": (self.n_embd, n_ff),
        }

    # What follows.

    def metadata(self) -> Metadata:
        """All keys of the architecture, in order."""
        config = self.config
        keys: dict[str, Value] = {
            Keys.LLM.BLOCK_COUNT: u32(self.n_layer),
            Keys.LLM.CONTEXT_LENGTH: u32(config.integer("max_position_embeddings")),
            Keys.LLM.EMBEDDING_LENGTH: u32(self.n_embd),
            Keys.LLM.FEED_FORWARD_LENGTH: u32(self.n_ff),
            Keys.LLM.VOCAB_SIZE: u32(self.n_vocab),
            Keys.Attention.HEAD_COUNT: u32(self.n_head),
            Keys.Attention.HEAD_COUNT_KV: u32(self.n_head_kv),
            Keys.Attention.KEY_LENGTH: u32(self.head_dim),
            Keys.Attention.VALUE_LENGTH: u32(self.head_dim),
            Keys.Attention.LAYERNORM_RMS_EPS: f32(config.number("rms_norm_eps", "norm_eps")),
            Keys.LLM.EXPERT_COUNT: u32(self.n_expert),
            Keys.LLM.EXPERT_USED_COUNT: u32(self.n_expert_used),
            Keys.Rope.DIMENSION_COUNT: u32(self.rope_dim),
            **rope_keys(config),
            **self.keys(),
        }
        name = MODEL_ARCH_NAMES[self.architecture]
        return {key.format(arch=name): value for key, value in keys.items()}

    def recipes(self) -> list[Recipe]:
        """Say how every tensor of the GGUF is made, in file order.

        Raises
        ------
        ConvertError
            If the checkpoint's tensors are not those that the config promises.
        """
        found = self._found()
        recipes = [_recipe(self, name, shape, found.pop(name, {})) for name, shape in self._expected().items()]
        for sources in found.values():
            stray = next(iter(sources.values())).origin
            raise ConvertError(f"{stray} has no place in llama.cpp's {self.title}; this variant cannot be converted")
        factors = rope_factors(self.config, self.rope_dim)
        if factors is not None:
            recipes.append(Recipe("rope_freqs.weight", factors.shape, (), factors))
        return recipes

    def named(self, name: str, tensor: StoredTensor) -> str:
        """Translate a checkpoint's name.

        Raises
        ------
        ConvertError
            If llama.cpp has no such tensor.
        """
        for candidate in (name, name.removeprefix("model.")):
            found = self._names.get_name(candidate, try_suffixes=(".weight", ".bias"))
            if found is not None:
                return str(found)
        raise ConvertError(
            f"{tensor} is not known of {self.title}; the checkpoint is of another family, or a variant that cannot be"
            " converted"
        )

    def check(self, tensor: StoredTensor, shape: Shape) -> None:
        """Refuse a stored tensor of another shape than the config implies."""
        if tensor.shape != shape:
            raise _contradiction(self.config, tensor, tensor.shape, shape)

    def _expected(self) -> Shapes:
        shapes: Shapes = {"token_embd.weight": (self.n_vocab, self.n_embd)}
        for il in range(self.n_layer):
            shapes |= {f"blk.{il}.{name}": shape for name, shape in self.layer(il).items()}
        shapes[self.output_norm] = (self.n_embd,)
        if not (self.tied and self.loads_tied):
            shapes["output.weight"] = (self.n_vocab, self.n_embd)
        return shapes

    def _found(self) -> dict[str, dict[int | None, Part]]:
        found: dict[str, dict[int | None, Part]] = {}
        left_out = 0
        for stored, tensor in self.checkpoint.tensors.items():
            name = stored.replace("language_model.model.", "model.").replace("language_model.lm_head.", "lm_head.")
            name = name.replace("model.language_model.", "model.")
            layer = _LAYER.search(name)
            # Layers beyond the model's own predict further tokens; llama.cpp runs without them.
            if self.ignores(name) or (layer and int(layer[1]) >= self.n_layer):
                left_out += 1
                continue
            if name.endswith(_NOT_WEIGHTS):
                continue
            if name == "lm_head.weight" and self.tied:
                continue
            for target, expert, part in self.sources(name, tensor):
                if expert in found.setdefault(target, {}):
                    raise ConvertError(f"{tensor} says again what another tensor says of {target}; download it again")
                found[target][expert] = part
        if left_out:
            what = "they see, or predict further tokens than the next"
            self.notes.append(f"{left_out} of the checkpoint's tensors are left out: {what}.")
        if self.tied and not self.loads_tied and "token_embd.weight" in found:
            found["output.weight"] = dict(found["token_embd.weight"])
        return found


def halves_of_rows(tensor: StoredTensor, names: list[str]) -> Sources:
    """Take a tensor [..., 2 n, columns] apart into the first n rows and the other n."""
    *outer, n_rows, n_columns = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
    half = n_rows // 2
    for name, rows in zip(names, (slice(0, half), slice(half, 2 * half)), strict=True):
        for expert in range(outer[0]) if outer else (None,):
            yield name, expert, Stored(tensor, (half, n_columns), expert, rows)


def _rotary_pairs(n_head: int, weights: Floats) -> Floats:
    """Reorder rows from halves of a head (transformers) to neighbouring pairs (llama.cpp's `LLAMA_ROPE_TYPE_NORM`)."""
    halves = weights.reshape(n_head, 2, -1, *weights.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(weights.shape)


def group_keys(family: Family, n_group: int) -> Mapping[str, Value]:
    """Metadata of routing by groups of experts first."""
    if n_group == 1:
        return {}
    used: int = family.config.integer("topk_group")
    if family.n_expert % n_group or used >= n_group:
        family.config.refuse(f"routes {family.n_expert} experts by {used} of {n_group} groups, which is impossible")
    return {Keys.LLM.EXPERT_GROUP_COUNT: u32(n_group), Keys.LLM.EXPERT_GROUP_USED_COUNT: u32(used)}


def paired_queries_and_keys(family: Family, target: str) -> Change | None:
    """Say that queries and keys go to llama.cpp's order of rotary pairs, and nothing else changes."""
    if target.endswith(".attn_q.weight"):
        return partial(_rotary_pairs, family.n_head)
    return partial(_rotary_pairs, family.n_head_kv) if target.endswith(".attn_k.weight") else None


def _recipe(family: Family, name: str, shape: Shape, sources: dict[int | None, Part]) -> Recipe:
    """Put the parts of one tensor in order; refuses parts that are not the whole."""
    stacked = len(shape) == 3 and None not in sources
    experts: list[int | None] = list(range(shape[0])) if stacked else [None]
    parts = []
    for expert in experts:
        part = sources.pop(expert, None)
        if part is None:
            which = name if expert is None else f"{name}, expert {expert} of {shape[0]}"
            raise ConvertError(
                f"{family.checkpoint.folder} has no weights for {which}; a shard is missing, or config.json is of"
                " another model"
            )
        wanted = shape[1:] if stacked else shape
        if _extents(part.shape) != _extents(wanted):
            raise _contradiction(family.config, part.origin, part.shape, wanted)
        parts.append(part)
    if sources:
        more = next(iter(sources.values())).origin
        raise ConvertError(
            f"{more} is of an expert more than the {shape[0]} that {family.config.path} promises; give the config that"
            " belongs to the weights"
        )
    return Recipe(name, shape, tuple(parts))


def _extents(shape: Shape) -> Shape:
    """Extents that count: a row of a matrix is the same as a vector."""
    return tuple(extent for extent in shape if extent != 1)


def _contradiction(config: ModelConfig, tensor: StoredTensor, found: Shape, expected: Shape) -> ConvertError:
    return ConvertError(
        f"{tensor} gives shape {found} where {config.path} implies {expected}; give the config that belongs to the"
        " weights"
    )
