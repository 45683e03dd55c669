"""Where a text's tokens are routed: shares of the experts, which is what texts are compared by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgemoe.trace import RoutedTokens, RouterTrace, top_k

__all__ = ["RoutedShares", "place_of", "routed_shares"]


class RoutedShares:
    """Where a text's tokens are routed, batch by batch: what is compared with tasks.

    Parameters
    ----------
    layers : sequence of int
        MoE layers that are heard.
    n_expert : int
        Experts of a layer: N.
    k_a : int
        Logits of a token that count, as many as in the texts it is compared with.
    counted : slice, optional
        Which tokens of the text count; all by default.

    Attributes
    ----------
    n_token : int
        Tokens counted so far.
    """

    def __init__(self, layers: Sequence[int], n_expert: int, k_a: int, counted: slice | None = None) -> None:
        self.layers = tuple(layers)
        self.n_token = 0
        self._counted = counted
        self._n_heard = 0
        self._k_a = k_a
        self._sums = np.zeros((len(self.layers), n_expert))

    def add(self, trace: RouterTrace) -> None:
        """Add a batch; layer by layer, which takes little memory."""
        n_batch = trace.logits.shape[1]
        first, end = 0, n_batch
        if self._counted is not None:
            first, end = (min(max(at - self._n_heard, 0), n_batch) for at in (self._counted.start, self._counted.stop))
        self._n_heard += n_batch
        self.n_token += end - first
        for row, layer in enumerate(trace.layers):
            one = top_k(RouterTrace((layer,), trace.logits[row : row + 1, first:end]), self._k_a, compiled=False)
            self._sums[row] += routed_shares(one, slice(0, one.n_token))[0] * one.n_token

    def shares(self) -> npt.NDArray[np.float32]:
        """Mean over the tokens, f32 [L, N]; a row adds up to 1."""
        return (self._sums / max(self.n_token, 1)).astype(np.float32)


def routed_shares(routed: RoutedTokens, counted: slice) -> npt.NDArray[np.float64]:
    """Share of these tokens' router weight that each expert got, [L, N]: softmax over each token's top-k."""
    ids, logits = routed.ids[:, counted], routed.logits[:, counted].astype(np.float64)
    weights = np.exp(logits - logits[..., :1])
    weights /= weights.sum(axis=-1, keepdims=True)
    cells = np.arange(len(ids))[:, None, None] * routed.n_expert + ids
    sums = np.bincount(cells.ravel(), weights.ravel(), len(ids) * routed.n_expert)
    return np.asarray(sums.reshape(len(ids), routed.n_expert) / max(ids.shape[1], 1))


def place_of(said: Sequence[int], tokens: Sequence[int]) -> slice:
    """Which of a prompt's tokens count: what was said last, wherever the chat template put it.

    The template's own words are the same whatever the topic. The ends of what was said may have grown together with
    them and are left out; where nothing is left or found, all tokens count.
    """
    inner = list(said[1:-1])
    for at in range(len(tokens) - len(inner), -1, -1) if inner else ():
        if tokens[at] == inner[0] and list(tokens[at : at + len(inner)]) == inner:
            return slice(at, at + len(inner))
    return slice(0, len(tokens))
