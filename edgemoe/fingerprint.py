"""Which model a pattern was made for, told by two hashes that cost a few megabytes of reading.

``router`` hashes what every quantization of the same weights has in common: the architecture's name, its experts, how
it weighs them where the header says so, and the bytes of the first and last MoE layer's router and norms and of the
output norm. llama.cpp keeps those tensors F32 in every quantization. ``quantization`` hashes names, types and shapes of
all tensors, so a file that was repacked with other offsets or metadata keeps it.

The rules: another router hash is another model, whose expert numbers mean something else: its patterns are refused.
The same router hash in another quantization is accepted with a note, because quantizing moves a ranking little, while
measured quality and sensitivity belong to the file they were measured with.

Routers stored in another type than F32 are hashed as stored: patterns then serve files that store them in that very
way, and other quantizations of the same weights count as another model. A fine-tune that left the hashed tensors
untouched counts as the same model.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from edgemoe.errors import ModelFileError, PatternError
from edgemoe.index import ExpertIndex, ExpertTensor, Tensor

__all__ = ["MAX_NAME", "ModelFingerprint", "fingerprint"]

MAX_NAME = 200
"""Longest name or label that is stored, characters."""

_F32 = 0  # ggml's type id
_CHUNK = 1 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_LAYERS = 1 << 12
_MAX_EXPERTS = 1 << 16  # what the ids of a pattern file can tell apart


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """The model a pattern belongs to.

    Attributes
    ----------
    router, quantization : str
        SHA-256 in hexadecimal, see the module's text.
    architecture, name, quantization_name : str
        As in `ExpertIndex`, for messages: printable, at most `MAX_NAME` characters.
    layers : tuple of int
        MoE layers, ascending: what L axes count.
    n_expert : int
        Experts per layer: N.
    n_expert_used : tuple of int
        Experts per token (top-k), one for each of `layers`.

    Raises
    ------
    PatternError
        If the values contradict each other; they may come from a stranger's file.
    """

    router: str
    quantization: str
    architecture: str
    name: str
    quantization_name: str
    layers: tuple[int, ...]
    n_expert: int
    n_expert_used: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (_HASH.fullmatch(self.router) and _HASH.fullmatch(self.quantization)):
            raise PatternError("the model's hashes are not 64 hexadecimal digits each")
        for text in (self.architecture, self.name, self.quantization_name):
            if len(text) > MAX_NAME or not text.isprintable():
                raise PatternError(f"a name of the model is not printable text of at most {MAX_NAME} characters")
        ascending = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if not 0 < len(self.layers) <= _MAX_LAYERS or not ascending:
            raise PatternError(f"the MoE layers are not 1 to {_MAX_LAYERS} ascending numbers")
        if self.layers[0] < 0 or self.layers[-1] >= _MAX_LAYERS:
            raise PatternError(f"a MoE layer's number is not below {_MAX_LAYERS}")
        if not 0 < self.n_expert <= _MAX_EXPERTS:
            raise PatternError(f"the model has {self.n_expert} experts per layer, expected 1 to {_MAX_EXPERTS}")
        if len(self.n_expert_used) != len(self.layers) or not all(0 < k <= self.n_expert for k in self.n_expert_used):
            raise PatternError("the experts per token are not one number from 1 to n_expert for each MoE layer")

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture}, {len(self.layers)} x {self.n_expert} experts)"


def fingerprint(index: ExpertIndex) -> ModelFingerprint:
    """Tell a model by its header and the routers and norms of two layers.

    Parameters
    ----------
    index : ExpertIndex
        A model.

    Raises
    ------
    ModelFileError
        If a file changed or became shorter since its header was read, or cannot be read.
    """
    n_expert_used = tuple(index.n_expert_used[layer] for layer in index.moe_layers)
    groups = (index.n_expert_group, index.n_group_used)
    gating = [(key, index.metadata[key]) for key in _gating_keys(index.architecture) if key in index.metadata]
    facts = (index.architecture, index.moe_layers, index.n_expert, n_expert_used, groups, *gating)
    router = hashlib.sha256(repr(facts).encode())
    for tensor in _telling_tensors(index):
        router.update(repr((tensor.name, tensor.shape)).encode())
        _hash_bytes(index, tensor, router)
    tensors: list[Tensor | ExpertTensor] = [*index.tensors, *index.experts]
    layout = sorted((tensor.name, tensor.type_name, tensor.shape) for tensor in tensors)
    return ModelFingerprint(
        router=router.hexdigest(),
        quantization=hashlib.sha256(repr(layout).encode()).hexdigest(),
        architecture=_label(index.architecture),
        name=_label(index.name),
        quantization_name=_label(index.quantization),
        layers=index.moe_layers,
        n_expert=index.n_expert,
        n_expert_used=n_expert_used,
    )


def _gating_keys(architecture: str) -> tuple[str, ...]:
    from gguf.constants import Keys

    keys = (Keys.LLM.EXPERT_GATING_FUNC, Keys.LLM.EXPERT_WEIGHTS_NORM)
    return tuple(key.format(arch=architecture) for key in keys)


def _telling_tensors(index: ExpertIndex) -> list[Tensor]:
    """Routers and norms of the first and last MoE layer and the output norm, by name."""
    ends = {index.moe_layers[0], index.moe_layers[-1]}
    layers = "|".join(map(str, sorted(ends)))
    router = re.compile(rf"blk\.({layers})\.ffn_gate_inp\.weight")
    norm = re.compile(rf"(blk\.({layers})\..*norm.*|output_norm)\.weight")
    found = [
        tensor
        for tensor in index.tensors
        if router.fullmatch(tensor.name)
        or (tensor.ggml_type == _F32 and len(tensor.shape) == 1 and norm.fullmatch(tensor.name))
    ]
    return sorted(found, key=lambda tensor: tensor.name)


def _hash_bytes(index: ExpertIndex, tensor: Tensor, into: hashlib._Hash) -> None:
    path = index.files[tensor.file]
    left = tensor.n_bytes
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise ModelFileError(
                        f"{path} ends within tensor {tensor.name}, {left} bytes early; it became shorter since it was"
                        " opened, download or copy it again"
                    )
                into.update(chunk)
                left -= len(chunk)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelFileError(f"{path} cannot be read: {reason}; check the path and the disk") from None


def _label(text: str) -> str:
    """Text from a model file as it may be printed and stored."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_NAME])
