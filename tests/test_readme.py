"""What the README shows is what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest

from edgemoe.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_two_commands_are_in_the_makefile() -> None:
    first_block = README.split("```sh\n")[1].split("```")[0]
    targets = re.findall(r"^make (\w+)", first_block, re.MULTILINE)
    assert targets == ["demo", "check"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("verb", re.findall(r"^\$ edgemoe (\w+)", README, re.MULTILINE))
def test_every_verb_that_is_shown_exists(verb: str) -> None:
    assert click.testing.CliRunner().invoke(main, [verb, "--help"]).exit_code == 0


def test_the_plan_that_is_shown_has_the_program_s_rows() -> None:
    shown = README.split("$ edgemoe plan models/tiny-moe-q4_k_m.gguf --ram 90MiB\n")[1].split("```")[0]
    command = [sys.executable, "-m", "edgemoe", "plan", "models/tiny-moe-q4_k_m.gguf", "--ram", "90MiB"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    def names(table: str) -> list[str]:
        return re.findall(r"^([A-Za-z-][A-Za-z -]*?)  +\d", table, re.MULTILINE)

    assert names(shown) == names(done.stdout)
    assert len(names(shown)) >= 10


def test_the_python_example_runs() -> None:
    example = README.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d+% of the experts were in memory$", done.stdout, re.MULTILINE)


def test_every_file_of_the_map_exists() -> None:
    shown = README.split("## What is where")[1].split("```")[1]
    for name in re.findall(r"\b(\w+\.(?:py|h))\b", shown):
        assert any((ROOT / folder / name).exists() for folder in ("edgemoe", "edgemoe/cli", "converters", "native")), (
            name
        )
    listed = set(re.findall(r"\b(\w+\.py)\b", shown))
    assert {path.name for path in (ROOT / "edgemoe").glob("[a-z]*.py")} <= listed
