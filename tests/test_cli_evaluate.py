"""``edgemoe evaluate`` on a tiny model with two small tasks."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import click.testing
import numpy as np
import pytest
from tiny_models import write_tiny_model
from tiny_patterns import random_documents

from edgemoe.cli import main
from edgemoe.evaluation_report import FIELDS
from edgemoe.evidence import Source
from edgemoe.figures import can_plot
from edgemoe.fingerprint import fingerprint
from edgemoe.index import read_index
from edgemoe.loss_curves import LossCurves
from edgemoe.pattern import make_pattern
from edgemoe.patterns import PatternStore
from edgemoe.quality import expected_cost

SHORT = ("--tokens", "64", "--window", "32", "--keep", "6,4", "--threads", "1", "--ram", "1GiB")


class Place:
    """A model, a store with tasks `maths` and `law`, and text for both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "tiny.gguf"
        write_tiny_model(self.model, "qwen3moe")
        model = fingerprint(read_index(self.model))
        self.store = PatternStore(model, folder / "tasks")
        self.text = folder / "text"
        self.text.mkdir()
        shape = (len(model.layers), model.n_expert)
        for number, task in enumerate(("maths", "law")):
            rng = np.random.default_rng(number)
            scores = {name: rng.random(shape, dtype=np.float32) for name in ("peu", "soft-count", "frequency")}
            loss = np.tile([0.4, 0.2, 0.0], (shape[0], 1)) * np.arange(1, shape[0] + 1)[:, None]
            source = Source(task, f"{number:064x}", 2, 100, False, False)
            curves = LossCurves((4, 6, model.n_expert), loss)
            self.store.save(make_pattern(task, model, "peu", scores, source, random_documents(model, 2), curves))
        words = " ".join(f"word{i} of {i * i}" for i in range(40))
        (self.text / "maths.jsonl").write_text("".join(json.dumps({"text": words}) + "\n" for _ in range(2)))
        (self.text / "law.txt").write_text(words * 2)

    def run(self, *flags: str | Path, text: Path | None = None) -> click.testing.Result:
        arguments = ["evaluate", self.model, "--text", text or self.text, "--store", self.store.folder, *SHORT, *flags]
        result = click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_table_csv_and_quality(place: Place) -> None:
    file = place.folder / "all.csv"
    result = place.run("--csv", file, "--per-task")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].strip() == "text of maths" or lines[0].strip() == "text of law"
    summary = lines[max(i for i, line in enumerate(lines) if line.startswith("keep")) + 1 :]
    assert " ".join(summary[0].split()) == "16 full model +0.0 % 0.0 0.000 100.0%"
    assert sum(" own " in line for line in summary) == 2 * (3 + 2 * 2)  # allocations; other criteria in two of them
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert tuple(rows[0]) == FIELDS
    assert {row["task"] for row in rows} == {"maths", "law"}
    assert {int(row["keep"]) for row in rows} == {16, 6, 4}
    full = [row for row in rows if row["arm"] == "full model"]
    assert [float(row["kl"]) for row in full] == [0.0, 0.0]
    nearest = {row["task"]: row["set_of"] for row in rows if row["arm"] == "nearest task"}
    assert nearest == {"maths": "law", "law": "maths"}
    assert all(float(row["kl"]) > 0 and row["tokens"] == "64" for row in rows if row["arm"] != "full model")
    pattern = place.store.load("maths")
    own = [row for row in rows if row["task"] == "maths"]
    assert len([row for row in pattern.quality if row.text.startswith("held-out text of maths")]) == len(own)
    abroad = [row for row in rows if row["task"] == "law" and row["set_of"] == "maths"]
    assert abroad and sum(row.expert_set.endswith("on text of law") for row in pattern.quality) == len(abroad)
    cost = expected_cost(pattern, 4)
    (measured,) = [
        row
        for row in own
        if (row["arm"], row["allocation"], row["criterion"]) == ("own", "measured", "peu") and row["keep"] == "4"
    ]
    assert cost is not None and cost.perplexity_change == pytest.approx(float(measured["perplexity_change"]), rel=1e-5)
    assert str(place.store.folder) in result.stderr


def test_json(place: Place) -> None:
    result = place.run("--json", "--tasks", "law", "--arms", "main")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["n_expert"] == 16
    assert {row["task"] for row in document["rows"]} == {"law"}
    assert len(document["summary"]) == len(document["rows"]) == 1 + 2 * (3 + 2 + 2 + 2)
    assert {row["criterion"] for row in document["rows"]} == {"", "peu", "random"}


def test_numbers_of_experts_by_default(place: Place) -> None:
    arguments = ["evaluate", place.model, "--text", place.text, "--store", place.store.folder, "--tokens", "32"]
    flags = ["--window", "32", "--arms", "main", "--json", "--ram", "1GiB", "--threads", "1"]
    result = click.testing.CliRunner().invoke(main, [*map(str, arguments), *flags])
    assert {row["keep"] for row in json.loads(result.stdout)["rows"]} == {16, 12, 8, 4}  # four are active


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_plot(place: Place) -> None:
    file = place.folder / "plot.png"
    result = place.run("--plot", file, "--arms", "main")
    assert result.exit_code == 0, result.stderr
    assert file.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(place: Place) -> None:
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        result = place.run("--plot", place.folder / "plot.png")
    assert result.exit_code == 2
    assert "pip install 'edgemoe[plot]'" in result.stderr


def test_tasks_and_texts_without_each_other_are_told(place: Place) -> None:
    (place.text / "maths.jsonl").rename(place.text / "physics.jsonl")
    result = place.run("--arms", "main")
    assert result.exit_code == 0
    assert "Task maths is not evaluated" in result.stderr
    assert "physics.jsonl is not used: there is no task physics." in result.stderr


