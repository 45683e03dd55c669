"""A GGUF file made of another one's tensors: in another order, and of each layer's experts only some, renumbered.

What has a share for each expert along its last axis (ggml's order) is copied share by share: the expert matrices and
their biases and scales, the router's rows and biases, the selection bias. All else is copied whole.

Where a file comes from stands in its metadata, see docs/gguf-keys.md: `SOURCE_ROUTER` and `SOURCE_QUANTIZATION`, the
hashes of `edgemoe.fingerprint`, `SOURCE_TASK` and `SOURCE_CRITERION`, and `SOURCE_EXPERTS`, the number that each expert
had in the source.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from edgemoe.converters.gguf_file import GgufFile
from edgemoe.converters.gguf_layout import Metadata, RawValue, TensorInfo, Value, lay_out
from edgemoe.converters.stock_model import StockModel
from edgemoe.errors import ConvertError
from edgemoe.expert_offsets import OFFSETS, STRIDES, expert_offsets
from edgemoe.fingerprint import fingerprint
from edgemoe.gguf_header import TensorInfo as StockTensor
from edgemoe.index import ExpertIndex
from edgemoe.pattern import Pattern

__all__ = [
    "SOURCE_CRITERION",
    "SOURCE_EXPERTS",
    "SOURCE_QUANTIZATION",
    "SOURCE_ROUTER",
    "SOURCE_TASK",
    "CopiedTensor",
    "Experts",
    "copied_tensors",
    "provenance",
    "with_index",
    "write_copy",
]

SOURCE_ROUTER = "edgemoe.source.router"
SOURCE_QUANTIZATION = "edgemoe.source.quantization"
SOURCE_TASK = "edgemoe.source.task"
SOURCE_CRITERION = "edgemoe.source.criterion"
SOURCE_EXPERTS = "edgemoe.source.experts"

_BY_EXPERT = re.compile(
    r"blk\.(\d+)\.(ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale|input_scale)|ffn_gate_inp\.(weight|bias)"
    r"|exp_probs_b(\.bias)?)",
    re.ASCII,
)
# Tensors that tie expert numbers to something else: experts in chunks, a table from tokens to experts.
_NUMBERED = re.compile(r"blk\.\d+\.(ffn_(gate|up|down)_chexps|ffn_gate_tid2eid)\.weight", re.ASCII)

Experts = Mapping[int, Sequence[int]]
"""Layer -> numbers in the source of the experts that the new file holds, in their new order."""


@dataclass(frozen=True, slots=True)
class CopiedTensor:
    """A tensor of the new file.

    Attributes
    ----------
    source : edgemoe.gguf_header.TensorInfo
        What it is made of.
    experts : tuple of int or None
        Shares along the last axis that it holds, in order; None for all of it as it is.
    """

    source: StockTensor
    experts: tuple[int, ...] | None = None

    @property
    def info(self) -> TensorInfo:
        """How it is described in the new file."""
        name, shape, kind, n_bytes = self.source.name, self.source.shape, self.source.ggml_type, self.source.n_bytes
        if self.experts is None:
            return TensorInfo(name, shape, kind, n_bytes)
        n_kept = len(self.experts)
        return TensorInfo(name, (*shape[:-1], n_kept), kind, n_bytes // shape[-1] * n_kept)

    def pieces(self, most: int = 4 << 20) -> Iterator[tuple[int, int]]:
        """Start and size of each piece of the source's data, in the new order.

        Pieces are whole rows, or experts' shares of one, of `most` bytes unless a single row is longer.
        """
        n_bytes, shape = self.source.n_bytes, self.source.shape
        if self.experts is None:
            yield from _split(0, n_bytes, n_bytes // prod(shape[1:]), most)
            return
        share = n_bytes // shape[-1]
        row = share // prod(shape[1:-1])
        for first, n_experts in _runs(self.experts):
            yield from _split(first * share, n_experts * share, row, most)

    def chunks(self, model: StockModel) -> Iterator[bytes]:
        """Read the new tensor's data from the source."""
        for start, n_bytes in self.pieces():
            yield model.read(self.source.name, start, n_bytes)


