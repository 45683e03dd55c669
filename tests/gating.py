"""Routing in NumPy: which experts a token gets and how they are weighted, for each of llama.cpp's gating functions.

After the papers: softmax over all experts (Mixtral, arXiv 2401.04088), sigmoid with a bias that counts for selection
only and with groups (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16), softmax over the chosen ones (gpt-oss).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Gating:
    """How an architecture routes.

    `score` is softmax, sigmoid, sqrt-softplus, chosen-softmax (of the chosen experts' logits) or chosen-sigmoid
    (llama4: chosen by logit). `n_group` and `n_group_used` are DeepSeek's groups; 0 for none.
    """

    score: str
    normalised: bool = False
    scale: float = 1.0
    n_group: int = 0
    n_group_used: int = 0

    def route(
        self, logits: Floats, n_used: int, *, kept: list[int] | None = None, selection_bias: Floats | None = None
    ) -> tuple[Ids, Floats]:
        """The ids and weights of each token, best first: both [n_tokens, n_used].

        With `kept`, those of a model that has only these experts, renumbered as in the full one.
        """
        ids = np.arange(logits.shape[1]) if kept is None else np.asarray(kept)
        logits = logits[:, ids]
        scores = _scores(self.score, logits)
        selection = logits if self.score.startswith("chosen") else scores
        if selection_bias is not None:
            selection = selection + selection_bias[ids]
        if self.n_group > 1:
            selection = self._best_groups(selection)
        # float32 as in ggml, because sigmoids near 1 are equal there, and the lower of two equal experts comes first.
        chosen = np.argsort(-selection, axis=1, kind="stable")[:, :n_used]
        weights = np.take_along_axis(scores, chosen, axis=1)
        if self.score == "chosen-softmax":
            weights = _softmax(weights)
        if self.normalised:
            weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), np.float32(2.0**-14))
        return ids[chosen], np.asarray(weights * np.float32(self.scale))

    def _best_groups(self, selection: Floats) -> Floats:
        """-inf for experts outside the groups with the best sums of two."""
        groups = selection.reshape(len(selection), self.n_group, -1)
        sums = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)
        best = np.argsort(-sums, axis=1, kind="stable")[:, : self.n_group_used]
        allowed = np.zeros(sums.shape, bool)
        np.put_along_axis(allowed, best, True, axis=1)
        return np.where(allowed[:, :, None], groups, -np.inf).reshape(selection.shape)


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _scores(score: str, logits: Floats) -> Floats:
    match score:
        case "softmax":
            return _softmax(logits)
        case "sigmoid" | "chosen-sigmoid":
            return 1 / (1 + np.exp(-logits))
        case "sqrt-softplus":
            return np.sqrt(np.log1p(np.exp(logits)))
        case "chosen-softmax":
            return logits
    raise ValueError(score)


_SOFTMAX = Gating("softmax")
_NORMALISED = Gating("softmax", normalised=True)
_DEEPSEEK = Gating("sigmoid", normalised=True, scale=2.5)
_DEEPSEEK_GROUPS = Gating("sigmoid", normalised=True, scale=2.5, n_group=4, n_group_used=2)

GATINGS: dict[str, Gating] = {
    "qwen3moe": _NORMALISED,
    "llama": _NORMALISED,
    "olmoe": _SOFTMAX,
    "qwen2moe": _SOFTMAX,
    "ernie4_5-moe": _NORMALISED,  # with a selection bias
    "deepseek2": _DEEPSEEK_GROUPS,
    "bailingmoe2": _DEEPSEEK_GROUPS,
    "glm4moe": _DEEPSEEK,
    "minimax-m2": Gating("sigmoid", normalised=True),
    "smallthinker": Gating("sigmoid", normalised=True),  # without a selection bias
    "cohere2moe": Gating("sigmoid"),
    "gpt-oss": Gating("chosen-softmax"),
    "llama4": Gating("chosen-sigmoid"),
    "deepseek4": Gating("sqrt-softplus", normalised=True, scale=2.5),
    "gemma4": _NORMALISED,
    "granitehybrid": _NORMALISED,
    "jamba": _SOFTMAX,
    "lfm2moe": Gating("sigmoid", normalised=True),
    "qwen3next": _NORMALISED,
    "nemotron_h_moe": _DEEPSEEK,
}
