"""How much a task needs each expert: a criterion of `edgemoe.criteria`, added up over the task's text.

Contributions, p and r are rounded to multiples of 2^-24. Sums of those are exact in float64 as long as they stay below
2^29 (more than five hundred million), so the same tokens give the same bits in any order, split or number of threads.
What is smaller than 2^-25, about 3e-8, counts as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from edgemoe.criteria import CRITERIA, Criterion, Transform
from edgemoe.errors import TraceError
from edgemoe.trace import RoutedTokens

__all__ = ["CRITERIA", "Accumulator", "Confidence", "Criterion", "accumulate", "confidence", "coverage", "score"]

GRID = 2.0**-24

Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Accumulator:
    """What a criterion adds up over a task's tokens.

    Attributes
    ----------
    criterion : Criterion
        What is added.
    layers : tuple of int
        The model's number of each of the L layers.
    sums : float64 array [L, N]
        Contributions.
    routed : int64 array [L, N]
        Tokens routed to the expert, whether or not they passed r.
    n_token : int
        All tokens.
    """

    criterion: Criterion
    layers: tuple[int, ...]
    sums: Doubles
    routed: Counts
    n_token: int

    def merge(self, other: Accumulator) -> Accumulator:
        """Add another text, or another task to make a generalist (PreMoe v3 eq. 11).

        Each part's sums were made with its own r; `score` of both texts at once would have one r for both.

        Raises
        ------
        TraceError
            If criterion, layers or number of experts differ.
        """
        if (self.criterion, self.layers, self.sums.shape) != (other.criterion, other.layers, other.sums.shape):
            raise TraceError(
                f"scores of {self.sums.shape} and {other.sums.shape} layers and experts differ in shape, layer numbers"
                " or criterion and cannot be added; score both texts with one model and criterion"
            )
        return Accumulator(
            self.criterion,
            self.layers,
            self.sums + other.sums,
            self.routed + other.routed,
            self.n_token + other.n_token,
        )

    def scores(self) -> Doubles:
        """Scores, float64 array [L, N]; 0 for an expert that no token was routed to.

        Raises
        ------
        TraceError
            If there was no token.
        """
        if not self.n_token:
            raise TraceError("no tokens to score; give some text")
        b = self.criterion.b
        tokens = np.float64(self.n_token) ** (1 - b) * np.maximum(self.routed, 1) ** b
        return np.asarray(self.sums / tokens)


@dataclass(frozen=True, slots=True)
class Confidence:
    """How sure the router is of its first choice: what an adaptive r is made of.

    Attributes
    ----------
    layers : tuple of int
        The model's number of each of the L layers.
    sums : float64 array [L]
        Largest p of each token, added up.
    n_token : int
        All tokens.
    """

    layers: tuple[int, ...]
    sums: Doubles
    n_token: int

    def merge(self, other: Confidence) -> Confidence:
        """Add another text of the same task.

        Raises
        ------
        TraceError
            If the layers differ.
        """
        if self.layers != other.layers:
            raise TraceError(
                f"texts of {len(self.layers)} and {len(other.layers)} layers are of different models; use one model"
            )
        return Confidence(self.layers, self.sums + other.sums, self.n_token + other.n_token)

    def threshold(self) -> Doubles:
        """Mean of the largest p, float64 array [L] (PreMoe v3 eq. 4).

        Raises
        ------
        TraceError
            If there was no token.
        """
        if not self.n_token:
            raise TraceError("no tokens to score; give some text")
        return self.sums / self.n_token


def score(parts: Iterable[RoutedTokens], criterion: Criterion) -> Accumulator:
    """Score a task's experts.

    Parameters
    ----------
    parts : iterable of RoutedTokens
        The task's text, piece by piece; one is in memory at a time. An adaptive r reads them twice, so give a list or
        an object that opens its files anew, not a generator.
    criterion : Criterion
        One of `CRITERIA` or another of the family.

    Raises
    ------
    TraceError
        If there is no text, pieces do not fit together, or they lack what the criterion needs.
    """
    if criterion.r != "adaptive":
        return accumulate(parts, criterion)
    sure = confidence(parts, criterion.k_a)
    scored = accumulate(parts, criterion, sure.threshold())
    if scored.n_token != sure.n_token:
        raise TraceError(
            f"{sure.n_token} tokens at the first reading, {scored.n_token} at the second; keep the text as it is"
            " until it is scored"
        )
    return scored


def confidence(parts: Iterable[RoutedTokens], k_a: int | None = None) -> Confidence:
    """Add up the largest p of each token and layer.

    Parameters
    ----------
    parts : iterable of RoutedTokens
        Text, piece by piece.
    k_a : int, optional
        Logits of the softmax, None for all that were kept.

    Raises
    ------
    TraceError
        If there is no text, pieces do not fit together, or fewer than k_a logits were kept.
    """
    from edgemoe.score_kernels import top_probability

    total: Confidence | None = None
    for part in parts:
        sums = np.zeros(len(part.layers))
        top_probability(_first(part.logits, k_a), sums)
        piece = Confidence(part.layers, sums, part.n_token)
        total = total.merge(piece) if total else piece
    if not total:
        raise TraceError("no routed tokens to score; record some text first")
    return total


def accumulate(parts: Iterable[RoutedTokens], criterion: Criterion, threshold: Doubles | None = None) -> Accumulator:
    """Add up a criterion's contributions in one reading.

    Parameters
    ----------
    parts : iterable of RoutedTokens
        Text, piece by piece; a generator will do.
    criterion : Criterion
        What to add.
    threshold : float64 array [L], optional
        r of each layer; needed if the criterion's is adaptive (`Confidence.threshold`), else the criterion's counts.

    Raises
    ------
    TraceError
        If there is no text, pieces do not fit together, or they lack what the criterion needs.
    """
    total: Accumulator | None = None
    for part in parts:
        piece = Accumulator(
            criterion,
            part.layers,
            np.zeros((len(part.layers), part.n_expert)),
            np.zeros((len(part.layers), part.n_expert), np.int64),
            part.n_token,
        )
        if criterion.needs_outputs:
            _add_outputs(part, piece)
        else:
            _add_router(part, piece, threshold)
        total = total.merge(piece) if total else piece
    if not total:
        raise TraceError("no routed tokens to score; record some text first")
    return total


def coverage(mass: npt.NDArray[np.floating] | Counts, n: int) -> Doubles:
    """Share of each layer's mass that its n largest experts hold.

    Parameters
    ----------
    mass : float or int array [L, N]
        Scores, or tokens routed; not negative.
    n : int
        Experts, 0 to N.

    Returns
    -------
    float64 array [L]
        0 to 1. A layer without any mass tells no experts apart: n / N.

    Raises
    ------
    TraceError
        If there are fewer than n experts, or mass is negative, as TCESS may be.
    """
    n_expert = mass.shape[1]
    if not 0 <= n <= n_expert:
        raise TraceError(f"coverage of {n} experts asked for, but a layer has {n_expert}; choose 0 to {n_expert}")
    if not np.all(mass >= 0):
        raise TraceError("coverage is a share of mass that is not negative; use peu, frequency or tokens routed")
    ranked = -np.sort(-mass.astype(np.float64), axis=1)
    total = ranked.sum(axis=1)
    return np.asarray(np.where(total > 0, ranked[:, :n].sum(axis=1) / np.where(total > 0, total, 1), n / n_expert))


def _add_router(part: RoutedTokens, total: Accumulator, threshold: Doubles | None) -> None:
    from edgemoe.score_kernels import router_sums

    criterion = total.criterion
    if criterion.r != "adaptive":
        threshold = np.full(len(part.layers), criterion.r)
    elif threshold is None or len(threshold) != len(part.layers):
        raise TraceError(f"an adaptive r takes a threshold for each of {len(part.layers)} layers; see confidence()")
    transform = get_args(Transform).index(criterion.f)
    ids, logits = _first(part.ids, criterion.k_a), _first(part.logits, criterion.k_a)
    router_sums(ids, logits, _on_grid(threshold), transform, total.sums, total.routed)


def _add_outputs(part: RoutedTokens, total: Accumulator) -> None:
    from edgemoe.score_kernels import output_sums

    criterion, outputs = total.criterion, part.outputs
    if outputs is None:
        raise TraceError("the criterion needs expert outputs, which were not recorded; record them or use peu")
    if criterion.gamma:
        unknown = np.isnan(outputs.change).all(axis=1) & (part.n_token > 0)
        if unknown.any():
            raise TraceError(
                f"nothing is known of how layer {part.layers[int(unknown.argmax())]} changes its input, which the"
                " criterion needs; use task or peu"
            )
    output_sums(
        np.ascontiguousarray(outputs.ids),
        np.ascontiguousarray(outputs.weights),
        np.ascontiguousarray(outputs.norms),
        np.ascontiguousarray(outputs.change),
        (criterion.alpha, criterion.beta, criterion.gamma),
        criterion.renormalise,
        total.sums,
        total.routed,
    )


def _first(array: npt.NDArray[Any], k_a: int | None) -> npt.NDArray[Any]:
    """Keep the first k_a of the last axis, contiguous."""
    kept = array.shape[2]
    if k_a is not None and not 1 <= k_a <= kept:
        raise TraceError(f"k_a is {k_a} but {kept} logits of each token were kept; record the text with k_a {k_a}")
    return np.ascontiguousarray(array[:, :, :k_a])


def _on_grid(values: Doubles) -> Doubles:
    return np.asarray(np.rint(values / GRID) * GRID)
