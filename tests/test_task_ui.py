"""What is said of tasks in a terminal: which is active, why, and what its set is expected to cost."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from test_task_mode import LAW, MATHS, NONE, opened, pattern, say
from tiny_patterns import tiny_pattern

from edgemoe.cli import task_ui
from edgemoe.evidence import QualityRow
from edgemoe.matcher import Match


def printed(*parts: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    for part in parts:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def row(kept: float, change: float) -> QualityRow:
    return QualityRow(f"2/{kept:g}", "mass", "peu", kept, 10.0, change, change / 2, 1 - change / 4, "text", 1)


def test_the_active_task_says_why_and_what_it_is_expected_to_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured of a task's own sets, for the size that is in force."""
    measured = replace(pattern("maths"), quality=(row(4, 0.21), row(6, 0.05)))
    mode, _ = opened("task", 1400, "4", measured, pattern("law"))
    say(mode, monkeypatch, MATHS)
    line = task_ui.mode_line(mode)
    assert line.startswith("task: maths (maths: distance 1, then law 3 (oddness 0.0, limit 1.0)); experts 2/4")
    assert line.endswith("; expected perplexity +21.0%; 7 B read in 0.10 s")
    say(mode, monkeypatch, LAW)
    assert "its cost was not measured (edgemoe evaluate does)" in task_ui.mode_line(mode)
    mode.pin("maths")
    assert task_ui.mode_line(mode).startswith("task: maths (pinned); experts 2/4")
    mode.pin(None)
    assert task_ui.mode_line(mode) == "task: none (pinned), all experts may be chosen"


def test_no_task_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    mode, _ = opened()
    assert task_ui.mode_line(mode) == "task: none (nothing was read yet), all experts may be chosen"
    say(mode, monkeypatch, NONE)
    assert task_ui.mode_line(mode) == "task: none (the prompt is like none), all experts may be chosen"


def test_soft_tasks_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mode, _ = opened("auto")
    say(mode, monkeypatch, MATHS)
    assert "expected" not in task_ui.mode_line(mode) and "measured" not in task_ui.mode_line(mode)


def test_a_match_shows_the_runner_up_and_a_rejection() -> None:
    shown = printed(task_ui.match_parts(MATHS))
    for words in ("maths, distance 1", "law, distance 3", "0.0, limit 1.0", "64"):
        assert words in shown
    rejected = printed(task_ui.match_parts(NONE))
    assert rejected.split()[:2] == ["task", "none"] and "maths, distance 3" in rejected
    alone: Match = replace(MATHS, runner_up=None, runner_up_distance=None, threshold=float("inf"), short=True)
    shown = printed(task_ui.match_parts(alone))
    assert "runner-up" not in shown and "no limit: too few documents" in shown and "fewer than the limit" in shown
    assert json.loads(json.dumps(task_ui.match_document(alone)))["threshold"] is None


def test_coverage_is_that_of_the_routers_mass() -> None:
    """Two of eight experts hold 90 % in the first layer and an even quarter in the others."""
    mass = pattern("maths").scores["peu"] * 0 + 1
    mass[0] = [45, 45, 2, 2, 2, 2, 1, 1]
    known = tiny_pattern(scores={"peu": mass, "soft-count": mass}, measured=False)
    assert task_ui.pattern_document(known)["coverage"]["2"] == [0.9, 0.25, 0.25]
    rows = [" ".join(line.split()) for line in printed(task_ui.coverage_table(known)).splitlines()]
    assert "layer 6 of 8 4 of 8 2 of 8 1 of 8" in rows
    assert "1 98% 94% 90% 45%" in rows
    assert rows[-1] == "mean 83% 65% 47% 23%"


def test_without_scores_of_the_routers_mass_there_is_no_coverage() -> None:
    made = tiny_pattern()
    assert "soft-count" not in made.scores
    assert task_ui.coverage_table(made) is None
    assert "coverage" not in task_ui.pattern_document(made)
    assert "router mass" not in printed(*task_ui.pattern_parts(made))
    alone = printed(*task_ui.pattern_parts(replace(made, scores={"peu": made.scores["peu"]})))
    assert "ranked by peu loss of layers" in " ".join(alone.split())


def test_a_pattern_says_what_it_rests_on() -> None:
    """How many documents and tokens, the template, the model's own answers."""
    shown = printed(*task_ui.pattern_parts(with_soft_counts()))
    assert "2 documents, 100 tokens, through the chat template, with the model's answers" in shown
    document = task_ui.pattern_document(with_soft_counts())
    (source,) = document["sources"]
    assert source["calibration_hash"] == "c" * 64 and source["n_documents"] == 2
    assert (source["chat_template"], source["answers"]) == (True, True)


def with_soft_counts() -> Any:
    made = tiny_pattern()
    scores = {**made.scores, "soft-count": made.scores["frequency"]}
    return replace(made, scores=scores)


def test_steps_show_nothing_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with task_ui.Steps(shown=True) as steps, steps.step("counting") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")
