"""The command's standard streams, closed, full or of another encoding, and Ctrl-C at any moment."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plain_llama import TINY_MOE
from test_cli import GREEDY, PROMPT, RAM, changed_model, edgemoe, start

NAMED = b"general.name\x08\0\0\0\x08\0\0\0\0\0\0\0" + "tiñy-mo".encode()


def test_interrupted_run_says_what_it_took() -> None:
    with start("run", TINY_MOE, "--ram", "160MiB", "--ctx", "16384", "--temp", "2", "--seed", "2", PROMPT) as run:
        assert run.stdout and run.stderr
        first = run.stdout.read(8)
        run.send_signal(signal.SIGINT)
        rest, said = run.stdout.read(), run.stderr.read()
    assert run.returncode == 130
    assert first and rest.endswith("\n")
    assert "Traceback" not in said
    assert "tok/s, stopped\n" in said.split("peak memory")[1]


def test_interrupted_prompt_stops_at_once() -> None:
    """A prompt batch runs for long in C, where Python cannot see Ctrl-C."""
    long_prompt = "The sea is wide and the ship is small. " * 1200
    with start("run", TINY_MOE, "--ram", "160MiB", "--ctx", "16384", "-") as run:
        assert run.stdin and run.stdout and run.stderr
        run.stdin.write(long_prompt)
        run.stdin.close()
        while "smallest --ram" not in run.stderr.readline():
            pass
        time.sleep(1)
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        answer, said = run.stdout.read(), run.stderr.read()
    assert run.returncode == 130
    assert time.monotonic() - began < 10
    assert answer == ""
    assert "generation   0 tokens, stopped\n" in said
    assert "decode" not in said  # llama.cpp's own remarks


PRESSED = """
import atexit, signal, sys

when = sys.argv.pop(1)

class Press:
    def find_spec(self, name, *_):
        if name == when:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Press())
if when == "atexit":
    atexit.register(signal.raise_signal, signal.SIGINT)
from edgemoe.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("when", "status"), [("edgemoe.cli", 130), ("click", 130), ("rich", 130), ("numpy", 130), ("atexit", 0)]
)
def test_ctrl_c_is_quiet_from_the_first_import_to_the_end(when: str, status: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PRESSED, when, "plan", TINY_MOE, "--ram", RAM], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (status, "")


@pytest.mark.parametrize(
    ("redirection", "arguments", "status", "said"),
    [
        ("<&-", ["run", "--quiet", "--ram", RAM], 1, "edgemoe: the prompt is empty; give it as an argument or on "),
        ("<&-", ["chat", "--quiet", "--ram", RAM], 0, ""),
        (">&-", ["inspect"], 0, ""),
        (">&- <&-", ["inspect"], 0, ""),
    ],
)
def test_standard_streams_that_are_closed(redirection: str, arguments: list[str], status: int, said: str) -> None:
    verb, *flags = arguments
    command = [sys.executable, "-m", "edgemoe", verb, str(TINY_MOE), *flags]
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command], capture_output=True, text=True, stdin=subprocess.PIPE
    )
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.startswith(said) and result.stderr.count("\n") == bool(said)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_a_lost_standard_error_costs_no_answer(redirection: str) -> None:
    command = [sys.executable, "-m", "edgemoe", "run", str(TINY_MOE), *GREEDY, PROMPT]
    result = subprocess.run(["sh", "-c", f'exec "$@" {redirection}', "sh", *command], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout == edgemoe("run", TINY_MOE, *GREEDY, PROMPT).stdout


def test_output_that_cannot_be_encoded(tmp_path: Path) -> None:
    model = changed_model(tmp_path, b"general.name\x08\0\0\0\x08\0\0\0\0\0\0\0tiny-moe", NAMED)
    result = edgemoe("inspect", model, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout.splitlines()[0]) == (0, "model           ti?y-mo")
    document = edgemoe("inspect", model, "--json", PYTHONIOENCODING="ascii").stdout
    assert json.loads(document)["name"] == "tiñy-mo", "JSON says it in escapes"


def test_closed_pipe_is_quiet() -> None:
    with start("run", TINY_MOE, "--ram", RAM, "--quiet", "--ctx", "2048", "--temp", "2", "--seed", "2", PROMPT) as run:
        assert run.stdout and run.stderr
        run.stdout.read(1)
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode != 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["inspect", TINY_MOE], ["run", TINY_MOE, *GREEDY, "--quiet", PROMPT], ["-h"]])
def test_full_disk(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "edgemoe", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    assert result.stderr == "edgemoe: output: No space left on device; check the disk and the permissions\n"
