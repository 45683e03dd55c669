"""GGUF header(s) -> `ExpertIndex`: which file, offset and size every expert's gate, up and down slice has."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from edgemoe.errors import ModelFileError, NotMoEError
from edgemoe.expert_offsets import EXPERT_NAME, check_offsets, has_offsets
from edgemoe.ggml_types import type_blocks, type_name
from edgemoe.gguf_header import GGUFHeader, TensorInfo, Value
from edgemoe.hparams import HParams, read_architecture, read_hparams
from edgemoe.memory import page_size
from edgemoe.split_files import read_headers

__all__ = ["ExpertIndex", "ExpertTensor", "Tensor", "read_index"]

_ONE_TENSOR_PER_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight", re.ASCII)
_LAYER_NAME = re.compile(r"blk\.(\d{1,9})\.", re.ASCII)
# Of the layers that predict further tokens, llama.cpp skips everything, but for these architectures.
_LOADS_PREDICTION_HEADS = frozenset({"cohere2moe", "hy_v3", "step35"})
_PREDICTION_HEAD = re.compile(r"blk\.\d+\.nextn\.(embed_tokens|shared_head_head|shared_head_norm)\.weight")
_K_QUANT = re.compile(r"(Q\d_K)_([SML])")
_K_QUANT_SIZES = {"S": "Small", "M": "Medium", "L": "Large"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor every token may need (not an expert tensor).

    Attributes
    ----------
    name : str
        Tensor name.
    file : int
        Position of its file in `ExpertIndex.files`.
    offset, n_bytes : int
        Its data within that file, in bytes.
    ggml_type : int
        ggml's type id.
    type_name : str
        ggml's name of that type.
    shape : tuple of int
        Extents in ggml order, ne[0] first.
    """

    name: str
    file: int
    offset: int
    n_bytes: int
    ggml_type: int
    type_name: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, ne[0] elements."""
        return self.n_bytes // math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One of the stacked matrices of all experts of a layer; expert i lies at ``offset + i * slab_bytes``.

    Attributes
    ----------
    name : str
        Tensor name.
    layer : int
        Layer (``blk.<layer>``).
    part : str
        ``gate``, ``up``, ``down`` or ``gate_up``.
    file : int
        Position of its file in `ExpertIndex.files`.
    offset, n_bytes : int
        Its data within that file, in bytes.
    n_expert : int
        Experts in it.
    ggml_type : int
        ggml's type id.
    type_name : str
        ggml's name of that type.
    shape : tuple of int
        (weights per row, rows per expert, n_expert).
    """

    name: str
    layer: int
    part: str
    file: int
    offset: int
    n_bytes: int
    n_expert: int
    ggml_type: int
    type_name: str
    shape: tuple[int, ...]

    @property
    def slab_bytes(self) -> int:
        """Bytes of one expert's share, which is also the stride from one expert to the next."""
        return self.n_bytes // self.n_expert


