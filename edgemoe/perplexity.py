"""What a limited set of experts costs: perplexity and divergence from the full model on the same text.

Each window of text is evaluated once by the full model, whose log-probabilities stay in memory until every set has had
its turn: one float32 array [T, n_vocab] at a time, besides the logits that llama.cpp itself hands over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemoe.errors import BackendError
from edgemoe.expert_set import ExpertSet

if TYPE_CHECKING:
    from edgemoe.backend import Llama

__all__ = ["Figures", "measure", "measuring_bytes"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_CHUNK = 1 << 20
"""Logits that are worked on at once: temporary arrays stay at 4 MiB each whatever the vocabulary."""


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """Sums over the tokens of each of W windows, all float64 [W].

    Attributes
    ----------
    tokens : float64 [W]
        Predicted tokens.
    nll, full_nll : float64 [W]
        Negative log-likelihood of the text's own next tokens, with the set and with the full model, nats.
    divergence : float64 [W]
        KL(full || set) of the next-token distributions, nats.
    agreed : float64 [W]
        Tokens after which both think the same next token most likely.
    """

    tokens: Doubles
    nll: Doubles
    full_nll: Doubles
    divergence: Doubles
    agreed: Doubles

    @classmethod
    def joined(cls, parts: Sequence[Figures]) -> Figures:
        """Join measurements of different windows; at least one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in _SUMS))

    def with_run(self, other: Figures) -> Figures:
        """Add another run over the same windows, as of another random set: windows stay what is compared."""
        return Figures(*(getattr(self, name) + getattr(other, name) for name in _SUMS))

    @property
    def loss(self) -> float:
        """Mean change of the negative log-likelihood against the full model, nats per token."""
        return float((self.nll - self.full_nll).sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float | None:
        """Standard error of `loss` over windows, nats per token; None for a single window."""
        n_window = len(self.tokens)
        if n_window < 2:
            return None
        each = (self.nll - self.full_nll) / self.tokens
        return float(each.std(ddof=1) / math.sqrt(n_window))

    @property
    def perplexity(self) -> float:
        """Of the text with the set."""
        return math.exp(self.nll.sum() / self.tokens.sum())

    @property
    def full_perplexity(self) -> float:
        """Of the text with the full model."""
        return math.exp(self.full_nll.sum() / self.tokens.sum())

    @property
    def perplexity_change(self) -> float:
        """Relative to the full model: 0.03 is 3 % worse."""
        return math.expm1(self.loss)

    @property
    def kl(self) -> float:
        """Mean KL divergence from the full model, nats per token."""
        return float(self.divergence.sum() / self.tokens.sum())

    @property
    def top1_agreement(self) -> float:
        """Share of tokens, 0 to 1."""
        return float(self.agreed.sum() / self.tokens.sum())


_SUMS = ("tokens", "nll", "full_nll", "divergence", "agreed")


def measure(
    llama: Llama,
    windows: Sequence[Sequence[int]],
    sets: Sequence[ExpertSet],
    on_progress: Callable[[], None] | None = None,
) -> list[Figures]:
    """Measure sets of experts on the same windows of text.

    Parameters
    ----------
    llama : Llama
        Opened with ``logits_all=True``. Whatever happens, all experts are allowed again afterwards; the context is
        left with text of the measurement.
    windows : sequence of sequence of int
        Tokens; the model sees all but the last of each window, and predicts all but the first.
    sets : sequence of ExpertSet
        What to compare with the full model.
    on_progress : callable, optional
        Called after each evaluation of a window, of which there are ``len(windows) * (1 + len(sets))``.

    Returns
    -------
    list of Figures
        One for each set.

    Raises
    ------
    BackendError
        If a window does not fit the context or has fewer than two tokens, or the model gives a logit that is no number.
    EdgemoeError
        What evaluating raises.
    """
    progress = on_progress or (lambda: None)
    found: list[list[Figures]] = [[] for _ in sets]
    try:
        for window in windows:
            targets = np.array(window[1:], np.int64)
            llama.residency.limit(None)
            reference = _Reference(_logits(llama, window), targets)
            progress()
            for figures, chosen in zip(found, sets, strict=True):
                llama.residency.limit(chosen)
                figures.append(reference.compare(_logits(llama, window), targets))
                progress()
    finally:
        llama.residency.limit(None)
    return [Figures.joined(figures) for figures in found]


def measuring_bytes(n_ctx: int, n_vocab: int) -> int:
    """Memory that `measure` takes beside the model, for the budget's plan."""
    return 4 * n_ctx * n_vocab + 6 * 4 * max(_CHUNK, n_vocab)


class _Reference:
    """The full model's log-probabilities of one window."""

    def __init__(self, logits: Floats, targets: npt.NDArray[np.int64]) -> None:
        self._log_p = np.empty_like(logits)
        for rows in _chunks(logits):
            _log_softmax(logits[rows], self._log_p[rows])
        self._likeliest = logits.argmax(axis=1)
        self._nll = _negative_sum(self._log_p, targets)
        if not math.isfinite(self._nll):
            raise BackendError(
                "the full model gives logits that are no finite numbers; the file is damaged or its quantization"
                " broken, try another one"
            )

    def compare(self, logits: Floats, targets: npt.NDArray[np.int64]) -> Figures:
        """Measure the logits [T, n_vocab] of a set of experts on the same window."""
        nll = divergence = 0.0
        log_q = np.empty((_rows_at_once(logits.shape[1]), logits.shape[1]), np.float32)
        for rows in _chunks(logits):
            part = log_q[: rows.stop - rows.start]
            _log_softmax(logits[rows], part)
            nll += _negative_sum(part, targets[rows])
            log_p = self._log_p[rows]
            np.subtract(log_p, part, out=part)
            part *= np.exp(log_p)
            divergence += float(part.sum(dtype=np.float64))
        agreed = (logits.argmax(axis=1) == self._likeliest).sum()
        sums = (len(targets), nll, self._nll, divergence, agreed)
        return Figures(*(np.array([value], np.float64) for value in sums))


def _logits(llama: Llama, window: Sequence[int]) -> Floats:
    """Evaluate all but the last token, [T, n_vocab]; a view that the next evaluation overwrites."""
    n_tokens = len(window) - 1
    # llama.cpp rounds its context up, llama_cpp.Llama keeps logits of what was asked for.
    room = min(llama.n_ctx(), len(llama.scores))
    if not 0 < n_tokens <= room:
        raise BackendError(
            f"a window of {len(window)} tokens cannot be measured within a context of {room}; give 2 to {room + 1}"
            " tokens"
        )
    llama.reset()
    llama.eval(list(window[:-1]))
    logits: Floats = llama.scores[:n_tokens]
    return logits


def _rows_at_once(n_vocab: int) -> int:
    return max(1, _CHUNK // n_vocab)


def _chunks(logits: Floats) -> list[slice]:
    n_tokens, step = len(logits), _rows_at_once(logits.shape[1])
    return [slice(start, min(start + step, n_tokens)) for start in range(0, n_tokens, step)]


def _log_softmax(logits: Floats, out: Floats) -> None:
    np.subtract(logits, logits.max(axis=1, keepdims=True), out=out)
    out -= np.log(np.exp(out).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _negative_sum(log_p: Floats, targets: npt.NDArray[np.int64]) -> float:
    return -float(np.take_along_axis(log_p, targets[:, None], axis=1).sum(dtype=np.float64))
