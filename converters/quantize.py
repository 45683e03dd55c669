"""Which ggml type each tensor gets, and rows of float32 turned into it by llama.cpp's own quantizer.

The choice follows llama.cpp's reference converter (what stays float32) and its quantizer (`tensor_type_fallback`). In a
K-quantized file every matrix is of the one type, except that token embeddings and the output get Q6_K, which costs
little in a model that is mostly experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import LlamaFileType

from edgemoe.converters.checkpoint import Floats
from edgemoe.converters.recipe import Shape
from edgemoe.errors import ConvertError
from edgemoe.ggml_types import type_blocks, type_name
from edgemoe.llama_library import quantize_rows

__all__ = ["FILE_TYPES", "FileType", "quantized", "tensor_bytes", "tensor_type"]


@dataclass(frozen=True, slots=True)
class FileType:
    """What ``--type`` stands for.

    Attributes
    ----------
    matrices, embeddings : GGMLQuantizationType
        Type of the matrices, and of token embeddings and output.
    number : LlamaFileType
        ``general.file_type``.
    """

    matrices: Type
    embeddings: Type
    number: LlamaFileType


FILE_TYPES: Mapping[str, FileType] = {
    "f32": FileType(Type.F32, Type.F32, LlamaFileType.ALL_F32),
    "f16": FileType(Type.F16, Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": FileType(Type.BF16, Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": FileType(Type.Q8_0, Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": FileType(Type.Q6_K, Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k": FileType(Type.Q5_K, Type.Q6_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q4_k": FileType(Type.Q4_K, Type.Q6_K, LlamaFileType.MOSTLY_Q4_K_S),
    "q3_k": FileType(Type.Q3_K, Type.Q6_K, LlamaFileType.MOSTLY_Q3_K_S),
    "q2_k": FileType(Type.Q2_K, Type.Q6_K, LlamaFileType.MOSTLY_Q2_K),
}
"""Names that ``--type`` takes."""

# Routers and convolutions are small and decide much; what is no weight (biases, states) is added, never multiplied.
_KEPT_FLOAT = re.compile(
    r"(?<!\.weight)$|_norm\.weight$|ffn_gate_inp(_shexp)?\.weight$|(ssm_conv1d|shortconv\.conv)\.weight$"
)

# For rows that are no multiple of a K-quant's 256 weights.
_FALLBACKS = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}

_MAX_F16 = 65504.0


def tensor_type(name: str, shape: Shape, file_type: FileType) -> Type:
    """Type that a tensor of floats is stored as.

    Parameters
    ----------
    name : str
        Its name in the GGUF.
    shape : tuple of int
        Its extents, the contiguous one last.
    file_type : FileType
        What was asked for.
    """
    if len(shape) < 2 or _KEPT_FLOAT.search(name):
        return Type.F32
    kind = file_type.embeddings if name in ("token_embd.weight", "output.weight") else file_type.matrices
    for candidate in (kind, _FALLBACKS.get(kind, kind)):
        if shape[-1] % _blocks(candidate)[0] == 0:
            return candidate
    return Type.F16


def tensor_bytes(kind: Type, shape: Shape) -> int:
    """Size of a tensor's data in bytes."""
    return prod(shape[:-1]) * _row_bytes(kind, shape[-1])


def quantized(rows: Floats, kind: Type, name: str) -> npt.NDArray[np.uint8]:
    """Turn finite weights into a type.

    Parameters
    ----------
    rows : float32 [..., n_weights]
        Contiguous.
    kind : GGMLQuantizationType
        A type whose blocks fit the rows.
    name : str
        Of the tensor, for messages.

    Raises
    ------
    ConvertError
        If a weight is too large for the type.
    """
    # Quantized blocks have a float16 scale.
    if kind not in (Type.F32, Type.BF16) and rows.size and max(rows.max(), -rows.min()) > _MAX_F16:
        raise ConvertError(
            f"tensor {name} has weights above {_MAX_F16:.0f}, which {type_name(kind)} cannot hold; use --type bf16"
        )
    n_weights = rows.shape[-1] if rows.shape else 1
    return quantize_rows(kind, rows.reshape(-1, n_weights), _row_bytes(kind, n_weights))


def _row_bytes(kind: Type, n_weights: int) -> int:
    weights, n_bytes = _blocks(kind)
    return n_weights // weights * n_bytes


def _blocks(kind: Type) -> tuple[int, int]:
    blocks = type_blocks(kind)
    assert blocks is not None, "all types named here are known"
    return blocks
