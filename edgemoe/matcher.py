"""Which stored task a text is nearest to by its routing, or none of them.

Source: PreMoE v1 (arXiv 2505.17639, TAER), which takes the nearest stored vector of the first MoE layer by squared L2
and never says no. Shares are compared by their square roots here (Hellinger distance: sampling noise is then about
the same for every expert), in the metric of linear discriminant analysis; `benchmarks/matcher_accuracy.py` has figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt

from edgemoe.errors import PatternError
from edgemoe.oddness import Oddness
from edgemoe.routing_space import (
    TINY,
    Geometry,
    Metric,
    Space,
    cosine_distances,
    squared_distances,
    to_points,
)

if TYPE_CHECKING:
    from edgemoe.pattern import Pattern

__all__ = ["Match", "Metric", "TaskDocuments", "TaskMatcher", "next_task"]

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

_FOLDS = 5
_LEAST_FREEDOM = 5  # documents beyond one per task, below which the spread within tasks is not estimated


@dataclass(frozen=True, slots=True, eq=False)
class TaskDocuments:
    """Routing of one task's documents.

    Attributes
    ----------
    shares : float [P, L, N]
        Share of each expert in a piece's routing, in every MoE layer: the mean over tokens of the router's weights or
        of its choices. Any scale will do for the metrics "whitened", "hellinger" and "cosine".
    tokens : int [P]
        Tokens of each piece.
    document : int [P]
        Which document a piece belongs to: documents and their beginnings (32 tokens, 128, the prompt) may both be
        given, so that thresholds for short prompts are learned. The longest piece of a document stands for it.
    """

    shares: npt.NDArray[np.floating]
    tokens: npt.NDArray[np.integer]
    document: npt.NDArray[np.integer]

    @classmethod
    def of(cls, pattern: Pattern) -> TaskDocuments:
        """Give the documents of a stored pattern."""
        kept = pattern.documents
        return cls(kept.shares, kept.tokens, kept.document)


@dataclass(frozen=True, slots=True)
class Match:
    """What a matcher says about one text.

    Attributes
    ----------
    task : str or None
        The nearest task, or None where the text is unlike all of them (or like none well enough).
    nearest, runner_up : str
        The two nearest tasks; `runner_up` is None where only one is stored.
    distance, runner_up_distance : float
        Their distances, in the matcher's metric.
    oddness : float
        How much farther the text is from its nearest task than documents of that length usually are, in standard
        deviations, added up over what is measured (see `TaskMatcher`).
    threshold : float
        Oddness above which it is rejected; infinite where too few documents are stored to learn one.
    n_tokens : int
        Tokens of the text.
    short : bool
        Whether it is shorter than all that the thresholds were learned from.
    distances : Mapping of str to float
        Distances of all tasks.
    """

    task: str | None
    nearest: str
    distance: float
    runner_up: str | None
    runner_up_distance: float | None
    oddness: float
    threshold: float
    n_tokens: int
    short: bool
    distances: Mapping[str, float]

    @property
    def reason(self) -> str:
        """The match in one line."""
        distance = f"distance {self.distance:.4g}"
        if self.runner_up is not None:
            distance += f", then {self.runner_up} {self.runner_up_distance:.4g}"
        if self.threshold == np.inf:
            return f"{self.nearest}: {distance}; never rejected, because too few documents are stored"
        oddness = f"oddness {self.oddness:.1f}, limit {self.threshold:.1f}"
        if self.task is None:
            return f"no task: nearest is {self.nearest}, {distance}; rejected ({oddness})"
        return f"{self.task}: {distance} ({oddness})"


def next_task(active: str | None, match: Match, margin: float = 0.2) -> str | None:
    """Choose the task after a turn of a conversation, with hysteresis.

    The active task stays while no other one is nearer than it by `margin`; a turn that is rejected ends it anyway, if
    it is long enough for that to mean something. Otherwise the match decides; None means no task.

    Parameters
    ----------
    active : str or None
        Task of the turns before, None before the first or after a rejection.
    match : Match
        Match of the new turn.
    margin : float
        Share by which the new task's distance must be smaller than the active one's.
    """
    if active is None or active not in match.distances:
        return match.task
    if match.task is None and not match.short:
        return None
    return match.task if match.distance < (1 - margin) * match.distances[active] else active


class TaskMatcher:
    """Nearest stored task, with rejection.

    Distances are to each task's mean. In the default metric, "whitened", square roots of shares are divided by their
    spread within tasks (shrunk after Ledoit and Wolf, 2004) and projected on the plane of the tasks' means.
    Oddness adds up how far a text is from its task in that plane, and how far from any task in all directions: text
    between two tasks is odd in the first, text of an unknown kind often in the second. What is usual for a task and a
    length is learned from the stored documents alone: each is measured by a matcher that was fitted without it (in
    fifths).

    Parameters
    ----------
    tasks : Mapping of str to TaskDocuments
        At least one task with at least one document. Their order does not matter.
    layers : sequence of int or None
        MoE layers to compare, as places among the L stored ones: (0,) is the paper's choice, None takes all.
        llama.cpp computes the last layer's router for the last token of a prompt alone, so a running chat leaves that
        one out.
    metric : Metric
        "whitened"; or the distance of means alone: "l2" (squared; the paper's code), "cosine" (1 - cosine),
        "l2-normalised" (squared, every layer scaled to length 1), "hellinger" (squared, of square roots of shares).

    Raises
    ------
    PatternError
        If there is no task, one has no documents, arrays are of different shapes or hold what is no share, or
        `layers` or `metric` is none of those.
    """

    def __init__(
        self, tasks: Mapping[str, TaskDocuments], layers: Sequence[int] | None = None, metric: Metric = "whitened"
    ) -> None:
        if not tasks:
            raise PatternError("there is no stored task to match with; profile one first")
        if metric not in get_args(Metric):
            raise PatternError(f"there is no metric {metric!r}; take one of: {', '.join(get_args(Metric))}")
        self.tasks: tuple[str, ...] = tuple(sorted(tasks))
        self.metric: Metric = metric
        stored = [tasks[name] for name in self.tasks]
        shape = np.shape(stored[0].shares)[1:]
        for name, documents in zip(self.tasks, stored, strict=True):
            _check(name, documents, shape)
        self.layers: tuple[int, ...] = tuple(range(shape[0]) if layers is None else layers)
        if not self.layers or not set(self.layers) <= set(range(shape[0])):
            raise PatternError(f"layers {self.layers} cannot be compared; take some of 0 to {shape[0] - 1}")
        self._n_expert = shape[1]
        self._fit(stored)

    def match(self, vector: npt.NDArray[np.floating], n_tokens: int) -> Match:
        """Match a text by its routing.

        Parameters
        ----------
        vector : float [len(layers), N]
            Shares of the text in the layers compared, made as the stored ones were.
        n_tokens : int
            Its tokens.

        Raises
        ------
        PatternError
            If the vector is of another shape or holds what is no share, or there are no tokens.
        """
        vector = np.asarray(vector)
        expected = (len(self.layers), self._n_expert)
        if vector.shape != expected:
            raise PatternError(f"a router vector of shape {vector.shape} does not fit the stored ones; give {expected}")
        if n_tokens < 1:
            raise PatternError(f"a text of {n_tokens} tokens has no routing to match; give it at least one")
        _check_shares(vector, "a router vector")
        point = to_points(vector[None], self.metric)
        distances, features = self._nearest_means.measure(point, np.zeros(1))
        order = np.argsort(distances[0], kind="stable")
        oddness, threshold = self._usual.judge(features[0], int(order[0]), n_tokens)
        names = [self.tasks[place] for place in order]
        values = distances[0, order].tolist()
        return Match(
            task=None if oddness > threshold else names[0],
            nearest=names[0],
            distance=values[0],
            runner_up=names[1] if len(names) > 1 else None,
            runner_up_distance=values[1] if len(names) > 1 else None,
            oddness=oddness,
            threshold=threshold,
            n_tokens=n_tokens,
            short=n_tokens < self._usual.shortest,
            distances=dict(zip(names, values, strict=True)),
        )

    def _fit(self, stored: list[TaskDocuments]) -> None:
        tokens = np.concatenate([documents.tokens for documents in stored])
        task = np.repeat(np.arange(len(stored)), [len(documents.tokens) for documents in stored])
        wholes = [_longest(documents) for documents in stored]
        whole = np.concatenate(wholes)
        fold = np.concatenate([_fold(documents.document, place) for place, documents in enumerate(stored)])
        parts = [whole & (fold != left_out) for left_out in range(_FOLDS)]
        freedom = min(int(part.sum()) - len(np.unique(task[part])) for part in parts)

        space = Space(self.metric, self.metric == "whitened" and freedom >= _LEAST_FREEDOM)
        cut = [documents.shares[:, list(self.layers)] for documents in stored]
        if space.whiten:
            space.span(np.concatenate([shares[chosen] for shares, chosen in zip(cut, wholes, strict=True)]))
        inside, outside = zip(*(space.place(shares) for shares in cut), strict=True)
        points, rest = np.concatenate(inside), np.concatenate(outside)

        lengths, nearest, features = [], [], []
        for left_out, part in enumerate(parts):
            known = np.unique(task[part])
            asked = (fold == left_out) & np.isin(task, known)
            if asked.any():
                geometry = space.fit(points[part], np.searchsorted(known, task[part]))
                distances, measured = _NearestMeans(self.metric, geometry).measure(points[asked], rest[asked])
                features.append(measured)
                nearest.append(known[distances.argmin(1)])
                lengths.append(tokens[asked])
        # A fold may know one task only, which makes no plane to be odd in; the last feature is there always.
        width = min((measured.shape[1] for measured in features), default=1)
        self._usual = Oddness.of(
            np.concatenate([np.empty(0), *lengths]),
            np.concatenate([np.empty(0, np.intp), *nearest]),
            np.concatenate([np.empty((0, width)), *(measured[:, -width:] for measured in features)]),
            len(stored),
        )
        self._nearest_means = _NearestMeans(self.metric, space.lifted(space.fit(points[whole], task[whole])))


@dataclass(slots=True, eq=False)
class _NearestMeans:
    """Distances to the tasks' means, and what makes a text odd."""

    metric: Metric
    geometry: Geometry

    def measure(self, points: Floats, rest: Floats) -> tuple[Floats, Floats]:
        """Distances to the tasks [P, T], and logarithms of what makes a point odd [P, 1 or 2].

        `rest` [P] is the squared length of each point's part outside of the space.
        """
        compared, means = self.geometry.compared(points), self.geometry.compared(self.geometry.means)
        distances = cosine_distances(compared, means) if self.metric == "cosine" else squared_distances(compared, means)
        nearest = np.log(np.maximum(distances.min(1, keepdims=True), TINY))
        if self.metric != "whitened":
            return distances, nearest
        away = np.log(np.maximum(self.geometry.from_any_task(points, rest), TINY))[:, None]
        if self.geometry.axes is None:
            return distances + rest[:, None], away
        return distances, np.concatenate([nearest, away], 1)


def _longest(documents: TaskDocuments) -> npt.NDArray[np.bool_]:
    """Which pieces stand for their documents: the longest, the first of equals."""
    chosen = np.zeros(len(documents.tokens), dtype=np.bool_)
    for document in np.unique(documents.document):
        pieces = np.flatnonzero(documents.document == document)
        chosen[pieces[documents.tokens[pieces].argmax()]] = True
    return chosen


def _fold(document: npt.NDArray[np.integer], place: int) -> Indices:
    """Part in which a document is left out: neighbours together, for they often come from one source."""
    ids, number = np.unique(document, return_inverse=True)
    folds: Indices = (number * _FOLDS // len(ids) + place) % _FOLDS
    return folds


def _check(name: str, documents: TaskDocuments, shape: tuple[int, ...]) -> None:
    n_pieces = len(documents.tokens)
    if len(shape) != 2 or 0 in shape or documents.shares.shape != (n_pieces, *shape):
        raise PatternError(
            f"task {name} has document shares of shape {documents.shares.shape};"
            f" expected [{n_pieces}, layers, experts], the same for all tasks"
        )
    if not n_pieces:
        raise PatternError(f"task {name} has no documents to match with; profile it again")
    if documents.document.shape != documents.tokens.shape or documents.tokens.ndim != 1 or documents.tokens.min() < 1:
        raise PatternError(f"task {name} has documents without a token count; profile it again")
    _check_shares(documents.shares, f"task {name}")


def _check_shares(shares: npt.NDArray[np.floating], what: str) -> None:
    if not bool((np.isfinite(shares) & (shares >= 0)).all()):
        raise PatternError(f"{what} has shares that are negative or no numbers; trace its text again")
