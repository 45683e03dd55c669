"""What a task's set of experts is expected to cost, read off the quality that was measured for it."""

from __future__ import annotations

import math
from itertools import pairwise

from edgemoe.errors import BudgetError
from edgemoe.evidence import QualityRow
from edgemoe.keep import Keep
from edgemoe.pattern import Pattern

__all__ = ["ALLOCATIONS", "SAFE_CHANGE", "expected_cost", "safe_point"]

ALLOCATIONS = ("measured", "mass", "uniform")
"""Ways to spread experts over layers, the best one first."""


SAFE_CHANGE = 0.25
"""Change of perplexity, as a share, up to which a set that was measured counts as safe to route within."""


def safe_point(pattern: Pattern) -> int | None:
    """Fewest experts of a layer, mean over layers, that were measured to be safe.

    Returns
    -------
    int or None
        None where nothing was measured to cost more than `SAFE_CHANGE`.
    """
    unsafe = [
        kept
        for kept in range(1, pattern.n_expert)
        if (row := expected_cost(pattern, kept)) is not None and (row.perplexity_change or 0.0) > SAFE_CHANGE
    ]
    return max(unsafe) + 1 if unsafe else None


def expected_cost(pattern: Pattern, mean_kept: float) -> QualityRow | None:
    """Estimate the quality of a task's own set of some size.

    Between two measured sizes the logarithm of the perplexity, the KL divergence and the agreement are taken as linear
    in the logarithm of the size; all experts cost nothing.

    Parameters
    ----------
    pattern : Pattern
        With the quality that `edgemoe evaluate` measured.
    mean_kept : float
        Experts kept per layer, mean over layers.

    Returns
    -------
    QualityRow or None
        Of the best allocation that was measured, its `text` says between which sizes. None where nothing was measured,
        or not so few experts.
    """
    for allocation in ALLOCATIONS:
        rows = [row for row in pattern.quality if row.allocation == allocation and _is_own(row, pattern)]
        known = sorted((row for row in rows if row.mean_kept < pattern.n_expert), key=lambda row: row.mean_kept)
        if known:
            return _between(known, pattern.n_expert, mean_kept)
    return None


def _is_own(row: QualityRow, pattern: Pattern) -> bool:
    """Whether the row is of the task's own ranking and has all figures."""
    if row.criterion != pattern.criterion or None in (row.perplexity_change, row.kl, row.top1_agreement):
        return False
    try:
        Keep.parse(row.expert_set)
    except BudgetError:  # another task's set, or the full model
        return False
    return True


def _between(known: list[QualityRow], n_expert: int, mean_kept: float) -> QualityRow | None:
    if not known[0].mean_kept <= mean_kept <= n_expert:
        return None
    first = known[0]
    full = QualityRow("full", first.allocation, first.criterion, float(n_expert), None, 0.0, 0.0, 1.0, first.text, 1)
    for low, high in pairwise([*known, full]):
        if mean_kept > high.mean_kept:
            continue
        span = math.log(high.mean_kept / low.mean_kept)
        part = math.log(mean_kept / low.mean_kept) / span if span else 0.0

        def mixed(a: float | None, b: float | None, part: float = part) -> float:
            assert a is not None and b is not None, "checked by _is_own"
            return a + part * (b - a)

        losses = [math.log1p(row.perplexity_change or 0.0) for row in (low, high)]
        return QualityRow(
            expert_set=low.expert_set if part == 0 else "estimate",
            allocation=first.allocation,
            criterion=first.criterion,
            mean_kept=mean_kept,
            perplexity=None,
            perplexity_change=math.expm1(mixed(*losses)),
            kl=mixed(low.kl, high.kl),
            top1_agreement=mixed(low.top1_agreement, high.top1_agreement),
            text=f"between {low.mean_kept:.4g} and {high.mean_kept:.4g} experts a layer on {low.text}"[:200],
            seeds=1,
        )
    raise AssertionError("mean_kept lies within the pairs")
