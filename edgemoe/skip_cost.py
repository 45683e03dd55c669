"""What skipping low-weight misses costs and saves: perplexity and bytes read of text that is decoded token by token.

Perplexity by whole batches would not show it, since prompts are never skipped. Each window of text is therefore taken
as a prompt (its first half) and an answer (the rest), which the model decodes one token at a time as if it had said it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemoe.errors import BackendError
from edgemoe.llama_library import C

if TYPE_CHECKING:
    from edgemoe.backend import Llama

__all__ = ["SkipCost", "measure_skipping"]

_PROMPT_PART = 2
"""One part in this many of a window is its prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class SkipCost:
    """One bound, measured on W windows.

    Attributes
    ----------
    skip_mass : float
        The bound; 0 is the exact model.
    tokens : float64 [W]
        Decoded tokens.
    nll : float64 [W]
        Negative log-likelihood of the tokens that follow them in the text, nats.
    bytes_read : int
        Expert bytes read while these were decoded.
    skipped_share, skipped_mass : float
        Share of their routings, and of the router's weights, that was left out, 0 to 1.
    """

    skip_mass: float
    tokens: npt.NDArray[np.float64]
    nll: npt.NDArray[np.float64]
    bytes_read: int
    skipped_share: float
    skipped_mass: float

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return math.exp(self.nll.sum() / self.tokens.sum())

    @property
    def bytes_per_token(self) -> float:
        """Expert bytes read for each decoded token."""
        return self.bytes_read / float(self.tokens.sum())

    def perplexity_change(self, exact: SkipCost) -> float:
        """Relative to the exact model on the same windows: 0.03 is 3 % worse."""
        return math.expm1(float((self.nll - exact.nll).sum() / self.tokens.sum()))

    def standard_error(self, exact: SkipCost) -> float | None:
        """Give the standard error over windows of the mean difference, nats per token; None for a single window."""
        each = (self.nll - exact.nll) / self.tokens
        return float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None


def measure_skipping(
    llama: Llama,
    windows: Sequence[Sequence[int]],
    bounds: Sequence[float],
    on_progress: Callable[[], None] | None = None,
) -> list[SkipCost]:
    """Decode the same windows of text with each bound in turn.

    Parameters
    ----------
    llama : Llama
        Its own `skip_mass` is in force again afterwards, its context is empty.
    windows : sequence of sequence of int
        Tokens, at least three each; the last is only predicted.
    bounds : sequence of float
        Values of `Llama.skip_mass`.
    on_progress : callable, optional
        Called after each window of each bound.

    Raises
    ------
    BackendError
        If a window is too short or does not fit the context, or the model gives a logit that is no number.
    EdgemoeError
        What evaluating raises.
    """
    room = llama.n_ctx()
    for window in windows:
        if not 2 < len(window) <= room + 1:
            raise BackendError(
                f"a window of {len(window)} tokens cannot be decoded within a context of {room}; give 3 to {room + 1}"
                " tokens"
            )
    before = llama.skip_mass
    try:
        return [_cost(llama, windows, bound, on_progress or (lambda: None)) for bound in bounds]
    finally:
        llama.skip_mass = before


def _cost(llama: Llama, windows: Sequence[Sequence[int]], bound: float, on_progress: Callable[[], None]) -> SkipCost:
    llama.skip_mass = bound
    llama.eval(list(windows[-1][:-1]))  # so that each bound starts with the same text's experts in memory
    nll = np.zeros(len(windows))
    tokens = np.zeros(len(windows))
    bytes_read = 0
    start = llama.store.stats()
    for number, window in enumerate(windows):
        n_prompt = max(1, (len(window) - 1) // _PROMPT_PART)
        llama.reset()
        llama.eval(list(window[:n_prompt]))
        read_before = llama.store.stats().bytes_read
        for token, following in zip(window[n_prompt:-1], window[n_prompt + 1 :], strict=True):
            llama.eval([token])
            logits = np.ctypeslib.as_array(C.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),))
            nll[number] += _nll(logits, following)
        tokens[number] = len(window) - 1 - n_prompt
        bytes_read += llama.store.stats().bytes_read - read_before
        on_progress()
    end = llama.store.stats()
    if not np.isfinite(nll).all():
        raise BackendError(
            "the model gives logits that are no finite numbers; the file is damaged or its quantization broken, try"
            " another one"
        )
    slots, passed = end.routed_slots - start.routed_slots, end.routed_layers - start.routed_layers
    return SkipCost(
        bound,
        tokens,
        nll,
        bytes_read,
        (end.skipped_slots - start.skipped_slots) / max(slots, 1),
        (end.skipped_mass - start.skipped_mass) / max(passed, 1),
    )


def _nll(logits: npt.NDArray[np.float32], token: int) -> float:
    shifted = logits.astype(np.float64) - logits.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[token])
