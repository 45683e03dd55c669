"""`edgemoe chat` in a process of its own, asked one question after the other."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plain_llama import TINY_MOE

MIB = 1 << 20
BUDGET = 96 * MIB
PATIENCE = 600.0
"""Seconds after which an answer is not waited for: the process hangs."""


class TalkEndedError(EOFError):
    """The process ended, or was ended for hanging, before it answered; the message is what it said."""


class Talk:
    """A conversation at temperature 0, so that the same questions have the same answers.

    Parameters
    ----------
    environment : mapping
        Variables beyond those of this process.
    wrapper : sequence of str
        What stands before the command line.
    model, ram, n_ctx, n_tokens, n_threads : Path, int
        Options of the command; bytes, and tokens of an answer at most.

    Attributes
    ----------
    seconds : float
        From the latest question to its answer, by the clock of this process.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        wrapper: Sequence[str] = (),
        model: Path = TINY_MOE,
        ram: int = BUDGET,
        n_ctx: int = 512,
        n_tokens: int = 60,
        n_threads: int = 1,
    ) -> None:
        options = f"--ram {ram} --ctx {n_ctx} --threads {n_threads} --max-tokens {n_tokens} --temp 0 --seed 1 --json"
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "edgemoe", "chat", str(model), *options.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, question: str) -> None:
        assert self.process.stdin is not None
        self._asked_at = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has ended; waiting for the answer tells why
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer, as soon as it is there."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
            raise TalkEndedError(f"it gave no answer for {PATIENCE:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise TalkEndedError(self.end()[2])
        self.seconds = time.monotonic() - self._asked_at
        document: dict[str, Any] = json.loads(line)
        return document

    def has_answered(self) -> bool:
        """Whether `answer` would not wait: there is an answer, or the process has ended."""
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def answer_to(self, question: str) -> dict[str, Any]:
        self.ask(question)
        return self.answer()

    def peak(self) -> int:
        """Most memory the process had so far, bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def end(self) -> tuple[int, str, str]:
        """Say goodbye; exit status, what remained of standard output, and standard error."""
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out, errors


@contextlib.contextmanager
def talking(*arguments: Any, **options: Any) -> Iterator[Talk]:
    """A `Talk` whose process is gone at the end."""
    talk = Talk(*arguments, **options)
    try:
        yield talk
    finally:
        talk.process.kill()
        talk.process.wait()
        for pipe in (talk.process.stdin, talk.process.stdout, talk.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
