"""Vectors of routed shares as points, and what is fitted to them for distances within and between tasks."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["TINY", "Metric", "ledoit_wolf", "plane_of_means", "span_of", "to_points"]

Metric = Literal["whitened", "hellinger", "l2", "l2-normalised", "cosine"]
Floats = npt.NDArray[np.float64]

TINY: Final = 1e-12
"""Least value that a number is divided by or whose logarithm is taken."""


def to_points(shares: npt.NDArray[np.floating], metric: Metric) -> Floats:
    """Points [P, D] in the space of a metric from shares [P, L, N]."""
    rows = np.asarray(shares, dtype=np.float64)
    if metric in ("whitened", "hellinger"):
        rows = np.sqrt(rows / np.maximum(rows.sum(2, keepdims=True), TINY))
    elif metric == "l2-normalised":
        rows = rows / np.maximum(np.linalg.norm(rows, axis=2, keepdims=True), TINY)
    return rows.reshape(len(rows), -1)


def plane_of_means(means: Floats, directions: Floats, variances: Floats) -> Floats | None:
    """Axes of the means' plane in which distances are Mahalanobis distances, [T - 1, D]; None for a single mean."""
    centred = means - means.mean(0)
    weighted = (centred @ directions / variances) @ directions.T
    squares, mixtures = np.linalg.eigh(weighted @ centred.T)
    kept = squares > 1e-9 * max(squares[-1], TINY)
    if len(means) == 1 or not kept.any():
        return None
    axes: Floats = (mixtures[:, kept] / np.sqrt(squares[kept])).T @ weighted
    return axes


def ledoit_wolf(away: Floats, n_dims: int) -> float:
    """Weight of the mean variance that makes a shrunk covariance best on average (Ledoit and Wolf 2004, eq. 14)."""
    n = len(away)
    covariance = away.T @ away / n
    squares = float((covariance**2).sum())
    distance = squares - float(np.trace(covariance)) ** 2 / n_dims
    error = (float(((away**2).sum(1) ** 2).sum()) / n - squares) / n
    return float(np.clip(error / max(distance, TINY), 1e-3, 1.0))


def span_of(points: Floats) -> Floats:
    """Orthonormal rows [R, D] that span the rows of `points` [n, D]."""
    squares, mixtures = np.linalg.eigh(points @ points.T)
    kept = squares > 1e-10 * max(squares[-1], TINY)
    rows: Floats = (mixtures[:, kept] / np.sqrt(squares[kept])).T @ points
    return rows
