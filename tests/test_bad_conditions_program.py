"""`benchmarks.bad_conditions`: one row for each condition, and nothing but the speed changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from plain_llama import TINY_MOE
from talk import MIB, TalkEndedError, talking

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler, LD_PRELOAD"),
]


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.bad_conditions", TINY_MOE, "--threads", "1", *options]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)


def test_every_condition_is_a_row(tmp_path: Path) -> None:
    done = run("--ram", "90MiB", "--tokens", "12", "-o", tmp_path / "new" / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "new" / "out.json").read_text())
    assert document["benchmark"] == "bad_conditions" and document["settings"]["ram"] == 90 * MIB
    found = {outcome["condition"]: outcome for outcome in document["outcomes"]}
    lines = done.stdout.splitlines()
    assert "tok/s before" in lines[0] and [line.split()[0] for line in lines[1:]] == [name.split()[0] for name in found]
    assert next(iter(found)) == "quiet" and len(found) == 7
    for outcome in found.values():
        if outcome["said"].startswith("not tried: "):
            continue  # where no cgroup can be made
        assert outcome["same_texts"] and outcome["texts"] == found["quiet"]["texts"] and outcome["status"] == 0
        assert len(outcome["tokens_per_s"]) == 3 and 0 < outcome["peak_rss"] <= 90 * MIB
    assert found["quiet"]["said"] == ""
    assert "repeated" in found["read errors on one lane"]["said"]
    assert found["suspended for 2 s"]["tokens_per_s"][1] < 12 / 2  # all of its answer took longer than that


def test_a_budget_that_is_too_small_is_one_sentence() -> None:
    done = run("--ram", "30MiB")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"Error: --ram {30 * MIB} is too small for {TINY_MOE.name}")


def test_a_process_that_ends_says_why() -> None:
    with talking({}, ram=30 * MIB) as talk, pytest.raises(TalkEndedError, match=r"^edgemoe: .*MiB"):
        talk.answer_to("Hello?")
