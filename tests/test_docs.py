"""The commands that the guides show are run in their order, with a model and text of their names in the folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from plain_llama import TINY_MOE

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
MATHS = "Tom has {} apples and buys {} more. How many apples does he have? He has {} apples. The answer is {}."
GERMAN = "Die Funktion {} gibt die Länge der {}. Zeichenkette zurück. Falls ein Fehler auftritt, wird -{} geliefert."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "model.gguf").symlink_to(TINY_MOE)
    held_out = folder / "held-out"
    held_out.mkdir()
    for place, numbers in ((folder, range(2, 8)), (held_out, range(20, 24))):
        maths = [MATHS.format(n, 3 * n, 4 * n, 4 * n) for n in numbers]
        (place / "maths.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in maths))
        (place / "german.txt").write_text("\n".join(GERMAN.format(f"f{n}", n, n) for n in numbers))
    return folder


def run_commands(document: str, folder: Path, *more: str) -> int:
    """Run them with `more` options, give each the lines after it that begin with ``>``, and count them."""
    text = (ROOT / "docs" / document).read_text()
    commands = re.findall(r"^\$ edgemoe (.*)\n((?:> .*\n)*)", text, re.MULTILINE)
    environment = {**os.environ, "EDGEMOE_TASKS": str(folder / "tasks")}
    for command, typed in commands:
        done = subprocess.run(
            [sys.executable, "-m", "edgemoe", *shlex.split(command), *more],
            cwd=folder,
            env=environment,
            input=re.sub("^> ", "", typed, flags=re.MULTILINE),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    return len(commands)


def test_the_commands_of_the_guide_to_tasks_run(folder: Path) -> None:
    assert run_commands("tasks.md", folder) >= 12
    assert (folder / "figures.csv").stat().st_size and (folder / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_of_the_guide_to_chat_run(folder: Path) -> None:
    # Answers of any length would fill the context, and the oldest turns leave then.
    assert run_commands("chat.md", folder, "--max-tokens", "60", "--seed", "1") == 2
    talk, before = (json.loads((folder / name).read_text()) for name in ("talk.json", "before-the-detour.json"))
    assert before["turns"] == talk["turns"][:2]
    assert (len(talk["turns"]), talk["turns"][2]) == (4, "And one that multiplies them?")


def test_the_commands_of_the_guide_to_skipping_run(folder: Path) -> None:
    assert run_commands("skip-mass.md", folder) == 2


def test_the_blocks_of_the_guide_to_python_run(folder: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "is too small for model.gguf" in done.stdout and "What is a function?" in done.stdout


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target
