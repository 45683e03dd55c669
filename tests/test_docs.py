"""The commands that docs/tasks.md shows are run in its order, with a model and text of its names in the folder."""

from __future__ import annotations

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


def test_the_commands_of_the_guide_run(folder: Path) -> None:
    commands = re.findall(r"^\$ edgemoe (.*)$", (ROOT / "docs" / "tasks.md").read_text(), re.MULTILINE)
    assert len(commands) >= 12
    environment = {**os.environ, "EDGEMOE_TASKS": str(folder / "tasks")}
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "edgemoe", *shlex.split(command)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (folder / "figures.csv").stat().st_size and (folder / "figures.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target
