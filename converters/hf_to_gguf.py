"""A Hugging Face checkpoint to a GGUF: all tensors are planned from headers, then they stream, a few rows at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy.typing as npt
from gguf.constants import GGML_QUANT_VERSION, MODEL_ARCH_NAMES, GGMLQuantizationType, Keys

from edgemoe.converters.checkpoint import Checkpoint
from edgemoe.converters.families import family_of
from edgemoe.converters.family import Family
from edgemoe.converters.gguf_file import GgufFile, Metadata, TensorInfo
from edgemoe.converters.quantize import FILE_TYPES, FileType, quantized, tensor_bytes, tensor_type
from edgemoe.converters.recipe import Part, Recipe, Stored
from edgemoe.converters.values import text, u32
from edgemoe.converters.vocabulary import vocabulary_metadata
from edgemoe.errors import ConvertError
from edgemoe.ggml_types import type_name

__all__ = ["Conversion", "convert_checkpoint"]

_RUN_WEIGHTS = 8 << 20
"""Weights that one thread works on at once: 32 MiB of float32."""
_BYTES_IN_FLIGHT = 512 << 20
"""What all threads may hold together, estimated; one run is always worked on, whatever it takes."""

Packed = npt.NDArray[Any]
"""Bytes of a GGUF, or numbers that are laid out like them."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    Attributes
    ----------
    path : Path
        The GGUF.
    family, architecture : str
        What people call the model, what llama.cpp calls it.
    n_tensors, n_bytes : int
        Tensors, and size of the file.
    types : dict of str to int
        ggml type -> number of tensors.
    resumed : int
        Tensors that were there from an interrupted run.
    notes : tuple of str
        What to know of it, one sentence each.
    """

    path: Path
    family: str
    architecture: str
    n_tensors: int
    n_bytes: int
    types: dict[str, int]
    resumed: int
    notes: tuple[str, ...]


def convert_checkpoint(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    type_: str,
    *,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Convert a checkpoint of a Mixture-of-Experts model.

    Memory does not depend on the size of the model: threads work on runs of rows, or on one expert at a time. An
    interrupted conversion goes on where it stopped when it is started again.

    Parameters
    ----------
    folder : Path
        With ``config.json``, safetensors and a tokenizer.
    output : Path
        The GGUF to write; it appears when it is complete.
    type_ : str
        Key of `FILE_TYPES`.
    force : bool
        Whether an existing output may be replaced.
    on_progress : callable, optional
        Called with the bytes of tensor data that are written and those of all tensors.

    Raises
    ------
    ConvertError
        If the checkpoint cannot be converted, with the reason, or the output cannot be written.
    """
    file_type = FILE_TYPES.get(type_)
    if file_type is None:
        raise ConvertError(f"there is no type {type_!r}; give one of {', '.join(FILE_TYPES)}")
    with Checkpoint(folder) as checkpoint:
        family = family_of(checkpoint)
        recipes = family.recipes()
        tensors = [_info(recipe, file_type) for recipe in recipes]
        metadata = _metadata(checkpoint, family, file_type)
        total, done = sum(tensor.n_bytes for tensor in tensors), 0
        with GgufFile(output, metadata, tensors, sources=checkpoint.files, force=force) as file, _Threads() as threads:
            resumed = len(file.done)
            for recipe, tensor in zip(recipes, tensors, strict=True):
                chunks = _chunks(checkpoint, recipe, GGMLQuantizationType(tensor.ggml_type), threads)

                def counted(chunks: Iterable[Packed] = chunks, start: int = done) -> Iterator[memoryview]:
                    for chunk in chunks:
                        yield chunk.data
                        start += chunk.nbytes
                        if on_progress:
                            on_progress(start, total)

                file.write(tensor.name, counted())
                done += tensor.n_bytes
            file.finish()
            n_bytes = file.file_size
    types: dict[str, int] = {}
    for tensor in tensors:
        name = type_name(tensor.ggml_type)
        types[name] = types.get(name, 0) + 1
    notes = (*family.notes, *_fallback_notes(tensors, file_type))
    architecture = MODEL_ARCH_NAMES[family.architecture]
    return Conversion(Path(output), family.title, architecture, len(tensors), n_bytes, types, resumed, notes)


