"""The loops of trace.py and score.py, compiled: the only file that imports numba.

Importing it and compiling all kernels on their first calls costs about 200 MB and two seconds, so whoever needs it
imports it inside the function that does. Nothing is cached on disk: the package's folder may not be writable.

The kernels run on plain threads, a share of the layers each. numba's own threads would be one more OpenMP pool beside
llama.cpp's, and both would wait actively for work. Layers share nothing, so the result does not depend on the number of
threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["output_sums", "router_sums", "top_k", "top_probability"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.uint8 | np.uint16]
Counts = npt.NDArray[np.int64]

_GRID = 2.0**-24  # as in score.py; a constant here, so that divisions become multiplications
_IDENTITY, _MAX_SIGMOID, _ONE = range(3)  # positions in criteria.Transform; the last one is the rest
_LOWEST, _HIGHEST = np.int64(np.iinfo(np.int64).min), np.int64(np.iinfo(np.int64).max)


def top_k(logits: Floats, ids: Ids, top: Floats) -> None:
    """Compiled form of ``trace._top_k``: fill `ids` and `top` [L, T, k] from `logits` [L, T, N]."""
    _share_layers(_top_k, logits, ids, top)


def top_probability(logits: Floats, sums: Doubles) -> None:
    """Add to `sums` [L] the softmax's largest value of each row of `logits` [L, T, k], whose first is the largest."""
    _share_layers(_top_probability, logits, sums)


def router_sums(ids: Ids, logits: Floats, threshold: Doubles, transform: int, sums: Doubles, routed: Counts) -> None:
    """Add to `sums` and `routed` [L, N] what `ids` and `logits` [L, T, k] contribute; `threshold` is on the grid."""
    _share_layers(lambda *arrays: _router_sums(*arrays, transform), ids, logits, threshold, sums, routed)


def output_sums(
    ids: npt.NDArray[np.int32],
    weights: Floats,
    norms: Floats,
    change: Floats,
    powers: tuple[int, int, int],
    renormalise: bool,
    sums: Doubles,
    routed: Counts,
) -> None:
    """Add to `sums` and `routed` [L, N] what the chosen experts contribute, arrays [L, T, K] and `change` [L, T]."""
    _share_layers(
        lambda *arrays: _output_sums(*arrays, *powers, renormalise), ids, weights, norms, change, sums, routed
    )


def _share_layers(kernel: Callable[..., None], *arrays: npt.NDArray[np.generic]) -> None:
    """Run a kernel on shares of the first axis of all arrays, several for each thread: cores are not equally fast."""
    n_layer, n_thread = len(arrays[0]), len(os.sched_getaffinity(0))
    n_share = min(4 * n_thread, n_layer)
    edges = [n_layer * i // n_share for i in range(n_share + 1)]
    with ThreadPoolExecutor(n_thread) as pool:
        shares = [[array[a:b] for array in arrays] for a, b in pairwise(edges)]
        for _ in pool.map(lambda share: kernel(*share), shares):
            pass


@njit(nogil=True)
def _top_k(logits: Floats, ids: Ids, top: Floats) -> None:
    # The bits of a float, negatives turned over, are ordered as integers. With the index below them no two keys are
    # equal, and the next one is a maximum that vector instructions find; k such passes beat any sort for so small a k.
    n_layer, n_token, n_expert = logits.shape
    keys = np.empty(n_expert, np.int64)
    for layer in range(n_layer):
        for token in range(n_token):
            row = logits[layer, token]
            for i in range(n_expert):
                value = np.float32(row[i] + np.float32(0))  # -0 becomes 0
                bits = value.view(np.int32)
                bits ^= (bits >> np.int32(31)) & np.int32(0x7FFFFFFF)
                if value != value:
                    bits = np.int32(0x7FFFFFFF)  # NaN comes first, so that it is noticed
                keys[i] = (np.int64(bits) << 32) | (n_expert - 1 - i)
            last = _HIGHEST
            for j in range(ids.shape[2]):
                best = _LOWEST
                for i in range(n_expert):
                    best = max(best, keys[i] if keys[i] < last else _LOWEST)
                i = n_expert - 1 - (best & 0xFFFFFFFF)
                ids[layer, token, j] = i
                top[layer, token, j] = row[i]
                last = best


@njit(nogil=True)
def _on_grid(value: float) -> float:
    return float(np.rint(value / _GRID) * _GRID)


@njit(nogil=True)
def _power(value: float, exponent: int) -> float:
    # By hand: the exponents are 0, 1 and 2, for which the library's power takes ten times as long.
    result = 1.0
    for _ in range(exponent):
        result *= value
    return result


@njit(nogil=True)
def _top_probability(logits: Floats, sums: Doubles) -> None:
    n_layer, n_token, k = logits.shape
    for layer in range(n_layer):
        for token in range(n_token):
            total = 0.0
            for j in range(k):
                total += np.exp(np.float64(logits[layer, token, j]) - logits[layer, token, 0])
            sums[layer] += _on_grid(1.0 / total)


@njit(nogil=True)
def _router_sums(
    ids: Ids,
    logits: Floats,
    threshold: Doubles,
    sums: Doubles,
    routed: Counts,
    transform: int,
) -> None:
    n_layer, n_token, k = logits.shape
    p = np.empty(k)
    for layer in range(n_layer):
        for token in range(n_token):
            total = 0.0
            for j in range(k):
                p[j] = np.exp(np.float64(logits[layer, token, j]) - logits[layer, token, 0])
                total += p[j]
            for j in range(k):
                expert = ids[layer, token, j]
                routed[layer, expert] += 1
                probability = _on_grid(p[j] / total)
                if probability < threshold[layer]:
                    continue
                s = np.float64(logits[layer, token, j])
                if transform == _IDENTITY or (transform == _MAX_SIGMOID and s >= 1.0):  # a sigmoid is less than 1
                    value = float(s)
                elif transform == _MAX_SIGMOID:
                    value = max(s, np.exp(min(s, 0.0)) / (1.0 + np.exp(-abs(s))))
                elif transform == _ONE:
                    value = 1.0
                else:
                    value = probability
                sums[layer, expert] += _on_grid(value)


@njit(nogil=True)
def _output_sums(
    ids: npt.NDArray[np.int32],
    weights: Floats,
    norms: Floats,
    change: Floats,
    sums: Doubles,
    routed: Counts,
    alpha: int,
    beta: int,
    gamma: int,
    renormalise: bool,
) -> None:
    n_layer, n_token, k = ids.shape
    for layer in range(n_layer):
        for token in range(n_token):
            total = 1.0
            if renormalise:
                total = 0.0
                for j in range(k):
                    if ids[layer, token, j] >= 0:
                        total += weights[layer, token, j]
                if total == 0.0:
                    total = 1.0
            factor = _power(change[layer, token], gamma)
            for j in range(k):
                expert = ids[layer, token, j]
                if expert < 0:
                    continue
                routed[layer, expert] += 1
                g = weights[layer, token, j] / total
                value = _power(g, alpha) * _power(norms[layer, token, j], beta) * factor
                if value == value:  # a token whose change is unknown adds nothing
                    sums[layer, expert] += _on_grid(value)