@dataclass(frozen=True)
class ExpertIndex:
    """What edgemoe knows of a model before anything is loaded.

    Attributes
    ----------
    path : Path
        The file given (the first part of a split model).
    files : tuple of Path
        All parts, in order.
    architecture, name : str
        ``general.architecture``, and ``general.name`` (the file's stem without one).
    n_layer : int
        Layers that llama.cpp runs (without trailing next-token-prediction layers).
    n_expert : int
        Routed experts of each MoE layer.
    n_expert_used : tuple of int
        Experts per token (top-k) of each of the n_layer layers, dense ones included.
    n_expert_shared, n_expert_group, n_group_used : int
        Shared experts, expert groups and groups per token; 0 where the model has none.
    leading_dense : int
        Leading layers without experts, as the file states it.
    context_length, n_vocab, n_embd : int
        Trained context in tokens, vocabulary size, width of the residual stream.
    quantization : str
        ``general.file_type`` as llama.cpp words it ("Q4_K - Medium"), else the type with the most bytes.
    tensors : tuple of Tensor
        Everything that is not an expert tensor.
    experts : tuple of ExpertTensor
        Expert tensors of the n_layer layers, in file order.
    skipped : tuple of str
        Tensors of trailing next-token-prediction layers, which llama.cpp does not load.
    has_chat_template : bool
        Whether the file carries a chat template.
    metadata : Mapping
        Metadata of the first file.
    file_bytes : int
        Bytes of all parts.
    """

    path: Path
    files: tuple[Path, ...]
    architecture: str
    name: str
    n_layer: int
    n_expert: int
    n_expert_used: tuple[int, ...]
    n_expert_shared: int
    n_expert_group: int
    n_group_used: int
    leading_dense: int
    context_length: int
    n_vocab: int
    n_embd: int
    quantization: str
    tensors: tuple[Tensor, ...]
    experts: tuple[ExpertTensor, ...]
    skipped: tuple[str, ...]
    has_chat_template: bool
    metadata: Mapping[str, Value]
    file_bytes: int

    def using(self, k: int) -> ExpertIndex:
        """Give it with so many experts per token in every layer, as llama.cpp's ``expert_used_count`` can override."""
        return replace(self, n_expert_used=(k,) * self.n_layer)

    @property
    def running_layers(self) -> tuple[int, ...]:
        """MoE layers whose routers see every token of a prompt.

        llama.cpp computes the model's last layer only for tokens whose logits are wanted.
        """
        return tuple(layer for layer in self.moe_layers if layer != self.n_layer - 1)

    @cached_property
    def largest_file(self) -> Path:
        """The part that has most of the experts, as a rule; the first one of a split model may have none."""
        return max(self.files, key=lambda path: path.stat().st_size)

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of all tensors that are not expert tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all expert tensors."""
        return sum(tensor.n_bytes for tensor in self.experts)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have routed experts, ascending."""
        return tuple(sorted(self._expert_sizes))

    @cached_property
    def token_table(self) -> Tensor | None:
        """The token embedding, where nothing but looking up a token's row is done with it; else None.

        Without an output matrix of its own, a model multiplies by it for each token.
        """
        named = {tensor.name: tensor for tensor in self.tensors}
        return named.get("token_embd.weight") if "output.weight" in named else None

    def expert_size(self, layer: int) -> int:
        """Bytes of one expert of a layer, all its parts together.

        Raises
        ------
        KeyError
            If the layer has no experts.
        """
        return self._expert_sizes[layer]

    @cached_property
    def token_cycle_bytes(self) -> int:
        """Bytes of the experts that one token uses, summed over all MoE layers."""
        return sum(self.n_expert_used[layer] * size for layer, size in self._expert_sizes.items())

    @cached_property
    def aligned_slabs(self) -> float:
        """Share of expert slabs that start on a page boundary of the file, 0 to 1."""
        page = page_size()
        starts = [e.offset + i * e.slab_bytes for e in self.experts for i in range(e.n_expert)]
        return sum(start % page == 0 for start in starts) / len(starts)

    @cached_property
    def _expert_sizes(self) -> dict[int, int]:
        sizes: Counter[int] = Counter()
        for tensor in self.experts:
            sizes[tensor.layer] += tensor.slab_bytes
        return dict(sizes)


def read_index(path: str | os.PathLike[str]) -> ExpertIndex:
    """Read the header(s) of a model and find every expert in it.

    Parameters
    ----------
    path : str or path-like
        A GGUF file, or the first part of a split model; the other parts are found beside it.

    Returns
    -------
    ExpertIndex
        Sound: every slab lies within its file, and every MoE layer is complete.

    Raises
    ------
    NotMoEError
        If the model has no routed experts.
    UnknownArchitectureError
        If the pinned llama.cpp does not load the architecture.
    ModelFileError
        If a file is missing, unreadable, damaged or contradicts itself.
    """
    headers = read_headers(path)
    first = headers[0]
    architecture = read_architecture(first)
    names = {tensor.name for header in headers for tensor in header.tensors}
    if not any(map(EXPERT_NAME.fullmatch, names)):
        _refuse_without_experts(first, architecture, names)
    hparams = read_hparams(first, architecture, names)
    if has_offsets(first.metadata, len(headers)):
        check_offsets(first, hparams.n_expert)
    tensors: list[Tensor] = []
    experts: list[ExpertTensor] = []
    skipped: list[str] = []
    for file, header in enumerate(headers):
        for info in header.tensors:
            layer = _LAYER_NAME.match(info.name)
            expert = EXPERT_NAME.fullmatch(info.name)
            if layer and _is_skipped(architecture, info.name, int(layer[1]), hparams):
                skipped.append(info.name)
            elif expert:
                experts.append(_expert_tensor(header, file, info, int(expert[1]), expert[2], hparams))
            else:
                kind = info.ggml_type
                tensors.append(Tensor(info.name, file, info.offset, info.n_bytes, kind, type_name(kind), info.shape))
    if not experts:
        raise NotMoEError(
            f"{first.path} has experts in next-token-prediction layers only, which llama.cpp does not run by"
            " themselves; give the file of the main model"
        )
    _check_layers_complete(first, experts)
    return ExpertIndex(
        path=first.path,
        files=tuple(header.path for header in headers),
        architecture=architecture,
        name=hparams.name,
        n_layer=hparams.n_layer,
        n_expert=hparams.n_expert,
        n_expert_used=hparams.n_expert_used,
        n_expert_shared=hparams.n_expert_shared,
        n_expert_group=hparams.n_expert_group,
        n_group_used=hparams.n_group_used,
        leading_dense=hparams.leading_dense,
        context_length=hparams.context_length,
        n_vocab=hparams.n_vocab,
        n_embd=hparams.n_embd,
        quantization=_quantization(first, [*tensors, *experts]),
        tensors=tuple(tensors),
        experts=tuple(experts),
        skipped=tuple(skipped),
        has_chat_template=hparams.has_chat_template,
        metadata=first.metadata,
        file_bytes=sum(header.file_size for header in headers),
    )