BAD_INPUT = {
    "no tasks": (("--store", "{folder}/empty"), 1, "run edgemoe profile first"),
    "unknown task": (("--tasks", "math"), 1, "did you mean maths?"),
    "task without text": (("--tasks", "maths", "--text", "{folder}/empty"), 1, "put maths.jsonl or maths.txt there"),
    "no text at all": (("--text", "{folder}/empty"), 1, "holds no text of any task"),
    "no such folder": (("--text", "{folder}/nowhere"), 2, "does not exist"),
    "below top-k": (("--keep", "3"), 1, "needs at least 4 of them; give numbers from 4 to 15"),
    "all of them": (("--keep", "16"), 1, "give numbers from 4 to 15"),
    "other top-k": (("--keep", "2/4"), 1, "give 4 alone"),
    "no number": (("--keep", "half"), 1, "'half' is no number of experts to keep"),
    "not UTF-8": (("--tasks", "maths", "--text", "{folder}/latin"), 1, "is not UTF-8 text"),
    "no documents": (("--tasks", "maths", "--text", "{folder}/blank"), 1, "no documents in"),
    "unwritable CSV": (("--csv", "{folder}/nowhere/all.csv"), 1, "No such file or directory"),
    "CSV is a folder": (("--csv", "{folder}"), 1, "Is a directory"),
    "not a PNG": (("--plot", "{folder}/plot.jpg"), 2, "give a name that ends in .png"),
    "PNG nowhere": (("--plot", "{folder}/nowhere/plot.png"), 2, "existing folder"),
    "too little memory": (("--ram", "4MiB"), 1, "is too small"),
    "absurd window": (("--window", "1"), 2, "--window"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(case: str, place: Place) -> None:
    for name, text in (("empty", None), ("latin", b'{"text": "caf\xe9"}\n'), ("blank", b'{"text": " "}\n')):
        (place.folder / name).mkdir()
        if text is not None:
            (place.folder / name / "maths.jsonl").write_bytes(text)
    flags, status, sentence = BAD_INPUT[case]
    result = place.run(*(flag.format(folder=place.folder) for flag in flags))
    assert result.exit_code == status
    assert result.stdout == ""
    assert sentence in result.stderr
    last = [line for line in result.stderr.splitlines() if line][-1]
    assert last.startswith("edgemoe: " if status == 1 else "Error: ")
    assert not place.store.load("maths").quality


def test_pattern_of_another_quantization_is_noted(place: Place) -> None:
    pattern = place.store.load("law")
    other = replace(pattern.fingerprint, quantization="f" * 64, quantization_name="Q1")
    place.store.save(replace(pattern, fingerprint=other))
    result = place.run("--arms", "main", "--tasks", "law")
    assert result.exit_code == 0
    assert "was profiled with Q1" in result.stderr


def test_interrupted_keeps_what_is_complete(place: Place) -> None:
    """Tasks come by name: law is soon done, maths has text for an hour."""
    file = place.folder / "all.csv"
    (place.text / "maths.jsonl").write_text(json.dumps({"text": "word " * 400_000}) + "\n")
    arguments = ["evaluate", place.model, "--text", place.text, "--store", place.store.folder, *SHORT, "--csv", file]
    with subprocess.Popen(
        [sys.executable, "-m", "edgemoe", *map(str, arguments), "--tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (file.exists() and "law" in file.read_text()):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "law +" in said
    assert "Stopped: 1 of 2 tasks are complete." in complained
    assert "Traceback" not in complained
    assert place.store.load("law").quality
    of_maths = {row.expert_set for row in place.store.load("maths").quality}
    assert of_maths and all(kept.endswith("on text of law") for kept in of_maths), "its own text was not reached"


def test_skipping_is_measured_without_tasks(place: Place) -> None:
    result = place.run("--skip-mass", "0.3,0.1", "--tasks", "law")
    assert "--skip-mass is measured without tasks" in result.stderr
    assert result.exit_code == 2
    command = ["evaluate", str(place.model), "--text", str(place.text), "--tokens", "64", "--window", "32"]
    command += ["--threads", "1", "--ram", "1GiB", "--skip-mass", "0.5,0.1"]
    table = click.testing.CliRunner().invoke(main, command)
    assert table.exit_code == 0, table.stderr
    assert [line.split()[0] for line in table.stdout.splitlines()] == ["skip-mass", "exact", "0.1", "0.5"]
    document = json.loads(click.testing.CliRunner().invoke(main, [*command, "--json"]).stdout)
    exact, little, much = document["rows"]
    assert [row["skip_mass"] for row in document["rows"]] == [0, 0.1, 0.5]
    assert exact["tokens"] == much["tokens"] == 2 * 16
    assert exact["perplexity_change"] == exact["skipped_mass"] == 0
    assert little["skipped_mass"] <= 0.1
    assert 0 < much["skipped_mass"] <= 0.5
    assert much["perplexity"] != exact["perplexity"]


@pytest.mark.parametrize(
    ("bounds", "message"), [("much", "much is not a list of numbers"), ("0.6", "0.6 is no share"), ("0", "0.0 is no")]
)
def test_bounds_that_cannot_be_are_refused(place: Place, bounds: str, message: str) -> None:
    result = click.testing.CliRunner().invoke(
        main, ["evaluate", str(place.model), "--text", str(place.text), "--skip-mass", bounds]
    )
    assert result.exit_code == 2
    assert message in result.stderr
