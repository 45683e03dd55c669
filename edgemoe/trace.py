"""What the router did with a piece of text: all its logits of a batch, and the few per token that are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemoe.atomic_file import atomic_file
from edgemoe.errors import TraceError

__all__ = ["ExpertOutputs", "RoutedTokens", "RouterTrace", "top_k"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.uint8 | np.uint16]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ExpertOutputs:
    """What the chosen experts gave, token by token; K is the widest layer's number of experts per token.

    Attributes
    ----------
    ids : int32 array [L, T, K]
        Experts the model really chose, which a selection bias may make others than those of the largest logits;
        -1 pads layers that choose fewer.
    weights : float32 array [L, T, K]
        Router weight g that the model multiplied the expert's output with, >= 0.
    norms : float32 array [L, T, K]
        Euclidean norm of the expert's output, before it is multiplied with g.
    change : float32 array [L, T]
        1 - cos(h before, h after the routed experts), clipped at 0; NaN where it is unknown.

    Raises
    ------
    TraceError
        If shapes do not fit, or a weight or norm of a chosen expert is negative or no number.
    """

    ids: npt.NDArray[np.int32]
    weights: Floats
    norms: Floats
    change: Floats

    def __post_init__(self) -> None:
        shape = self.ids.shape
        found = [(array.dtype.name, array.shape) for array in (self.ids, self.weights, self.norms, self.change)]
        floats = ("float32", shape)
        if len(shape) != 3 or found != [("int32", shape), floats, floats, ("float32", shape[:2])]:
            raise TraceError(
                f"ids, weights, norms and change of expert outputs are {found}, expected int32 and float32 arrays of"
                " one shape [layers, tokens, experts], and [layers, tokens] for change"
            )
        chosen = self.ids >= 0
        for name, values in (("weights", self.weights), ("norms", self.norms)):
            if not np.all((values >= 0) & np.isfinite(values), where=chosen):
                raise TraceError(f"{name} of chosen experts must be numbers >= 0; record the text again")


_OUTPUTS = tuple(field.name for field in fields(ExpertOutputs))


@dataclass(frozen=True, slots=True)
class RouterTrace:
    """A piece of text as the router saw it, one decode batch: T tokens, L MoE layers, N experts.

    Attributes
    ----------
    layers : tuple of int
        The model's number of each of the L layers, ascending.
    logits : float32 array [L, T, N]
        Raw router logits: before softmax or sigmoid and selection bias, with the router's own bias.
    outputs : ExpertOutputs or None
        What the chosen experts gave, if it was recorded.

    Raises
    ------
    TraceError
        If shapes do not fit.
    """

    layers: tuple[int, ...]
    logits: Floats
    outputs: ExpertOutputs | None = None

    def __post_init__(self) -> None:
        _check(self.layers, self.logits, self.outputs)


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """The record that is kept: the k_a largest logits of each token, 5 bytes each up to 256 experts.

    A token of 48 layers at k_a = 8 takes 1.9 kB, against 24.6 kB of all logits of 128 experts.

    Attributes
    ----------
    layers : tuple of int
        The model's number of each of the L layers, ascending.
    n_expert : int
        Routed experts of a layer, N.
    ids : uint8 (N <= 256) or uint16 array [L, T, k_a]
        Experts by descending logit, of equal ones the lower number first.
    logits : float32 array [L, T, k_a]
        Their raw logits.
    outputs : ExpertOutputs or None
        What the chosen experts gave, if it was recorded.

    Raises
    ------
    TraceError
        If shapes do not fit, an id is not below `n_expert`, or a logit is not finite.
    """

    layers: tuple[int, ...]
    n_expert: int
    ids: Ids
    logits: Floats
    outputs: ExpertOutputs | None = None

    def __post_init__(self) -> None:
        _check(self.layers, self.logits, self.outputs)
        if self.ids.shape != self.logits.shape or self.ids.dtype != _id_type(self.n_expert):
            raise TraceError(
                f"routed tokens have ids {self.ids.dtype} {self.ids.shape}, expected"
                f" {np.dtype(_id_type(self.n_expert))} {self.logits.shape} as their logits"
            )
        # The kernels index with these numbers unchecked.
        of_outputs = self.outputs.ids.max(initial=-1) if self.outputs else -1
        if max(int(self.ids.max(initial=0)), int(of_outputs)) >= self.n_expert:
            raise TraceError(f"routed tokens name an expert beyond the {self.n_expert} of a layer; record them again")
        if not np.isfinite(self.logits).all():
            layer, token, _ = np.argwhere(~np.isfinite(self.logits))[0]
            raise TraceError(
                f"the router of layer {self.layers[layer]} gave token {token} a logit that is no finite number;"
                " the model or its quantization is broken, try another file"
            )

    @property
    def n_token(self) -> int:
        """Tokens, T."""
        return int(self.ids.shape[1])

    @property
    def k_a(self) -> int:
        """Logits kept of each token and layer."""
        return int(self.ids.shape[2])

    @classmethod
    def concatenate(cls, parts: Iterable[RoutedTokens]) -> RoutedTokens:
        """Join pieces of text in the order given.

        Raises
        ------
        TraceError
            If there is none, or they differ in layers, experts, k_a or in what they recorded.
        """
        parts = list(parts)
        kinds = {(p.layers, p.n_expert, p.k_a, p.outputs.ids.shape[2] if p.outputs else None) for p in parts}
        if len(kinds) != 1:
            raise TraceError(
                "no routed tokens to join; record some text first"
                if not kinds
                else "routed tokens of different models or recorded with different settings cannot be joined;"
                " record them all again with one"
            )
        first = parts[0]
        outputs = [part.outputs for part in parts if part.outputs]
        return cls(
            first.layers,
            first.n_expert,
            np.concatenate([part.ids for part in parts], axis=1),
            np.concatenate([part.logits for part in parts], axis=1),
            ExpertOutputs(*(np.concatenate([getattr(o, name) for o in outputs], axis=1) for name in _OUTPUTS))
            if outputs
            else None,
        )

    def save(self, path: Path) -> None:
        """Write the tokens to a file (npz), which appears complete or not at all.

        Raises
        ------
        TraceError
            If the file cannot be written.
        """
        arrays: dict[str, Any] = {
            "format": np.array(_FORMAT),
            "layers": np.array(self.layers, dtype=np.int32),
            "n_expert": np.array(self.n_expert),
            "ids": self.ids,
            "logits": self.logits,
        }
        if self.outputs:
            arrays |= {f"outputs_{name}": getattr(self.outputs, name) for name in _OUTPUTS}
        try:
            with atomic_file(path) as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise TraceError(f"{path} cannot be written ({error.strerror}); check the folder and free space") from error

    @classmethod
    def load(cls, path: Path) -> RoutedTokens:
        """Read tokens that `save` wrote.

        Raises
        ------
        TraceError
            If the file is missing, damaged, or of another format.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
                arrays = dict(npz)
                version, layers, n_expert = int(arrays["format"]), arrays["layers"].tolist(), int(arrays["n_expert"])
                ids, logits = arrays["ids"], arrays["logits"]
                outputs = [arrays[f"outputs_{name}"] for name in _OUTPUTS] if "outputs_ids" in arrays else None
        except OSError as error:
            raise TraceError(f"{path} cannot be read ({error}); record the text again") from error
        except Exception as error:  # a damaged zip file raises a dozen kinds
            raise TraceError(f"{path} is not a file of routed tokens, or damaged; record the text again") from error
        if version != _FORMAT:
            raise TraceError(f"{path} has format {version}, expected {_FORMAT}; record the text again")
        return cls(tuple(layers), n_expert, ids, logits, ExpertOutputs(*outputs) if outputs else None)


