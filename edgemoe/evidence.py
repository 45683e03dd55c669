"""What a pattern rests on: the profiling runs, where each document's tokens went, and measured quality."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

from edgemoe.errors import PatternError
from edgemoe.fingerprint import MAX_NAME

__all__ = [
    "MAX_DOCUMENTS",
    "DocumentShares",
    "QualityRow",
    "Source",
    "check_array",
    "check_task_name",
    "require",
]

Halves = npt.NDArray[np.float16]
Ints = npt.NDArray[np.int32]

MAX_DOCUMENTS = 128
"""Documents whose shares are kept; of more, an even sample is."""

_TASK = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_CHOICES = ("all", "auto")  # of /task
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Source:
    """One profiling run; a merged pattern has several.

    Attributes
    ----------
    task : str
        Task name of that run.
    calibration_hash : str
        `documents.calibration_hash` of its text.
    n_documents, n_tokens : int
        Size of that text; generated tokens count.
    chat_template : bool
        Whether the model's chat template was applied.
    answers : bool
        Whether the model's own answers were profiled too.
    """

    task: str
    calibration_hash: str
    n_documents: int
    n_tokens: int
    chat_template: bool
    answers: bool

    def __post_init__(self) -> None:
        check_task_name(self.task)
        require(_HASH.fullmatch(self.calibration_hash) is not None, "a calibration hash is not 64 hexadecimal digits")
        require(0 < self.n_documents <= self.n_tokens < 1 << 53, "a source has no documents or fewer tokens than that")


@dataclass(frozen=True, slots=True, eq=False)
class DocumentShares:
    """Where the tokens of documents went, for matching prompts to tasks.

    A document has a piece for what a prompt of its kind would be (its prompt, where it has one), and shorter
    ones for beginnings of that, from which a matcher learns how short texts scatter.

    Attributes
    ----------
    document : i32 [P]
        Number of the document that a piece is of, ascending.
    tokens : i32 [P]
        Tokens of each piece.
    shares : f16 [P, L, N]
        Share of a piece's router weight that each expert got, 0 to 1; a row adds up to 1.
    """

    document: Ints
    tokens: Ints
    shares: Halves

    def __post_init__(self) -> None:
        n_pieces = len(self.tokens)
        check_array(self.document, np.int32, (n_pieces,), "documents of pieces")
        check_array(self.tokens, np.int32, (n_pieces,), "tokens of pieces")
        require(bool((self.tokens >= 1).all()), "a piece of a document has no tokens")
        require(bool((np.diff(self.document, prepend=0) >= 0).all()), "documents of pieces do not ascend from 0")
        check_array(self.shares, np.float16, self.shares.shape, "document shares")
        require(self.shares.ndim == 3 and len(self.shares) == n_pieces, "document shares are not [pieces, L, N]")
        require(bool(((self.shares >= 0) & (self.shares <= 1)).all()), "a document share is not between 0 and 1")

    def __len__(self) -> int:
        return len(np.unique(self.document))

    def sample(self) -> DocumentShares:
        """At most `MAX_DOCUMENTS` of them, evenly spaced, so that each merged task keeps its part of the whole."""
        numbers, place = np.unique(self.document, return_inverse=True)
        if len(numbers) <= MAX_DOCUMENTS:
            return self
        chosen = np.linspace(0, len(numbers) - 1, MAX_DOCUMENTS).round().astype(np.intp)
        kept = np.isin(place, chosen)
        return DocumentShares(self.document[kept], self.tokens[kept], self.shares[kept])

    @classmethod
    def join(cls, parts: Sequence[DocumentShares]) -> DocumentShares:
        """All documents of several texts, numbered on."""
        ends = np.cumsum([0, *(part.document.max(initial=-1) + 1 for part in parts)])
        return cls(
            np.concatenate([part.document + end for part, end in zip(parts, ends, strict=False)]).astype(np.int32),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.shares for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class QualityRow:
    """Measured quality of one set of experts on one text; None where a figure was not measured.

    Attributes
    ----------
    expert_set : str
        Keep notation ("8/64"), or what else tells the set ("full").
    allocation, criterion : str
        How experts were spread over layers and ranked.
    mean_kept : float
        Experts kept per layer, averaged over layers.
    perplexity : float
        Of the text.
    perplexity_change : float
        Relative to the full model: 0.03 is 3 % worse.
    kl : float
        Mean KL divergence from the full model's next-token distribution, nats per token.
    top1_agreement : float
        Share of tokens whose most likely next token is the full model's, 0 to 1.
    text : str
        Which text, and whether it is of this task.
    seeds : int
        Runs averaged; 1 where nothing is random.
    """

    expert_set: str
    allocation: str
    criterion: str
    mean_kept: float
    perplexity: float | None
    perplexity_change: float | None
    kl: float | None
    top1_agreement: float | None
    text: str
    seeds: int

    def __post_init__(self) -> None:
        for words in (self.expert_set, self.allocation, self.criterion, self.text):
            require(len(words) <= MAX_NAME and words.isprintable(), "a quality row holds text that cannot be printed")
        for figure in (self.mean_kept, self.perplexity, self.perplexity_change, self.kl, self.top1_agreement):
            require(figure is None or isfinite(figure), "a quality row holds a figure that is not finite")
        require(self.seeds > 0, "a quality row counts no run")


def check_task_name(name: str) -> None:
    """Refuse what is no task name: 1 to 64 of a-z, 0-9, ``-`` and ``_``, the first a letter or digit.

    A name is also a file's name, on file systems that know no upper case too. Some are words of ``/task`` in a
    conversation.

    Raises
    ------
    PatternError
        With a name that would do, where there is one near.
    """
    if name in _CHOICES:
        raise PatternError(f"{name} cannot be a task's name, since /task {name} means another choice; use {name}-tasks")
    if _TASK.fullmatch(name):
        return
    near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:64].strip("-")
    raise PatternError(
        f"{name[:80]!a} cannot be a task's name, expected 1 to 64 characters of a-z, 0-9, - and _"
        + (f"; use {near}" if near else "; use a name like maths")
    )


def check_array(array: npt.NDArray[np.generic], dtype: npt.DTypeLike, shape: tuple[int, ...], what: str) -> None:
    """Refuse an array of another type or shape, or with a number that is not finite; `what` is plural."""
    if array.dtype != dtype or array.shape != shape:
        expected = f"{np.dtype(dtype)} of shape {shape}"
        raise PatternError(f"its {what} are {array.dtype} of shape {array.shape}, expected {expected}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise PatternError(f"its {what} hold a number that is not finite")


def require(condition: bool, otherwise: str) -> None:
    """Refuse what does not meet a condition."""
    if not condition:
        raise PatternError(otherwise)
