"""A bad disk, a full machine, a slow or suspended process: answers come later, and are the same within the budget."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from bad_disk import BadDisk, build_library
from plain_llama import TINY_MOE

from edgemoe.disk import bandwidth
from edgemoe.errors import StoreError
from edgemoe.memory_cgroup import CgroupUnavailableError, memory_cgroup

MIB = 1 << 20
BUDGET = 96 * MIB
QUESTIONS = ["What does the Python function os.path.join do?", "Tell me how a river finds its way to the sea."]

# A machine that does not hang answers in a few seconds.
pytestmark = pytest.mark.timeout(120)


class Talk:
    """`edgemoe chat` in a process of its own."""

    def __init__(self, environment: Mapping[str, str], wrapper: Sequence[str] = ()) -> None:
        options = f"--ram {BUDGET} --ctx 512 --threads 1 --temp 0 --seed 1 --max-tokens 60 --json"
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "edgemoe", "chat", str(TINY_MOE), *options.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, question: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer, as soon as it is there."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        document: dict[str, Any] = json.loads(line)
        return document

    def peak(self) -> int:
        """Most memory the process had so far, bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def end(self) -> tuple[int, str, str]:
        """Say goodbye; exit status, what remained of standard output, and standard error."""
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out, errors


@contextlib.contextmanager
def talking(environment: Mapping[str, str], wrapper: Sequence[str] = ()) -> Iterator[Talk]:
    talk = Talk(environment, wrapper)
    try:
        yield talk
    finally:
        talk.process.kill()
        talk.process.communicate()


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, killed at the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = build_library(tmp_path_factory.mktemp("bad_disk")) if sys.platform == "linux" else None
    if built is None:
        pytest.skip("needs a C compiler and LD_PRELOAD")
    return built


