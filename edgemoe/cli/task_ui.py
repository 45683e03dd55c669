"""How tasks look in a terminal: progress of long work, patterns, matches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from edgemoe.cli.ui import err, facts
from edgemoe.memory import format_bytes
from edgemoe.quality import expected_cost
from edgemoe.score import Doubles, coverage

if TYPE_CHECKING:
    from edgemoe.matcher import Match
    from edgemoe.patterns import Pattern
    from edgemoe.task_mode import TaskMode

COVERAGE_SHARES = (0.75, 0.5, 0.25, 0.125)
"""Parts of a layer's experts that the coverage table has a column for."""


class Steps:
    """Progress bars with the time that is left, on standard error while a terminal is there.

    Parameters
    ----------
    shown : bool
        Whether to show anything at all.
    """

    def __init__(self, shown: bool) -> None:
        console = err()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal and not console.is_dumb_terminal),
        )

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show one bar; call the result with what is done and the total."""
        bar = self._bars.add_task(name, total=None)
        try:
            yield lambda done, total: self._bars.update(bar, completed=done, total=total)
        finally:
            self._bars.remove_task(bar)

    def __enter__(self) -> Steps:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def pattern_parts(pattern: Pattern) -> Iterator[RenderableType]:
    """Lay out what a pattern knows of its task."""
    source = ", ".join(
        f"{s.n_documents:,} documents, {s.n_tokens:,} tokens"
        + (", through the chat template" if s.chat_template else "")
        + (", with the model's answers" if s.answers else "")
        for s in pattern.sources
    )
    others = sorted(set(pattern.scores) - {pattern.criterion})
    yield facts(
        [
            ("task", pattern.task),
            ("model", str(pattern.fingerprint)),
            ("quantization", pattern.fingerprint.quantization_name),
            ("text", source),
            ("ranked by", pattern.criterion + (f"; also scored: {', '.join(others)}" if others else "")),
            ("loss of layers", "measured" if pattern.sensitivity is not None else "not measured"),
            ("quality", f"{len(pattern.quality)} figures" if pattern.quality else "not measured; see edgemoe evaluate"),
        ]
    )
    table = coverage_table(pattern)
    if table is not None:
        yield table


def coverage_table(pattern: Pattern) -> Table | None:
    """Share of the routed mass that the best experts of each layer hold; None where it is not known."""
    held = _coverage(pattern)
    if held is None:
        return None
    table = Table(
        box=None, padding=(0, 2, 0, 0), title="share of router mass held by the best experts", title_justify="left"
    )
    table.add_column("layer", justify="right")
    for count in held:
        table.add_column(f"{count} of {pattern.n_expert}", justify="right")
    for row, layer in enumerate(pattern.layers):
        table.add_row(str(layer), *(f"{column[row]:.0%}" for column in held.values()))
    table.add_row("mean", *(f"{column.mean():.0%}" for column in held.values()), style="bold")
    return table


def _coverage(pattern: Pattern) -> dict[int, Doubles] | None:
    """Share of each layer's router mass [L] that so many experts hold, most first; None without scores of that mass."""
    mass = pattern.scores.get("soft-count")  # merging leaves out what only one of the tasks has
    if mass is None:
        return None
    counts = {max(1, round(share * pattern.n_expert)) for share in COVERAGE_SHARES}
    return {count: coverage(mass, count) for count in sorted(counts, reverse=True)}


def task_table(patterns: Sequence[Pattern]) -> Table:
    """List tasks with what was profiled."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("task", "documents", "tokens", "ranked by", "loss of layers", "quality", "quantization"):
        table.add_column(name, justify="right" if name in ("documents", "tokens") else "left")
    for pattern in patterns:
        table.add_row(
            pattern.task,
            f"{pattern.n_documents:,}",
            f"{pattern.n_tokens:,}",
            pattern.criterion,
            "measured" if pattern.sensitivity is not None else "-",
            f"{len(pattern.quality)} figures" if pattern.quality else "-",
            pattern.fingerprint.quantization_name,
        )
    return table


def mode_line(mode: TaskMode) -> str:
    """Say which task is active, why, what changing to it took, and what it is expected to cost."""
    if mode.active is None:
        why = "pinned" if mode.pinned else "the prompt is like none" if mode.match else "nothing was read yet"
        return f"task: none ({why}), all experts may be chosen"
    matched = mode.match if mode.match and mode.match.task == mode.active else None
    why = "pinned" if mode.pinned else matched.reason if matched else "until a prompt says otherwise"
    parts = [f"task: {mode.active} ({why})"]
    if mode.mode == "task":
        parts.append(f"experts {mode.active_set}")
        parts.append(_cost(mode))
    if mode.switch is not None:
        parts.append(f"{format_bytes(mode.switch.bytes_read)} read in {mode.switch.seconds:.2f} s")
    if mode.note is not None:
        parts.append(f"note: {mode.note}")
    return "; ".join(parts)


def mode_document(mode: TaskMode) -> dict[str, Any]:
    """Give the active task as JSON types; null for all experts."""
    return {
        "mode": mode.mode,
        "task": mode.active,
        "pinned": mode.pinned,
        "match": None if mode.match is None else match_document(mode.match),
        "kept": None if mode.active_set is None else list(mode.active_set.sizes),
        "bytes_read": None if mode.switch is None else mode.switch.bytes_read,
        "note": mode.note,
    }


def _cost(mode: TaskMode) -> str:
    """Say what the active set is expected to cost on text of its task."""
    chosen = mode.active_set
    assert mode.active is not None and chosen is not None, "a task is active"
    row = expected_cost(mode.pattern(mode.active), chosen.mean_kept)
    if row is None or row.perplexity_change is None:
        return "its cost was not measured (edgemoe evaluate does)"
    return f"expected perplexity {row.perplexity_change:+.1%}"


def match_parts(match: Match) -> Table:
    """Lay out which task a prompt belongs to."""
    rows = [("task", match.task or "none"), ("nearest", f"{match.nearest}, distance {match.distance:.4g}")]
    if match.runner_up is not None:
        rows.append(("runner-up", f"{match.runner_up}, distance {match.runner_up_distance:.4g}"))
    limit = f"limit {match.threshold:.1f}" if math.isfinite(match.threshold) else "no limit: too few documents"
    rows.append(("oddness", f"{match.oddness:.1f}, {limit}"))
    rows.append(("tokens", f"{match.n_tokens:,}" + (", fewer than the limit was learned from" if match.short else "")))
    return facts(rows)


def match_document(match: Match) -> dict[str, Any]:
    """Give a match as JSON types; a limit that is not known is null."""
    document = asdict(match)
    document["threshold"] = match.threshold if math.isfinite(match.threshold) else None
    return document


def pattern_document(pattern: Pattern) -> dict[str, Any]:
    """Give a pattern's facts as JSON types; coverage is left out where it is not known."""
    held = _coverage(pattern)
    document: dict[str, Any] = {
        "task": pattern.task,
        "model": pattern.fingerprint.name,
        "architecture": pattern.fingerprint.architecture,
        "quantization": pattern.fingerprint.quantization_name,
        "layers": list(pattern.layers),
        "n_expert": pattern.n_expert,
        "criterion": pattern.criterion,
        "criteria": sorted(pattern.scores),
        "sources": [asdict(source) for source in pattern.sources],
        "has_curves": pattern.sensitivity is not None,
        "quality": [asdict(row) for row in pattern.quality],
    }
    if held is not None:
        document["coverage"] = {str(count): shares.round(4).tolist() for count, shares in held.items()}
    return document
