"""Points, their space and the distances in it, against the same computed in the plainest way."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import pairwise_distances

from edgemoe.routing_space import (
    Space,
    cosine_distances,
    ledoit_wolf,
    plane_of_means,
    span_of,
    squared_distances,
    to_points,
)

L, N, T = 3, 8, 4


def shares(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shares [n, L, N] of documents of T tasks, and their tasks [n]."""
    rng = np.random.default_rng(seed)
    kinds = np.random.default_rng(99).dirichlet(np.full(N, 0.5), (T, L))
    task = np.arange(n) % T
    return np.stack([[rng.dirichlet(30 * row + 0.05) for row in kinds[kind]] for kind in task]), task


def spanned(n: int = 40, whiten: bool = True) -> tuple[Space, np.ndarray, np.ndarray]:
    stored, task = shares(n)
    space = Space("whitened", whiten)
    space.span(stored)
    return space, space.place(stored)[0], task


def test_points_of_each_metric():
    rows = np.array([[[1.0, 3.0], [0.0, 0.0]]])
    assert to_points(rows, "l2") == pytest.approx(np.array([[1, 3, 0, 0]]))
    assert to_points(rows, "cosine") == pytest.approx(np.array([[1, 3, 0, 0]]))
    assert to_points(rows, "hellinger") == pytest.approx(np.array([[0.5, 0.75**0.5, 0, 0]]))
    assert to_points(rows, "whitened") == pytest.approx(to_points(rows, "hellinger"))
    assert to_points(rows, "l2-normalised") == pytest.approx(np.array([[1, 3, 0, 0]]) / 10**0.5)


@pytest.mark.parametrize(("distances", "metric"), [(squared_distances, "sqeuclidean"), (cosine_distances, "cosine")])
def test_distances_are_those_of_scikit_learn(distances, metric):
    points, means = to_points(shares(20)[0], "l2"), to_points(shares(3, seed=7)[0], "l2")
    points[4] = 0
    points[5] = means[1]
    found = distances(points, means)
    assert found == pytest.approx(pairwise_distances(points, means, metric), abs=1e-12)
    assert found[5, 1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [5, 12, 60])
def test_a_span_is_orthonormal_and_holds_what_it_spans(n):
    points = to_points(shares(n)[0], "hellinger")
    basis = span_of(points)
    assert basis @ basis.T == pytest.approx(np.eye(len(basis)), abs=1e-6)
    assert points @ basis.T @ basis == pytest.approx(points, abs=1e-6)
    assert len(basis) <= min(n, L * N)


def test_a_place_and_what_is_outside_add_up():
    space, points, _ = spanned(10)
    asked = shares(7, seed=5)[0]
    inside, outside = space.place(asked)
    whole = ((to_points(asked, "whitened")[:, None] - to_points(shares(10)[0], "whitened")) ** 2).sum(2)
    assert ((inside[:, None] - points) ** 2).sum(2) + outside[:, None] == pytest.approx(whole, abs=1e-9)
    assert (outside > 1e-6).any()


def test_lifted_geometry_measures_the_same():
    space, points, task = spanned(12)
    asked = shares(9, seed=5)[0]
    inside, outside = space.place(asked)
    within = space.fit(points, task)
    lifted = space.lifted(within)
    everywhere, nothing = to_points(asked, "whitened"), np.zeros(9)
    distances = [
        ((geometry.compared(rows)[:, None] - geometry.compared(geometry.means)) ** 2).sum(2)
        for geometry, rows in ((within, inside), (lifted, everywhere))
    ]
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)
    assert within.from_any_task(inside, outside) == pytest.approx(lifted.from_any_task(everywhere, nothing), rel=1e-6)


def test_distance_from_any_task_is_that_of_a_shrunk_covariance():
    # Few enough directions that all of them are "wide": then it is a Mahalanobis distance with 0.1 S + 0.9 level I.
    space, points, task = spanned(40)
    geometry = space.fit(points, task)
    away = points - geometry.means[task]
    spread = away.T @ away / (len(points) - T)
    shrunk = 0.1 * spread + 0.9 * np.trace(spread) / (L * N) * np.eye(len(spread))
    asked = space.place(shares(9, seed=5)[0])[0]
    gaps = asked[:, None] - geometry.means
    expected = np.einsum("ptd,de,pte->pt", gaps, np.linalg.inv(shrunk), gaps).min(1)
    assert geometry.from_any_task(asked, np.zeros(9)) == pytest.approx(expected, rel=1e-6)
    assert geometry.from_any_task(asked, np.ones(9)) == pytest.approx(expected + 1 / geometry.noise, rel=1e-6)


def test_the_plane_of_means_keeps_their_mahalanobis_distances():
    rng = np.random.default_rng(2)
    means, mixing = rng.normal(size=(T, 10)), rng.normal(size=(10, 10))
    covariance = mixing @ mixing.T + np.eye(10)
    variances, directions = np.linalg.eigh(covariance)
    axes = plane_of_means(means, directions, variances)
    assert axes is not None and axes.shape == (T - 1, 10)
    gaps = means[:, None] - means
    expected = np.einsum("abd,de,abe->ab", gaps, np.linalg.inv(covariance), gaps)
    assert ((gaps @ axes.T) ** 2).sum(2) == pytest.approx(expected)
    assert plane_of_means(means[:1], directions, variances) is None
    assert plane_of_means(means[[0, 0]], directions, variances) is None


def test_without_whitening_points_are_compared_as_they_are():
    stored, task = shares()
    space = Space("l2", False)
    points, outside = space.place(stored)
    geometry = space.lifted(space.fit(points, task))
    assert geometry.compared(points) is points and not outside.any()
    assert geometry.means == pytest.approx(np.stack([stored[task == kind].mean(0).ravel() for kind in range(T)]))


def test_equal_documents_have_no_spread_to_divide_by():
    stored = np.repeat(shares(T)[0], 5, axis=0)
    space = Space("whitened", True)
    space.span(stored)
    assert space.fit(space.place(stored)[0], np.repeat(np.arange(T), 5)).axes is None


def test_shrinkage_is_strong_with_few_documents_and_fades_with_many():
    rng = np.random.default_rng(3)
    scale = np.linspace(0.5, 3, 20)
    weights = [ledoit_wolf(rng.normal(0, scale, (n, 20)), 20) for n in (10, 100, 10_000)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > 0.3 and weights[-1] < 0.01
    assert ledoit_wolf(rng.normal(size=(50, 20)), 20) > 0.8  # all directions alike: nothing to learn