@pytest.fixture
def disk(library: Path, tmp_path: Path) -> BadDisk:
    return BadDisk(library, TINY_MOE.name, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(library: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the model says when all is well, and it reads for both answers."""
    disk = BadDisk(library, TINY_MOE.name, tmp_path_factory.mktemp("disk"))
    texts = []
    with talking(disk.environment) as talk:
        for question in QUESTIONS:
            before = disk.control.bytes
            talk.ask(question)
            texts.append(talk.answer()["text"])
            assert disk.control.bytes > before + 4 * MIB
        assert talk.peak() <= BUDGET
        assert talk.end()[0] == 0
    assert all(len(text) > 20 for text in texts)
    assert disk.control.failures == 0
    return texts


def check_good_end(talk: Talk, texts: list[str], undisturbed: list[str]) -> None:
    assert texts == undisturbed
    assert talk.peak() <= BUDGET
    assert talk.end() == (0, "", "")


def ask_first(talk: Talk) -> str:
    talk.ask(QUESTIONS[0])
    text: str = talk.answer()["text"]
    return text


def test_disk_that_slows_down(disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        first = ask_first(talk)
        read = disk.control.bytes
        disk.control.after_bytes = read + 2 * MIB  # while it answers
        disk.control.bytes_per_s = 8 * MIB
        begin = time.monotonic()
        talk.ask(QUESTIONS[1])
        second = talk.answer()["text"]
        slow_bytes = disk.control.bytes - disk.control.after_bytes
        assert slow_bytes > 4 * MIB
        assert time.monotonic() - begin > 0.9 * slow_bytes / (8 * MIB)
        check_good_end(talk, [first, second], undisturbed)


# As if the embedded model were worth measuring its disk.
MEASURING = "from edgemoe import disk; disk.SMALL = 0; from edgemoe.cli import main; main()"


def test_slow_disk_is_told(disk: BadDisk, tmp_path: Path) -> None:
    try:
        bandwidth(TINY_MOE, 1, MIB, 0.01)
    except StoreError as error:
        pytest.skip(str(error))
    options = f"--ram {BUDGET} --ctx 512 --threads 1 --temp 0 --max-tokens 60"
    command = [sys.executable, "-c", MEASURING, "chat", str(TINY_MOE), *options.split()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, **disk.environment, "EDGEMOE_CACHE": str(tmp_path)}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as chat:
        assert chat.stdin is not None
        assert chat.stderr is not None
        told = []
        for question in QUESTIONS:
            chat.stdin.write(question + "\n")
            chat.stdin.flush()
            told.append(next(line for line in chat.stderr if "hit rate" in line))
            disk.control.bytes_per_s = 8 * MIB
        chat.stdin.close()
    assert chat.returncode == 0
    found = re.search(r"disk: (\d\.\d) MB/s, .+ when measured: waiting for it took (\d+)% of the time$", told[1])
    assert found is not None, told
    assert 7.5 < float(found[1]) < 9
    assert int(found[2]) > 50


@pytest.mark.parametrize(
    "faults",
    [
        {"failing_thread": BadDisk.NEXT_THREAD, "failures_left": 2},
        {"failing_thread": BadDisk.NEXT_THREAD, "failures_left": BadDisk.FOR_EVER},
        {"fail_every": 50, "failures_left": 10},
    ],
    ids=["of one lane", "of one lane for ever", "here and there"],
)
def test_read_errors_that_pass(faults: dict[str, int], disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        first = ask_first(talk)
        for name, value in faults.items():
            setattr(disk.control, name, value)
        talk.ask(QUESTIONS[1])
        second = talk.answer()["text"]
        assert disk.control.failures > 0
        check_good_end(talk, [first, second], undisturbed)


def test_disk_that_fails_for_ever(disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        assert ask_first(talk) == undisturbed[0]
        disk.control.after_bytes = disk.control.bytes + 2 * MIB
        disk.control.fail_every = 1
        disk.control.failures_left = BadDisk.FOR_EVER
        talk.ask(QUESTIONS[1])
        cut = talk.answer()
        assert cut["finish_reason"] == "error"
        assert undisturbed[1].startswith(cut["text"])
        status, _, errors = talk.end()
        assert status == 1
        assert re.fullmatch(rf"edgemoe: [^\n]*{TINY_MOE.name}[^\n]*Input/output error[^\n]*\n", errors)


def test_suspended_and_resumed(disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        first = ask_first(talk)
        disk.control.bytes_per_s = 32 * MIB  # so that it takes a while
        read = disk.control.bytes
        talk.ask(QUESTIONS[1])
        while disk.control.bytes == read:
            time.sleep(0.001)
        talk.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, talk.process.pid, os.WSTOPPED)
        stopped_at = disk.control.bytes
        time.sleep(1)
        assert disk.control.bytes == stopped_at
        talk.process.send_signal(signal.SIGCONT)
        second = talk.answer()["text"]
        assert disk.control.bytes > stopped_at
        check_good_end(talk, [first, second], undisturbed)


# Suspends a process 3 milliseconds of 4.
BRAKE = """
import itertools, os, signal, sys, time
for number, seconds in itertools.cycle([(signal.SIGSTOP, 0.03), (signal.SIGCONT, 0.01)]):
    os.kill(int(sys.argv[1]), number)
    time.sleep(seconds)
"""


def test_processor_that_is_taken_away_again_and_again(disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        first = ask_first(talk)
        with running([sys.executable, "-c", BRAKE, str(talk.process.pid)]) as brake:
            os.waitid(os.P_PID, talk.process.pid, os.WSTOPPED | os.WNOWAIT)
            talk.ask(QUESTIONS[1])
            second = talk.answer()["text"]
            assert brake.poll() is None
        talk.process.send_signal(signal.SIGCONT)
        check_good_end(talk, [first, second], undisturbed)


@contextlib.contextmanager
def cpu_quota(process: int, share: float) -> Iterator[Path]:
    """Let a process have this share of one processor, by a cgroup of version 1 or 2; gives the cgroup."""
    version_1 = Path("/sys/fs/cgroup/cpu")
    root = version_1 if version_1.is_dir() else version_1.parent
    group = root / f"edgemoe-{process}"
    try:
        group.mkdir()
        if version_1.is_dir():
            (group / "cpu.cfs_quota_us").write_text(str(round(share * 100_000)))
        else:
            (group / "cpu.max").write_text(f"{round(share * 100_000)} 100000")
        (group / "cgroup.procs").write_text(str(process))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no cgroup for processors can be made: {error}")
    try:
        yield group
    finally:
        (root / "cgroup.procs").write_text(str(process))
        group.rmdir()


def test_processor_that_is_throttled(disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        first = ask_first(talk)
        with cpu_quota(talk.process.pid, 0.2) as group:
            talk.ask(QUESTIONS[1])
            second = talk.answer()["text"]
            throttled = re.search(r"^nr_throttled (\d+)$", (group / "cpu.stat").read_text(), re.MULTILINE)
            assert throttled is not None
            assert int(throttled[1]) > 0
        check_good_end(talk, [first, second], undisturbed)


# Holds as many bytes as it is told, uses them, and reads a file through the page cache, over and over.
NEIGHBOUR = """
import sys
held = bytearray(int(sys.argv[1]))
with open(sys.argv[2], "rb") as file:
    for number in range(1 << 40):
        held[:: 4096] = bytes([number % 256]) * len(held[:: 4096])
        file.seek(0)
        while file.read(1 << 20):
            pass
        if number == 1:
            print("busy", flush=True)
"""


def test_memory_that_another_process_takes(disk: BadDisk, undisturbed: list[str], tmp_path: Path) -> None:
    """Both share a memory cgroup that holds them and little else, so that all pages of files come and go."""
    held = 64 * MIB
    with (tmp_path / "file").open("wb") as file:
        file.write(os.urandom(held))
        file.flush()
        # Its pages are this process's; dropped, they count for who reads them.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    neighbour = [sys.executable, "-c", NEIGHBOUR, str(held), str(tmp_path / "file")]
    try:
        with memory_cgroup(BUDGET + held + 16 * MIB) as group, talking(disk.environment, group.command([])) as talk:
            first = ask_first(talk)
            with running(group.command(neighbour)) as other:
                assert other.stdout is not None
                assert other.stdout.readline() == b"busy\n"
                before = group.times_full()
                talk.ask(QUESTIONS[1])
                second = talk.answer()["text"]
                assert other.poll() is None
                assert group.times_full() > before
            assert group.killed() == 0
            check_good_end(talk, [first, second], undisturbed)
    except CgroupUnavailableError as error:
        pytest.skip(str(error))
