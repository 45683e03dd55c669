"""What a task asks of a model's experts: a score for each expert, the ranking, and what the documents looked like.

The ranking is kept as PreMoe's compact pattern (arXiv 2505.17639 v1, TAER): the score vector of the first MoE layer,
and for each later layer a permutation that maps "the expert at rank n of the first layer" to "the expert at rank n of
this one". One pattern therefore serves every budget M. Order alone cannot weigh layers against each other, so the
scores of all criteria are kept beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edgemoe.errors import PatternError, PatternMismatchError
from edgemoe.evidence import (
    MAX_DOCUMENTS,
    DocumentShares,
    QualityRow,
    Source,
    check_array,
    check_task_name,
    require,
)
from edgemoe.fingerprint import ModelFingerprint
from edgemoe.loss_curves import LossCurves

__all__ = ["Pattern", "make_pattern", "merge", "renumbered"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.uint8 | np.uint16]

_MAX_CRITERIA = 64
_MAX_SOURCES = 256
_MAX_ROWS = 4096
_LABEL = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


@dataclass(frozen=True, eq=False)
class Pattern:
    """A profiled task, bound to one model; all that is wrong with its parts raises a `PatternError`.

    Attributes
    ----------
    task : str
        Name, see `check_task_name`.
    fingerprint : ModelFingerprint
        The model; gives L layers and N experts.
    criterion : str
        Key of `scores` that the ranking follows.
    scores : Mapping of str to f32 [L, N]
        Score of each expert under each criterion. Read from a file they are rounded to 11 bits, the ranking is not.
    vector : f32 [N]
        Exact scores of the first MoE layer.
    permutations : u8 or u16 [L-1, N]
        ``permutations[l - 1][order[n]]`` is the expert at rank n of layer l, with ``order`` the ranking of `vector`;
        u8 where N <= 256.
    sources : tuple of Source
        The profiling runs in it.
    documents : DocumentShares
        Routing of documents, for the matcher.
    sensitivity : LossCurves or None
        What each layer loses when it keeps few experts, where that was measured.
    quality : tuple of QualityRow
        Measured quality, empty where it was not measured.
    """

    task: str
    fingerprint: ModelFingerprint
    criterion: str
    scores: Mapping[str, Floats]
    vector: Floats
    permutations: Ids
    sources: tuple[Source, ...]
    documents: DocumentShares
    sensitivity: LossCurves | None = None
    quality: tuple[QualityRow, ...] = ()

    def __post_init__(self) -> None:
        check_task_name(self.task)
        n_layers, n_expert = len(self.layers), self.n_expert
        require(self.criterion in self.scores, "its ranking follows a criterion that it has no scores of")
        require(len(self.scores) <= _MAX_CRITERIA, f"it has more than {_MAX_CRITERIA} criteria")
        for name, scores in self.scores.items():
            require(_LABEL.fullmatch(name) is not None, "a criterion's name is not letters, digits, dots and dashes")
            check_array(scores, np.float32, (n_layers, n_expert), "scores")
        check_array(self.vector, np.float32, (n_expert,), "vector")
        check_array(self.permutations, _id_type(n_expert), (n_layers - 1, n_expert), "permutations")
        bijective = np.sort(self.permutations, axis=1) == np.arange(n_expert)
        require(bool(bijective.all()), "a permutation names an expert twice")
        require(0 < len(self.sources) <= _MAX_SOURCES, f"it has no source or more than {_MAX_SOURCES}")
        require(len(self.documents) <= MAX_DOCUMENTS, f"it has shares of more than {MAX_DOCUMENTS} documents")
        require(self.documents.shares.shape[1:] == (n_layers, n_expert), "document shares are of another shape")
        if self.sensitivity is not None:
            curves = (len(self.sensitivity.loss), self.sensitivity.n_expert)
            require(curves == (n_layers, n_expert), "its loss curves are of another number of layers or experts")
        require(len(self.quality) <= _MAX_ROWS, f"it has more than {_MAX_ROWS} quality rows")

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's MoE layers, ascending."""
        return self.fingerprint.layers

    @property
    def n_expert(self) -> int:
        """Experts per layer."""
        return self.fingerprint.n_expert

    @property
    def n_tokens(self) -> int:
        """Tokens profiled, all sources together."""
        return sum(source.n_tokens for source in self.sources)

    @property
    def n_documents(self) -> int:
        """Documents profiled, all sources together; `documents` may hold a sample of them."""
        return sum(source.n_documents for source in self.sources)

    @cached_property
    def rankings(self) -> Ids:
        """Experts of each layer from best to worst, [L, N]: the compact pattern decoded."""
        order = _descending(self.vector)
        return np.concatenate([order[None].astype(self.permutations.dtype), self.permutations[:, order]])

    @cached_property
    def rank_scores(self) -> Floats:
        """The ranking as scores, f32 [L, N]: N for a layer's best expert, 1 for its worst.

        Where experts are compared within their layer these are exact, while stored scores are rounded.
        """
        scores = np.empty(self.rankings.shape, np.float32)
        descending = np.arange(self.n_expert, 0, -1).astype(np.float32)
        np.put_along_axis(scores, self.rankings.astype(np.intp), descending[None], 1)
        return scores

    def note_for(self, model: ModelFingerprint) -> str | None:
        """Compare the model this was made for with the one it is to serve.

        Returns
        -------
        str or None
            A sentence for the user when the same model is quantized otherwise, None when nothing differs.

        Raises
        ------
        PatternMismatchError
            If it is another model.
        """
        mine = self.fingerprint
        shape = (mine.router, mine.layers, mine.n_expert, mine.n_expert_used)
        if shape != (model.router, model.layers, model.n_expert, model.n_expert_used):
            raise PatternMismatchError(
                f"task {self.task!r} was profiled with {mine}, whose experts are not those of {model};"
                " profile it with this model"
            )
        if mine.quantization == model.quantization:
            return None
        return (
            f"task {self.task!r} was profiled with {mine.quantization_name} and serves {model.quantization_name}:"
            " the ranking holds, measured quality may differ"
        )


