"""A score that needs no text: how spread out each expert's weights are (AIMER)."""

from __future__ import annotations

import os
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from edgemoe.errors import ModelFileError
from edgemoe.index import ExpertIndex, ExpertTensor

__all__ = ["aimer"]


def aimer(index: ExpertIndex) -> npt.NDArray[np.float64]:
    """Score experts by their weights alone.

    AIMER ("absolute mean over root mean square importance for expert ranking", arXiv 2603.18492) of an expert is
    mean(abs(w)) / rms(w) over all its weights; the authors' code (github.com/ZongfangLiu/AIMER) removes the experts
    whose AIMER is *largest*, those with the flattest weights. We read "all its weights" as gate, up and down together,
    one vector. So that more is better here as for every other score, the result is 1 - AIMER: 0 for weights of one
    magnitude, 0.2 for normally distributed ones, towards 1 the fewer weights stand out.

    Memory is one expert's slab of one tensor, unpacked to float32, and as much again.

    Parameters
    ----------
    index : ExpertIndex
        The model; every expert tensor is read once, in file order.

    Returns
    -------
    float64 array [L, N]
        One row for each of ``index.moe_layers``; 0 for an expert whose weights are all zero. To be compared within a
        layer: the paper prunes all layers alike.

    Raises
    ------
    ModelFileError
        If the gguf package cannot unpack a tensor's type, a file cannot be read, or weights are infinite or no numbers.
    """
    row = {layer: i for i, layer in enumerate(index.moe_layers)}
    count, total, squares = np.zeros((3, len(row), index.n_expert))
    # A damaged scale makes infinities and NaN, which are refused below; numpy need not warn of each.
    with np.errstate(all="ignore"), ExitStack() as stack:
        try:
            files = [stack.enter_context(path.open("rb", buffering=0)).fileno() for path in index.files]
        except OSError as error:
            raise ModelFileError(f"{error.filename} cannot be read ({error.strerror}); check the model") from error
        for tensor in index.experts:
            for expert in range(tensor.n_expert):
                weights = _unpack(index, tensor, expert, files[tensor.file])
                cell = row[tensor.layer], expert
                count[cell] += weights.size
                total[cell] += np.abs(weights, out=weights).sum(dtype=np.float64)
                squares[cell] += np.square(weights, out=weights).sum(dtype=np.float64)
                if not np.isfinite(squares[cell]):
                    raise ModelFileError(
                        f"{index.files[tensor.file]} has weights that are infinite or no numbers in expert {expert} of"
                        f" {tensor.name}; the file is damaged, download or convert it again"
                    )
    rms = np.sqrt(squares / count)
    return np.asarray(1 - np.divide(total / count, rms, out=np.ones_like(rms), where=rms > 0))


def _unpack(index: ExpertIndex, tensor: ExpertTensor, expert: int, file: int) -> npt.NDArray[np.float32]:
    """Read one expert's share of a tensor and give its weights."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    path = index.files[tensor.file]
    try:
        data = os.pread(file, tensor.slab_bytes, tensor.offset + expert * tensor.slab_bytes)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}); check the disk") from error
    if len(data) != tensor.slab_bytes:
        raise ModelFileError(f"{path} became shorter while it was read; wait until it is written completely")
    rows = np.frombuffer(data, np.uint8).reshape(tensor.shape[1], -1)
    try:
        return np.array(dequantize(rows, GGMLQuantizationType(tensor.ggml_type)), np.float32)
    except (NotImplementedError, ValueError) as error:  # a type without unpacking, and one that gguf does not know
        raise ModelFileError(
            f"{path} has {tensor.name} as {tensor.type_name}, which the gguf package cannot unpack; score it with text"
            " (peu), or use another quantization"
        ) from error