def top_k(trace: RouterTrace, k_a: int, *, compiled: bool = True) -> RoutedTokens:
    """Keep the k_a largest logits of each token and layer.

    Parameters
    ----------
    trace : RouterTrace
        One batch.
    k_a : int
        Logits to keep, 1 to N; the model's own number of experts per token for PEU (papers: K_a).
    compiled : bool
        Use numba, which is some five times faster on one core and uses all, but takes 200 MB and two seconds at its
        first use. False is for a few prompts in a process that must stay small; the result is the same.

    Returns
    -------
    RoutedTokens
        With the trace's outputs.

    Raises
    ------
    TraceError
        If k_a is not within 1 to N, or a router's logit is no finite number.
    """
    n_layer, n_token, n_expert = trace.logits.shape
    if not 1 <= k_a <= n_expert:
        raise TraceError(f"cannot keep {k_a} logits of {n_expert} experts; choose 1 to {n_expert}")
    ids = np.empty((n_layer, n_token, k_a), _id_type(n_expert))
    logits = np.empty((n_layer, n_token, k_a), np.float32)
    if compiled:
        from edgemoe.score_kernels import top_k as fill
    else:
        fill = _top_k
    fill(np.ascontiguousarray(trace.logits), ids, logits)
    return RoutedTokens(trace.layers, n_expert, ids, logits, trace.outputs)


def _top_k(logits: Floats, ids: Ids, top: Floats) -> None:
    """Fill `ids` and `top` [L, T, k] from `logits` [L, T, N]; NaN counts as the largest, so that it is noticed."""
    n_expert, k = logits.shape[2], ids.shape[2]
    # Float bits with negatives turned over are ordered as integers; with the index below them no two are equal.
    bits = (logits + np.float32(0)).view(np.int32)
    bits ^= bits >> 31 & np.int32(0x7FFFFFFF)
    bits[np.isnan(logits)] = 0x7FFFFFFF
    keys = bits.astype(np.int64) << 32 | np.arange(n_expert - 1, -1, -1)
    best = np.sort(np.partition(keys, n_expert - k, axis=2)[:, :, n_expert - k :], axis=2)[:, :, ::-1]
    chosen = n_expert - 1 - (best & 0xFFFFFFFF)
    ids[...] = chosen
    top[...] = np.take_along_axis(logits, chosen, axis=2)


def _id_type(n_expert: int) -> type[np.uint8 | np.uint16]:
    return np.uint8 if n_expert <= 256 else np.uint16


def _check(layers: tuple[int, ...], logits: Floats, outputs: ExpertOutputs | None) -> None:
    """Refuse arrays whose layers and tokens do not agree."""
    if logits.ndim != 3 or logits.dtype != np.float32 or len(logits) != len(layers) or not layers:
        raise TraceError(
            f"logits are {logits.dtype} {logits.shape}, expected float32 [layers, tokens, experts] of"
            f" {len(layers)} layers, at least one"
        )
    if outputs and outputs.ids.shape[:2] != logits.shape[:2]:
        raise TraceError(f"expert outputs are of {outputs.ids.shape[:2]} layers and tokens, logits of {logits.shape}")