def copied_tensors(model: StockModel, index: ExpertIndex, experts: Experts | None = None) -> list[CopiedTensor]:
    """Give the tensors of a copy, in file order.

    Parameters
    ----------
    model : StockModel
        The source.
    index : ExpertIndex
        Of the same source.
    experts : Experts, optional
        Of every MoE layer, equally many. Prediction layers, which llama.cpp does not run, keep their first ones. By
        default all tensors are copied as they are.

    Raises
    ------
    ConvertError
        If expert numbers of this model cannot change, or a tensor has no share for each expert.
    """
    if experts is None:
        return [CopiedTensor(tensor) for tensor in model.tensors.values()]
    path, n_expert = index.path, index.n_expert
    first = range(len(next(iter(experts.values()))))
    copied = []
    for name, tensor in model.tensors.items():
        if _NUMBERED.fullmatch(name):
            raise ConvertError(
                f"{path} has tensor {name}, which ties experts to their numbers ({index.architecture}); keep all in"
                " their order"
            )
        found = _BY_EXPERT.fullmatch(name)
        if not found or (tensor.shape == (1,) and n_expert > 1):
            copied.append(CopiedTensor(tensor))
            continue
        if tensor.shape[-1] != n_expert or tensor.n_bytes % n_expert:
            raise ConvertError(
                f"{path} has tensor {name} of shape {tensor.shape}, expected {n_expert} experts as the last extent; the"
                " file is damaged, download or convert it again"
            )
        copied.append(CopiedTensor(tensor, tuple(experts.get(int(found[1]), first))))
    return copied


def provenance(index: ExpertIndex, pattern: Pattern, experts: Experts) -> Metadata:
    """Say in metadata which file's experts these are, and by which task they were chosen."""
    source = fingerprint(index)
    numbers = [number for layer in index.moe_layers for number in experts[layer]]
    text = GGUFValueType.STRING
    return {
        SOURCE_ROUTER: Value(source.router, text),
        SOURCE_QUANTIZATION: Value(source.quantization, text),
        SOURCE_TASK: Value(pattern.task, text),
        SOURCE_CRITERION: Value(pattern.criterion, text),
        SOURCE_EXPERTS: Value(numbers, GGUFValueType.ARRAY, GGUFValueType.INT32),
    }


def with_index(
    metadata: Mapping[str, Value | RawValue], tensors: Sequence[CopiedTensor], n_expert: int, alignment: int
) -> dict[str, Value | RawValue]:
    """Add the index of expert offsets (`edgemoe.expert_offsets`) to metadata."""
    infos = [tensor.info for tensor in tensors]
    layout = lay_out({}, infos, alignment=alignment)
    starts = [offset - len(layout.header) for offset in layout.offsets]
    numbers = expert_offsets([info.name for info in infos], starts, [info.n_bytes for info in infos], n_expert)
    stored = [Value(items, GGUFValueType.ARRAY, GGUFValueType.UINT64) for items in numbers]
    return {**metadata, **dict(zip((OFFSETS, STRIDES), stored, strict=True))}


def write_copy(
    model: StockModel,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Value | RawValue],
    tensors: Sequence[CopiedTensor],
    *,
    alignment: int = GGUF_DEFAULT_ALIGNMENT,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the new file, see `GgufFile`; `on_progress` takes the bytes of tensors done and their total.

    Raises
    ------
    ConvertError, ModelFileError
        Whatever keeps the file from being written or the source from being read.
    """
    infos = [tensor.info for tensor in tensors]
    total = sum(info.n_bytes for info in infos)
    done = 0
    with GgufFile(path, metadata, infos, alignment=alignment, sources=model.files, force=force) as file:
        for tensor, info in zip(tensors, infos, strict=True):
            if info.name in file.done:
                done += info.n_bytes
                continue
            chunks = tensor.chunks(model)
            if on_progress is not None:
                chunks = _counted(chunks, done, total, on_progress)
            file.write(info.name, chunks)
            done += info.n_bytes
        file.finish()
    return file.path


def _counted(
    chunks: Iterator[bytes], done: int, total: int, on_progress: Callable[[int, int], None]
) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        on_progress(done, total)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First number and length of each run of consecutive ascending numbers."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], at - start
            start = at


def _split(start: int, n_bytes: int, row: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a range into pieces of whole rows."""
    piece = max(1, most // row) * row
    for at in range(start, start + n_bytes, piece):
        yield at, min(piece, start + n_bytes - at)
