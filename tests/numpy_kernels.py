"""What the compiled loops of score.py compute, as numpy says it: what they are compared with, in results and speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args
from unittest import mock

import numpy as np
import numpy.typing as npt

from edgemoe import score as scores
from edgemoe.criteria import Transform
from edgemoe.score import GRID

Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Result = TypeVar("Result")


def either_way(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a function of score.py one more argument, `compiled`: False has it use these loops."""

    def called(*arguments: Any, compiled: bool = True) -> Result:
        if compiled:
            return function(*arguments)
        twins = {twin.__name__: twin for twin in (top_probability, router_sums, output_sums)}
        with mock.patch.multiple("edgemoe.score_kernels", **twins):
            return function(*arguments)

    return called


score, confidence, accumulate = map(either_way, (scores.score, scores.confidence, scores.accumulate))


def on_grid(values: Doubles) -> Doubles:
    return np.asarray(np.rint(values / GRID) * GRID)


def _softmax(logits: npt.NDArray[np.float32]) -> Doubles:
    """Softmax of the last axis, whose first is the largest."""
    s = logits.astype(np.float64)
    e = np.exp(s - s[..., :1])
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def top_probability(logits: npt.NDArray[np.float32], sums: Doubles) -> None:
    """Add to `sums` [L] the softmax's largest value of each row of `logits` [L, T, k]."""
    sums += on_grid(_softmax(logits)[..., 0]).sum(axis=1)


def router_sums(
    ids: npt.NDArray[np.uint8 | np.uint16],
    logits: npt.NDArray[np.float32],
    threshold: Doubles,
    transform: int,
    sums: Doubles,
    routed: Counts,
) -> None:
    """Add to `sums` and `routed` [L, N] what `ids` and `logits` [L, T, k] contribute; `threshold` is on the grid."""
    s = logits.astype(np.float64)
    p = on_grid(_softmax(logits))
    f: Transform = get_args(Transform)[transform]
    match f:
        case "identity":
            values = s
        case "max-sigmoid":
            values = np.maximum(s, np.exp(np.minimum(s, 0)) / (1 + np.exp(-np.abs(s))))
        case "one":
            values = np.ones_like(s)
        case "probability":
            values = p
    passed = p >= threshold[:, None, None]
    _add(ids, np.where(passed, values, 0), np.ones_like(passed), sums, routed)


def output_sums(
    ids: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    norms: npt.NDArray[np.float32],
    change: npt.NDArray[np.float32],
    powers: tuple[int, int, int],
    renormalise: bool,
    sums: Doubles,
    routed: Counts,
) -> None:
    """Add to `sums` and `routed` [L, N] what the chosen experts contribute, arrays [L, T, K] and `change` [L, T]."""
    alpha, beta, gamma = powers
    chosen = ids >= 0
    g = np.where(chosen, weights, 0).astype(np.float64)
    if renormalise:
        total = g.sum(axis=2, keepdims=True)
        g /= np.where(total > 0, total, 1)
    values = g**alpha * np.where(chosen, norms, 0).astype(np.float64) ** beta
    if gamma:
        values *= np.nan_to_num(change.astype(np.float64), nan=0.0)[:, :, None] ** gamma
    _add(ids, values, chosen, sums, routed)


def _add(
    ids: npt.NDArray[np.integer],
    values: Doubles,
    chosen: npt.NDArray[np.bool_],
    sums: Doubles,
    routed: Counts,
) -> None:
    """Add `values` and counts [L, T, k] to the experts they belong to, [L, N]."""
    n_layer, n_expert = sums.shape
    cells = (np.arange(n_layer)[:, None, None] * n_expert + ids)[chosen]
    sums += np.bincount(cells, on_grid(values)[chosen], sums.size).reshape(sums.shape)
    routed += np.bincount(cells, minlength=sums.size).reshape(sums.shape)
