"""How each tensor of a GGUF is made of tensors of a checkpoint: whole rows, one part after another.

A recipe says what to read, not how: nothing is read before the tensor is written, and then a few rows or one expert at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.converters.checkpoint import Checkpoint, Floats, StoredTensor
from edgemoe.errors import ConvertError

__all__ = ["Change", "Mxfp4", "Part", "Recipe", "Shape", "Stored"]

Shape = tuple[int, ...]
Change = Callable[[Floats], Floats]

_BLOCK_WEIGHTS = 32  # of MXFP4
_BLOCK_BYTES = 17


@dataclass(frozen=True, slots=True)
class Stored:
    """Weights of a stored tensor.

    Attributes
    ----------
    tensor : StoredTensor
        Where they are.
    expert : int or None
        Item of the leading axis that is meant, where all experts are in one tensor.
    rows : slice or None
        Which rows of the tensor, or of the expert; None is all.
    change : callable or None
        What they go through, all rows at once. The result may have another shape.
    shape : tuple of int
        Of the result, the contiguous extent last.
    """

    tensor: StoredTensor
    shape: Shape
    expert: int | None = None
    rows: slice | None = None
    change: Change | None = None

    @property
    def origin(self) -> StoredTensor:
        """What to blame."""
        return self.tensor

    def floats(self, checkpoint: Checkpoint, start: int, stop: int) -> Floats:
        """Read rows ``start:stop`` of the result."""
        if self.change is not None:
            changed = self.change(checkpoint.floats(self._expert()))
            return np.ascontiguousarray(changed.reshape(self.shape)[start:stop], np.float32)
        rows: Floats = self._rows(checkpoint.floats, start, stop)
        return rows

    def stored(self, checkpoint: Checkpoint, start: int, stop: int) -> npt.NDArray[Any]:
        """Read rows ``start:stop`` as they are stored; only of a part that nothing changes."""
        assert self.change is None
        rows: npt.NDArray[Any] = self._rows(checkpoint.checked, start, stop)
        return rows

    def _rows(self, read: Callable[[StoredTensor, int, int], npt.NDArray[Any]], start: int, stop: int) -> Any:
        tensor = self._expert()
        wanted = range(tensor.shape[0])[self.rows or slice(None)][start:stop]
        return np.ascontiguousarray(read(tensor, wanted.start, wanted[-1] + 1)[:: wanted.step])

    def _expert(self) -> StoredTensor:
        """Give the tensor, or the item of its leading axis that is meant, as a tensor of its own."""
        tensor = self.tensor
        if self.expert is None:
            return tensor
        n_bytes = tensor.n_bytes // tensor.shape[0]
        offset = tensor.offset + self.expert * n_bytes
        return StoredTensor(tensor.name, tensor.dtype, tensor.shape[1:], tensor.path, offset, n_bytes)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """One expert in gpt-oss's MXFP4, which goes into ggml's MXFP4 bit for bit.

    Attributes
    ----------
    blocks : StoredTensor
        uint8 [n_expert, rows, blocks, 16]: two weights a byte, neighbours together, the first in the low half.
    scales : StoredTensor
        uint8 [n_expert, rows, blocks]: E8M0 exponents.
    """

    blocks: StoredTensor
    scales: StoredTensor
    expert: int
    rows: slice

    @property
    def origin(self) -> StoredTensor:
        """What to blame."""
        return self.blocks

    @property
    def shape(self) -> Shape:
        """Rows and weights of the expert."""
        _, n_rows, n_blocks, _ = self.blocks.shape
        return len(range(n_rows)[self.rows]), n_blocks * _BLOCK_WEIGHTS

    def packed(self, checkpoint: Checkpoint) -> npt.NDArray[np.uint8]:
        """Read the expert as ggml's block_mxfp4: a scale, then 16 bytes with weight i low and weight i + 16 high."""
        pairs = checkpoint.raw(self.blocks, self.expert, self.expert + 1)[0, self.rows]
        scales = checkpoint.raw(self.scales, self.expert, self.expert + 1)[0, self.rows]
        if (scales == 255).any():
            raise ConvertError(f"{self.scales} has a scale that is NaN; the checkpoint is damaged, download it again")
        weights = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*scales.shape, _BLOCK_WEIGHTS)
        packed = np.empty((*scales.shape, _BLOCK_BYTES), np.uint8)
        packed[..., 0] = scales
        packed[..., 1:] = weights[..., :16] | weights[..., 16:] << 4
        return packed


Part = Stored | Mxfp4


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor to write.

    Attributes
    ----------
    name : str
        Its name in the GGUF.
    shape : tuple of int
        Extents, the contiguous one last (the reverse of ggml's order).
    parts : tuple of Part
        Where its rows come from, in order: all of one kind.
    given : float32 array or None
        In place of parts: weights that follow from the config alone.
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    given: Floats | None = None

    @property
    def mxfp4(self) -> bool:
        """Whether it is MXFP4 already and stays so."""
        return any(isinstance(part, Mxfp4) for part in self.parts)

    def runs(self, n_weights: int) -> Iterator[tuple[Part, int, int]]:
        """Cut the parts into runs of rows, ``(part, start, stop)``, of about `n_weights` each.

        A part that is changed as a whole, or is MXFP4, is not cut.
        """
        for part in self.parts:
            n_rows = part.shape[0] if part.shape else 1
            step = max(1, n_weights // max(1, prod(part.shape[1:])))
            if not isinstance(part, Stored) or part.change is not None:
                step = n_rows
            for start in range(0, n_rows, step):
                yield part, start, min(start + step, n_rows)
