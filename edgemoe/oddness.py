"""When a text is too far from its nearest task to be one of it: thresholds by length, learned from stored documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["FALSE_REJECTIONS", "Oddness"]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

FALSE_REJECTIONS: Final = 0.05
"""Share of the stored documents that the thresholds would reject."""

_NORMAL_QUANTILE = 1.6449  # of 1 - FALSE_REJECTIONS
_LENGTHS = (64, 256, 1024)  # tokens; thresholds are learned for each class of lengths
_SHRINKAGE = 100  # a task's mean counts that many pieces of all tasks as its own
_LEAST_PIECES = 10  # a class of lengths with fewer joins its neighbour


@dataclass(frozen=True, slots=True, eq=False)
class Oddness:
    """How far documents of stored tasks are from their tasks, by length.

    Attributes
    ----------
    shortest : int
        Tokens of the shortest piece seen.
    log_tokens : float [C]
        Typical length of each class of lengths, ascending; empty where too few documents are stored.
    mean : float [C, T, F]
        Of the features of pieces in that class, by their nearest task: some tasks are of one kind, some of many.
    deviation : float [C, F]
        Standard deviation from those means.
    threshold : float [C]
        Sum of standardised features that `FALSE_REJECTIONS` of pieces exceed.
    """

    shortest: int
    log_tokens: Floats
    mean: Floats
    deviation: Floats
    threshold: Floats

    @classmethod
    def of(cls, tokens: Floats, nearest: Indices, features: Floats, n_tasks: int) -> Oddness:
        """Learn from pieces of known length [P], their nearest tasks [P] and features [P, F], measured without them."""
        length = np.searchsorted(_LENGTHS, tokens, side="right")
        classes = _merged([np.flatnonzero(length == place) for place in range(len(_LENGTHS) + 1)])
        rows = []
        for chosen in classes:
            mean = _means(features[chosen], nearest[chosen], n_tasks)
            away = features[chosen] - mean[nearest[chosen]]
            deviation = away.std(0, ddof=1) + 1e-6
            rows.append((np.log(tokens[chosen]).mean(), mean, deviation, _upper((away / deviation).sum(1))))
        width = features.shape[1]
        return cls(
            shortest=int(tokens.min()) if len(tokens) else 0,
            log_tokens=np.array([row[0] for row in rows]),
            mean=np.array([row[1] for row in rows]).reshape(-1, n_tasks, width),
            deviation=np.array([row[2] for row in rows]).reshape(-1, width),
            threshold=np.array([row[3] for row in rows]),
        )

    def judge(self, features: Floats, nearest: int, n_tokens: int) -> tuple[float, float]:
        """Oddness of a text and the threshold for its length, interpolated over the logarithm of lengths."""
        if not len(self.log_tokens):
            return 0.0, float("inf")
        at = np.log(n_tokens)
        columns = range(self.mean.shape[2])
        mean = np.array([np.interp(at, self.log_tokens, self.mean[:, nearest, c]) for c in columns])
        deviation = np.array([np.interp(at, self.log_tokens, self.deviation[:, c]) for c in columns])
        oddness = ((features[-len(mean) :] - mean) / deviation).sum()
        return float(oddness), float(np.interp(at, self.log_tokens, self.threshold))


def _means(features: Floats, nearest: Indices, n_tasks: int) -> Floats:
    """Mean features of each task's pieces [T, F], drawn towards the mean of all."""
    total = np.zeros((n_tasks, features.shape[1]))
    np.add.at(total, nearest, features)
    count = np.bincount(nearest, minlength=n_tasks)[:, None]
    means: Floats = (total + _SHRINKAGE * features.mean(0)) / (count + _SHRINKAGE)
    return means


def _merged(classes: list[Indices]) -> list[Indices]:
    """Classes of lengths with at least `_LEAST_PIECES` each; one class of what there is, if 2 or more, else none."""
    merged: list[Indices] = []
    for chosen in classes:
        if merged and len(merged[-1]) < _LEAST_PIECES:
            merged[-1] = np.concatenate([merged[-1], chosen])
        else:
            merged.append(chosen)
    if len(merged) > 1 and len(merged[-1]) < _LEAST_PIECES:
        last = merged.pop()
        merged[-1] = np.concatenate([merged[-1], last])
    return [chosen for chosen in merged if len(chosen) > 1]


def _upper(scores: Floats) -> float:
    """Bound that the next score exceeds with probability `FALSE_REJECTIONS`."""
    n = len(scores)
    rank = int(np.ceil((1 - FALSE_REJECTIONS) * (n + 1)))
    if rank <= n:
        return float(np.sort(scores)[rank - 1])
    # Too few for that quantile: prediction bound of a normal distribution.
    return float(scores.mean() + _student_quantile(n - 1) * scores.std(ddof=1) * np.sqrt(1 + 1 / n))


def _student_quantile(freedom: int) -> float:
    """Value that Student's t with so many degrees of freedom exceeds with probability `FALSE_REJECTIONS`."""
    p = 1 - FALSE_REJECTIONS
    # Of 1 and 2 degrees of freedom the expansion is far off, but there are closed forms.
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = _NORMAL_QUANTILE
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