class _Threads:
    """Threads that compute results in order, with a bound on what they hold; a context manager."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0))))

    def ordered(self, jobs: Iterable[tuple[int, Callable[[], Packed]]]) -> Iterator[Packed]:
        """Give the results of jobs, each with the bytes that it holds meanwhile."""
        waiting: deque[tuple[int, Future[Packed]]] = deque()
        held = 0
        try:
            for n_bytes, job in jobs:
                while waiting and held + n_bytes > _BYTES_IN_FLIGHT:
                    held -= waiting[0][0]
                    yield waiting.popleft()[1].result()
                waiting.append((n_bytes, self._pool.submit(job)))
                held += n_bytes
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _info(recipe: Recipe, file_type: FileType) -> TensorInfo:
    kind = GGMLQuantizationType.MXFP4 if recipe.mxfp4 else tensor_type(recipe.name, recipe.shape, file_type)
    return TensorInfo(recipe.name, recipe.shape[::-1], kind, tensor_bytes(kind, recipe.shape))


def _metadata(checkpoint: Checkpoint, family: Family, file_type: FileType) -> Metadata:
    return {
        Keys.General.ARCHITECTURE: text(MODEL_ARCH_NAMES[family.architecture]),
        Keys.General.TYPE: text("model"),
        Keys.General.NAME: text(_name(checkpoint.folder)),
        Keys.General.FILE_TYPE: u32(file_type.number),
        Keys.General.QUANTIZATION_VERSION: u32(GGML_QUANT_VERSION),
        **family.metadata(),
        **vocabulary_metadata(checkpoint.folder, MODEL_ARCH_NAMES[family.architecture], family.n_vocab),
    }


def _name(folder: Path) -> str:
    """Name of the model: of its folder, or of the repository where the folder is a snapshot in a hub's cache."""
    path = folder.absolute()
    repository = next((part for part in path.parts if part.startswith("models--")), None)
    return path.resolve().name if repository is None else repository.rpartition("--")[2]


def _chunks(checkpoint: Checkpoint, recipe: Recipe, kind: GGMLQuantizationType, threads: _Threads) -> Iterator[Packed]:
    """Give the data of a tensor, in order."""
    if recipe.given is not None:
        return iter([quantized(recipe.given, kind, recipe.name)])

    def job(part: Part, start: int, stop: int) -> tuple[int, Callable[[], Packed]]:
        # As stored, as float32, a copy, the result: about four times float32 where it is changed as a whole.
        n_bytes = 4 * prod(part.shape[1:]) * (stop - start)
        if not isinstance(part, Stored):
            return n_bytes, lambda: part.packed(checkpoint)
        if part.change is None and part.tensor.dtype == kind.name:
            return n_bytes, lambda: part.stored(checkpoint, start, stop)
        held = 2 * n_bytes if part.change is None else 4 * n_bytes
        return held, lambda: quantized(part.floats(checkpoint, start, stop), kind, recipe.name)

    return threads.ordered(job(*run) for run in recipe.runs(_RUN_WEIGHTS))


def _fallback_notes(tensors: Iterable[TensorInfo], file_type: FileType) -> Iterator[str]:
    kinds = {file_type.matrices, file_type.embeddings, GGMLQuantizationType.F32, GGMLQuantizationType.MXFP4}
    others = [tensor for tensor in tensors if tensor.ggml_type not in kinds]
    for kind in sorted({tensor.ggml_type for tensor in others}):
        found = [tensor for tensor in others if tensor.ggml_type == kind]
        yield (
            f"{len(found)} tensors ({found[0].name}, ...) are {type_name(kind)}: rows of {found[0].shape[0]} weights"
            f" do not fit the blocks of {type_name(file_type.matrices)}."
        )
