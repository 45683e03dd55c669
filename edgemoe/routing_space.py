"""Vectors of routed shares as points, and what is fitted to them for distances within and between tasks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "TINY",
    "Geometry",
    "Metric",
    "Space",
    "cosine_distances",
    "ledoit_wolf",
    "plane_of_means",
    "span_of",
    "squared_distances",
    "to_points",
]

Metric = Literal["whitened", "hellinger", "l2", "l2-normalised", "cosine"]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

TINY: Final = 1e-12
"""Least value that a number is divided by or whose logarithm is taken."""

_WIDE_DIRECTIONS = 32
_TYPICAL_SHRINKAGE = 0.9  # nearly a plain distance: what is new may lie in any direction


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """Where the tasks' means are, and what distance means.

    Attributes
    ----------
    means : float [T, D]
    axes : float [A, D] or None
        Directions whose coordinates are compared, None for all.
    wide, factors : float [W, D], [W]
        Directions in which documents of a task differ most, and the factor on squared distances along them.
    noise : float
        Variance that divides squared distances in all other directions.
    """

    means: Floats
    axes: Floats | None
    wide: Floats
    factors: Floats
    noise: float

    def compared(self, points: Floats) -> Floats:
        """Coordinates in which points [P, D] are compared, [P, A or D]."""
        coordinates: Floats = points if self.axes is None else points @ self.axes.T
        return coordinates

    def from_any_task(self, points: Floats, rest: Floats) -> Floats:
        """Squared distances [P] from the nearest mean in all directions, in variances of documents within tasks.

        `rest` [P] is the squared length of each point's part outside of the space.
        """
        squares = squared_distances(points, self.means)
        along = (points @ self.wide.T)[:, None] - self.means @ self.wide.T
        nearest: Floats = np.maximum(squares - along**2 @ (1 - self.factors), 0.0).min(1)
        distances: Floats = (nearest + rest) / self.noise
        return distances


@dataclass(slots=True, eq=False)
class Space:
    """Where points are while a matcher is fitted.

    Documents span few of the L * N directions, and whatever is fitted lies within those, so it is fitted there. That
    is exact; with 480 documents of 6144 numbers it takes about a second instead of minutes.

    Attributes
    ----------
    metric : Metric
    whiten : bool
        Whether documents suffice to estimate the spread within tasks.
    n_dims : int
        L * N.
    basis : float [R, D] or None
        Orthonormal directions in use; None for all.
    origin : float [D]
    """

    metric: Metric
    whiten: bool
    n_dims: int = 0
    basis: Floats | None = None
    origin: Floats = field(default_factory=lambda: np.zeros(0))

    def span(self, shares: npt.NDArray[np.floating]) -> None:
        """Use the directions that these documents span."""
        points = to_points(shares, self.metric)
        self.origin = points.mean(0)
        points -= self.origin
        self.basis = span_of(points)

    def place(self, shares: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
        """Points [P, R] of shares [P, L, N], and the squared length of what is outside of the space [P]."""
        points = to_points(shares, self.metric)
        self.n_dims = points.shape[1]
        if self.basis is None:
            return points, np.zeros(len(points))
        points -= self.origin
        inside = points @ self.basis.T
        return inside, np.maximum((points**2).sum(1) - (inside**2).sum(1), 0.0)

    def fit(self, points: Floats, task: Indices) -> Geometry:
        """Means of tasks 0, 1, ... and, to whiten, the spread around them."""
        n_tasks = int(task.max()) + 1
        means = np.stack([points[task == place].mean(0) for place in range(n_tasks)])
        plain = Geometry(means, None, np.empty((0, points.shape[1])), np.empty(0), 1.0)
        if not self.whiten:
            return plain
        away = points - means[task]
        spread = away.T @ away / (len(points) - n_tasks)
        level = np.trace(spread) / self.n_dims
        if level <= TINY:
            return plain
        shrinkage = ledoit_wolf(away, self.n_dims)
        variances, directions = np.linalg.eigh(spread)
        variances = np.maximum(variances, 0.0)
        noise = _TYPICAL_SHRINKAGE * level
        wide = slice(-1, -1 - _WIDE_DIRECTIONS, -1)
        return replace(
            plain,
            axes=plane_of_means(means, directions, (1 - shrinkage) * variances + shrinkage * level),
            wide=directions[:, wide].T,
            factors=noise / ((1 - _TYPICAL_SHRINKAGE) * variances[wide] + noise),
            noise=noise,
        )

    def lifted(self, geometry: Geometry) -> Geometry:
        """Give the same among all L * N directions."""
        if self.basis is None:
            return geometry
        return replace(
            geometry,
            means=self.origin + geometry.means @ self.basis,
            axes=None if geometry.axes is None else geometry.axes @ self.basis,
            wide=geometry.wide @ self.basis,
        )


def to_points(shares: npt.NDArray[np.floating], metric: Metric) -> Floats:
    """Points [P, D] in the space of a metric from shares [P, L, N]."""
    rows = np.asarray(shares, dtype=np.float64)
    if metric in ("whitened", "hellinger"):
        rows = np.sqrt(rows / np.maximum(rows.sum(2, keepdims=True), TINY))
    elif metric == "l2-normalised":
        rows = rows / np.maximum(np.linalg.norm(rows, axis=2, keepdims=True), TINY)
    return rows.reshape(len(rows), -1)


def squared_distances(points: Floats, means: Floats) -> Floats:
    """Squared Euclidean distances [P, T] of points [P, D] to means [T, D]."""
    return np.stack([((points - mean) ** 2).sum(1) for mean in means], axis=1)


def cosine_distances(points: Floats, means: Floats) -> Floats:
    """1 - cosine [P, T] of points [P, D] and means [T, D]; 1 where one of them is zero."""
    lengths = np.linalg.norm(points, axis=1)[:, None] * np.linalg.norm(means, axis=1)
    distances: Floats = 1 - points @ means.T / np.maximum(lengths, TINY)
    return distances


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