def _refuse_without_experts(header: GGUFHeader, architecture: str, names: Iterable[str]) -> None:
    if any(map(_ONE_TENSOR_PER_EXPERT.fullmatch, names)):
        raise ModelFileError(
            f"{header.path} keeps every expert in a tensor of its own, an old layout that llama.cpp itself no"
            " longer reads; convert the model again from its original weights"
        )
    raise NotMoEError(
        f"{header.path} is a dense model (architecture {architecture}, no expert tensors); edgemoe is for"
        " Mixture-of-Experts models, run it with plain llama.cpp"
    )


def _is_skipped(architecture: str, name: str, layer: int, hparams: HParams) -> bool:
    if not hparams.n_layer <= layer < hparams.n_layer_all:
        return False
    return architecture not in _LOADS_PREDICTION_HEADS or _PREDICTION_HEAD.fullmatch(name) is None


def _expert_tensor(
    header: GGUFHeader, file: int, info: TensorInfo, layer: int, part: str, hparams: HParams
) -> ExpertTensor:
    where, again = (
        f"{header.path} has tensor {info.name}",
        "the file is damaged, download or convert it again",
    )
    if layer >= hparams.n_layer_all:
        raise ModelFileError(f"{where} but says it has {hparams.n_layer_all} layers; {again}")
    if len(info.shape) != 3 or info.shape[2] != hparams.n_expert:
        raise ModelFileError(
            f"{where} of shape {info.shape}, expected three dimensions, the last of {hparams.n_expert} experts; {again}"
        )
    rows = info.shape[1] * info.shape[2]
    # The size of an unknown type is known to the alignment only: exact if just one multiple of the rows fits.
    if info.n_bytes % hparams.n_expert or (type_blocks(info.ggml_type) is None and rows < header.alignment):
        raise ModelFileError(
            f"{where} of {type_name(info.ggml_type)} whose {info.n_bytes} bytes cannot be divided among"
            f" {hparams.n_expert} experts; use another quantization"
        )
    if hparams.n_expert_used[layer] == 0:
        raise ModelFileError(f"{where} in a layer said to use 0 experts per token; {again}")
    kind = info.ggml_type
    return ExpertTensor(
        name=info.name,
        layer=layer,
        part=part,
        file=file,
        offset=info.offset,
        n_bytes=info.n_bytes,
        n_expert=hparams.n_expert,
        ggml_type=kind,
        type_name=type_name(kind),
        shape=info.shape,
    )


def _check_layers_complete(header: GGUFHeader, experts: Iterable[ExpertTensor]) -> None:
    parts: dict[int, set[str]] = {}
    for tensor in experts:
        parts.setdefault(tensor.layer, set()).add(tensor.part)
    for layer, found in sorted(parts.items()):
        # The gate is optional: nemotron_h and nomic-bert-moe have none.
        missing = "down" if "down" not in found else "up" if not found & {"up", "gate_up"} else None
        if missing:
            raise ModelFileError(
                f"{header.path} has no tensor blk.{layer}.ffn_{missing}_exps.weight beside the other experts"
                " of that layer; the file is incomplete, download or convert it again"
            )


def _quantization(header: GGUFHeader, tensors: Iterable[Tensor | ExpertTensor]) -> str:
    from gguf.constants import Keys, LlamaFileType

    stated = header.metadata.get(Keys.General.FILE_TYPE)
    if type(stated) is int:
        try:
            name = LlamaFileType(stated & ~LlamaFileType.GUESSED).name
        except ValueError:
            pass
        else:
            name = name.removeprefix("MOSTLY_").removeprefix("ALL_")
            k_quant = _K_QUANT.fullmatch(name)
            return f"{k_quant[1]} - {_K_QUANT_SIZES[k_quant[2]]}" if k_quant else name
    weight: Counter[str] = Counter()
    for tensor in tensors:
        weight[tensor.type_name] += tensor.n_bytes
    return weight.most_common(1)[0][0]