def make_pattern(
    task: str,
    fingerprint: ModelFingerprint,
    criterion: str,
    scores: Mapping[str, Floats],
    source: Source,
    documents: DocumentShares,
    sensitivity: LossCurves | None = None,
    quality: Sequence[QualityRow] = (),
) -> Pattern:
    """Make a pattern of the scores of one profiling run; parameters as the attributes of `Pattern`.

    Raises
    ------
    PatternError
        If shapes, types or names do not fit, or a score is not finite.
    """
    check_task_name(task)
    return _ranked(task, fingerprint, criterion, scores, (source,), documents, sensitivity, tuple(quality))


def merge(patterns: Sequence[Pattern], task: str) -> Pattern:
    """Merge tasks into one, token-weighted: the generalist of PreMoE (arXiv 2505.17639 v3, eq. 11).

    Exact for criteria that divide by all tokens, up to the rounding of stored scores. Criteria that only some of the
    patterns have are left out; so are sensitivity and quality, which were measured for other rankings.

    Parameters
    ----------
    patterns : sequence of Pattern
        At least one, all of one model and with the same main criterion.
    task : str
        Name of the result.

    Raises
    ------
    PatternError
        If there is none, one comes twice, they are of different models or their rankings follow different criteria.
    """
    if not patterns:
        raise PatternError(f"nothing to merge into task {task!r}; name the tasks it is to be made of")
    counts = Counter(pattern.task for pattern in patterns)
    twice = next((name for name, n in counts.items() if n > 1), None)
    if twice is not None:
        raise PatternError(f"task {twice} is given {counts[twice]} times, each counting its text again; name it once")
    first = patterns[0]
    for other in patterns[1:]:
        other.note_for(first.fingerprint)
        if other.criterion != first.criterion:
            raise PatternError(
                f"task {first.task!r} is ranked by {first.criterion} and task {other.task!r} by {other.criterion};"
                " profile one of them again with the other's criterion"
            )
    names = [name for name in first.scores if all(name in other.scores for other in patterns)]
    weights = np.array([pattern.n_tokens for pattern in patterns], dtype=np.float64)
    weights /= weights.sum()
    scores = {}
    for name in names:
        stacked = np.stack([pattern.scores[name] for pattern in patterns]).astype(np.float64)
        scores[name] = np.tensordot(weights, stacked, 1).astype(np.float32)
    sources = tuple(source for pattern in patterns for source in pattern.sources)
    return _ranked(
        task, first.fingerprint, first.criterion, scores, sources, DocumentShares.join([p.documents for p in patterns])
    )


def renumbered(pattern: Pattern, experts: npt.NDArray[np.integer], fingerprint: ModelFingerprint) -> Pattern:
    """Give the pattern of a model whose experts were put in another order.

    Parameters
    ----------
    pattern : Pattern
        Of the model as it was.
    experts : int [L, N]
        Former numbers of each layer's experts, in their new order.
    fingerprint : ModelFingerprint
        The model as it is now.

    Raises
    ------
    PatternError
        If a row is no permutation, or the model is of another size.
    """
    ids = experts.astype(np.intp)
    complete = ids.shape == pattern.rankings.shape and bool((np.sort(ids, axis=1) == np.arange(pattern.n_expert)).all())
    require(complete, "the new order does not name every expert of every layer once")
    vector = pattern.vector[ids[0]]
    rankings = np.take_along_axis(np.argsort(ids, axis=1), pattern.rankings.astype(np.intp), 1)
    permutations = np.empty_like(pattern.permutations)
    permutations[:, _descending(vector)] = rankings[1:]
    return replace(
        pattern,
        fingerprint=fingerprint,
        scores={name: np.take_along_axis(scores, ids, 1) for name, scores in pattern.scores.items()},
        vector=vector,
        permutations=permutations,
        documents=replace(pattern.documents, shares=np.take_along_axis(pattern.documents.shares, ids[None], 2)),
    )


def _ranked(
    task: str,
    fingerprint: ModelFingerprint,
    criterion: str,
    scores: Mapping[str, Floats],
    sources: tuple[Source, ...],
    documents: DocumentShares,
    sensitivity: LossCurves | None = None,
    quality: tuple[QualityRow, ...] = (),
) -> Pattern:
    """Encode the ranking by one criterion, and leave all checks to `Pattern`."""
    require(criterion in scores, f"task {task!r} is to be ranked by {criterion}, of which there are no scores")
    main = scores[criterion]
    check_array(main, np.float32, (len(fingerprint.layers), fingerprint.n_expert), "scores")
    permutations = np.empty((len(main) - 1, main.shape[1]), dtype=_id_type(fingerprint.n_expert))
    permutations[:, _descending(main[0])] = _descending(main[1:])
    return Pattern(
        task=task,
        fingerprint=fingerprint,
        criterion=criterion,
        scores=dict(scores),
        vector=main[0].copy(),
        permutations=permutations,
        sources=sources,
        documents=documents.sample(),
        sensitivity=sensitivity,
        quality=quality,
    )


def _descending(scores: Floats) -> npt.NDArray[np.intp]:
    """Positions from the highest score to the lowest along the last axis, ties by lower position."""
    return np.argsort(-scores, axis=-1, kind="stable")


def _id_type(n_expert: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if n_expert <= 256 else np.uint16
