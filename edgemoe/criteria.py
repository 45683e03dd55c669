"""One family of criteria for how much a task needs an expert, after what the router, or the experts, did with its text.

Token x adds to expert i the contribution ::

    c_i(x) = [p_i(x) >= r] * f(s_i(x)) * g_i(x)^alpha * ||f_i(x)||^beta * change(x)^gamma
    score_i = sum_x c_i(x) / (|X|^(1-b) * N_i^b)

with s the router's logits, p their softmax over the k_a largest, g the router's weight, f_i the expert's output, N_i
the tokens routed to i, |X| all tokens. PEU, TCESS: PreMoe (arXiv 2505.17639) v3 eq. 1-4 and 10, and v1. (b, alpha,
beta): arXiv 2606.15716. REAP: arXiv 2510.13999. EASY-EP: arXiv 2504.06792.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["CRITERIA", "Criterion", "Transform"]

Transform = Literal["identity", "max-sigmoid", "one", "probability"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One member of the family.

    Without alpha, beta and gamma the sum goes over the experts of the k_a largest logits, which needs the router only.
    With any of them it goes over the experts the model really chose, and needs `ExpertOutputs`.

    Attributes
    ----------
    r : float or "adaptive"
        Least p of a token that counts. Adaptive: the mean of the largest p, per layer and task (PreMoe v3 eq. 4).
    f : str
        ``identity``: s. ``max-sigmoid``: max(s, sigmoid(s)), never negative. ``one``: 1. ``probability``: p.
    k_a : int or None
        Largest logits that count, None for all that were kept.
    b, alpha, beta, gamma : int
        Powers of the formula. b = 0 divides by all tokens, b = 1 by those routed to the expert.
    renormalise : bool
        Divide g by its sum over the token's chosen experts.

    Raises
    ------
    ValueError
        If r, f or k_a are set for a criterion of expert outputs, whose s and p need not be known.
    """

    r: float | Literal["adaptive"] = 0.0
    f: Transform = "one"
    k_a: int | None = None
    b: int = 0
    alpha: int = 0
    beta: int = 0
    gamma: int = 0
    renormalise: bool = False

    def __post_init__(self) -> None:
        if self.needs_outputs and (self.r, self.f, self.k_a) != (0.0, "one", None):
            raise ValueError("a criterion of expert outputs knows no r, f or k_a")

    @property
    def needs_outputs(self) -> bool:
        """Whether it reads `ExpertOutputs`."""
        return bool(self.alpha or self.beta or self.gamma)


CRITERIA: Mapping[str, Criterion] = {
    "peu": Criterion(r="adaptive", f="max-sigmoid"),
    # v1 of the paper names r but not its value: 0.15 is the smaller of the two fixed ones that v3 compares.
    "tcess": Criterion(r=0.15, f="identity"),
    "act-logits": Criterion(f="identity"),
    "frequency": Criterion(),
    "soft-count": Criterion(f="probability"),
    "task": Criterion(alpha=1, beta=1),
    "task2": Criterion(alpha=2, beta=2),
    "ean": Criterion(beta=1),
    "reap": Criterion(b=1, alpha=1, beta=1, renormalise=True),
    "man": Criterion(b=1, beta=1),
    "msan": Criterion(b=1, beta=2),
    "easy-ep": Criterion(alpha=1, beta=1, gamma=1),
}
"""Criteria by name; the first is the default of edgemoe."""
