"""What a set is expected to cost, from measured rows."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from tiny_patterns import tiny_pattern

from edgemoe.evidence import QualityRow
from edgemoe.pattern import Pattern
from edgemoe.quality import SAFE_CHANGE, expected_cost, safe_point


def row(kept: float, change: float, **others: object) -> QualityRow:
    plain = QualityRow(f"2/{kept:g}", "measured", "peu", kept, 10.0, change, change / 2, 1 - change / 4, "text", 1)
    return replace(plain, **others)  # type: ignore[arg-type]


def pattern_with(*rows: QualityRow) -> Pattern:
    return replace(tiny_pattern(measured=False), quality=rows)  # 8 experts, ranked by peu


def test_nothing_measured() -> None:
    assert expected_cost(pattern_with(), 4) is None


@pytest.mark.parametrize(("kept", "change"), [(2.0, 1.0), (4.0, 0.5)])
def test_measured_sizes_cost_what_was_measured(kept: float, change: float) -> None:
    found = expected_cost(pattern_with(row(4, 0.5), row(2, 1.0)), kept)
    assert found is not None
    assert found.perplexity_change == pytest.approx(change)
    assert (found.kl, found.top1_agreement) == (pytest.approx(change / 2), pytest.approx(1 - change / 4))


def test_between_sizes_losses_are_linear_in_octaves() -> None:
    pattern = pattern_with(row(2, 1.0), row(4, 0.5))
    found = expected_cost(pattern, 2 * math.sqrt(2))
    assert found is not None
    assert found.perplexity_change == pytest.approx(math.sqrt(2.0 * 1.5) - 1)
    assert found.text == "between 2 and 4 experts a layer on text"
    whole = expected_cost(pattern, 8)
    assert whole is not None
    assert (whole.perplexity_change, whole.kl, whole.top1_agreement) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("kept", [1.9, 8.1])
def test_nothing_is_known_beyond_the_sizes(kept: float) -> None:
    assert expected_cost(pattern_with(row(2, 1.0), row(4, 0.5)), kept) is None


def test_the_best_allocation_counts_and_only_the_tasks_own_sets() -> None:
    rows = (
        row(4, 0.9, allocation="uniform"),
        row(4, 0.7, allocation="mass"),
        row(4, 0.1, allocation="measured", expert_set="2/4 of all tasks"),
        row(4, 0.2, allocation="measured", criterion="frequency"),
        row(4, 0.3, allocation="measured", kl=None),
        row(8, 0.0, allocation="", criterion="", expert_set="full"),
    )
    found = expected_cost(pattern_with(*rows), 4)
    assert found is not None and (found.allocation, found.perplexity_change) == ("mass", pytest.approx(0.7))


def test_the_safe_point_is_the_first_size_that_costs_little_enough() -> None:
    pattern = pattern_with(row(2, 1.0), row(4, 0.5), row(6, 0.1))
    safe = safe_point(pattern)
    assert safe is not None and 4 < safe <= 6
    below, at = expected_cost(pattern, safe - 1), expected_cost(pattern, safe)
    assert below is not None and (below.perplexity_change or 0) > SAFE_CHANGE
    assert at is not None and (at.perplexity_change or 0) <= SAFE_CHANGE


@pytest.mark.parametrize("rows", [(), (row(2, 0.2), row(4, 0.1))])
def test_without_a_measured_danger_there_is_no_safe_point(rows: tuple[QualityRow, ...]) -> None:
    assert safe_point(pattern_with(*rows)) is None


def test_estimating_needs_no_model() -> None:
    program = "import sys, edgemoe.quality; print([n for n in ('llama_cpp', 'matplotlib') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
