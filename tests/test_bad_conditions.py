"""A bad disk, a full machine, a slow or suspended process: answers come later, and are the same within the budget."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from bad_disk import BadDisk, build_library
from bad_machine import brake, cpu_quota, neighbour, suspended
from plain_llama import TINY_MOE
from talk import BUDGET, MIB, Talk, talking

from edgemoe.disk import bandwidth
from edgemoe.errors import StoreError
from edgemoe.memory_cgroup import CgroupUnavailableError, MemoryCgroup, memory_cgroup

QUESTIONS = ["What does the Python function os.path.join do?", "Tell me how a river finds its way to the sea."]

# A machine that does not hang answers in a few seconds.
pytestmark = pytest.mark.timeout(120)


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
            texts.append(talk.answer_to(question)["text"])
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
    text: str = talk.answer_to(QUESTIONS[0])["text"]
    return text


def test_disk_that_slows_down(disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        first = ask_first(talk)
        read = disk.control.bytes
        disk.control.after_bytes = read + 2 * MIB  # while it answers
        disk.control.bytes_per_s = 8 * MIB
        begin = time.monotonic()
        second = talk.answer_to(QUESTIONS[1])["text"]
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
        second = talk.answer_to(QUESTIONS[1])["text"]
        assert disk.control.failures > 0
        check_good_end(talk, [first, second], undisturbed)


def test_disk_that_fails_for_ever(disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        assert ask_first(talk) == undisturbed[0]
        disk.control.after_bytes = disk.control.bytes + 2 * MIB
        disk.control.fail_every = 1
        disk.control.failures_left = BadDisk.FOR_EVER
        cut = talk.answer_to(QUESTIONS[1])
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
        with suspended(talk.process.pid):
            stopped_at = disk.control.bytes
            time.sleep(1)
            assert disk.control.bytes == stopped_at
        second = talk.answer()["text"]
        assert disk.control.bytes > stopped_at
        check_good_end(talk, [first, second], undisturbed)


def test_processor_that_is_taken_away_again_and_again(disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        first = ask_first(talk)
        with brake(talk.process.pid) as braking:
            second = talk.answer_to(QUESTIONS[1])["text"]
            assert braking.poll() is None
        check_good_end(talk, [first, second], undisturbed)


def test_processor_that_is_throttled(disk: BadDisk, undisturbed: list[str]) -> None:
    with talking(disk.environment) as talk:
        first = ask_first(talk)
        try:
            with cpu_quota(talk.process.pid, 0.2) as group:
                second = talk.answer_to(QUESTIONS[1])["text"]
                throttled = re.search(r"^nr_throttled (\d+)$", (group / "cpu.stat").read_text(), re.MULTILINE)
                assert throttled is not None
                assert int(throttled[1]) > 0
        except CgroupUnavailableError as error:
            pytest.skip(str(error))
        check_good_end(talk, [first, second], undisturbed)


def test_memory_that_another_process_takes(disk: BadDisk, undisturbed: list[str], tmp_path: Path) -> None:
    """Both share a memory cgroup that holds them and little else, so that all pages of files come and go."""
    held = 64 * MIB
    try:
        with memory_cgroup(BUDGET + held + 16 * MIB) as group, talking(disk.environment, group.command([])) as talk:
            first = ask_first(talk)
            with neighbour(group, held, tmp_path) as other:
                before = group.times_full()
                second = talk.answer_to(QUESTIONS[1])["text"]
                assert other.poll() is None
                assert group.times_full() > before
            assert group.killed() == 0
            check_good_end(talk, [first, second], undisturbed)
    except CgroupUnavailableError as error:
        pytest.skip(str(error))


# ---------------------------------------------------------------- the status line

# As if few tokens were enough to judge the processor: the embedded model computes hundreds in a second.
HASTY = """
from edgemoe import conditions
conditions.WINDOW_SECONDS, conditions.WINDOW_TOKENS = 0.01, 4
from edgemoe.__main__ import main
main()
"""
THROTTLED = "times as long as before: the processor is throttled, or busy with other programs"


class Screen:
    """`edgemoe chat` as people see it."""

    def __init__(self, chat: subprocess.Popen[str]) -> None:
        self.chat = chat

    def ask(self, question: str) -> None:
        assert self.chat.stdin is not None
        self.chat.stdin.write(question + "\n")
        self.chat.stdin.flush()

    def ask_and_see(self, question: str) -> None:
        """Ask the first question, and see its answer begin."""
        assert self.chat.stdout is not None
        self.ask(question)
        self.chat.stdout.read(1)

    def status(self) -> str:
        """The status line below the next answer."""
        assert self.chat.stderr is not None
        line = next((line for line in self.chat.stderr if "hit rate" in line), None)
        assert line is not None, "it ended"
        return line

    def status_below(self, question: str) -> str:
        self.ask(question)
        return self.status()

    def says(self, words: str) -> bool:
        """Whether it says so below one of the next answers."""
        return any(words in self.status_below(question) for question in QUESTIONS * 20)


@contextlib.contextmanager
def screen(environment: Mapping[str, str], wrapper: Sequence[str] = (), program: str = HASTY) -> Iterator[Screen]:
    """A chat that leaves in good order, having said on standard output what the model said and nothing else."""
    options = f"--ram {BUDGET} --ctx 512 --threads 1 --temp 0 --max-tokens 60"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*wrapper, sys.executable, "-c", program, "chat", str(TINY_MOE), *options.split()]
    with subprocess.Popen(command, text=True, env={**os.environ, **environment}, **pipes) as chat:
        try:
            yield Screen(chat)
            out, errors = chat.communicate(timeout=60)
        finally:
            chat.kill()
    assert (chat.returncode, errors) == (0, "")
    assert out.strip()
    assert "tok/s" not in out and "memory is short" not in out


def test_suspension_is_told_once(disk: BadDisk) -> None:
    with screen(disk.environment) as chat:
        disk.control.bytes_per_s = 32 * MIB  # so that it takes a while
        chat.ask_and_see(QUESTIONS[1])
        begin = time.monotonic()
        with suspended(chat.chat.pid):
            time.sleep(3)
        told = chat.status()
        seconds = time.monotonic() - begin
        found = re.match(r"(\d+) tokens, (\d+\.\d) tok/s, .+, was suspended [34] s$", told)
        assert found is not None, told
        assert (int(found[1]) - 1) / float(found[2]) < seconds - 2.5, "the rate is that of the time that it ran"
        assert "suspended" not in chat.status_below(QUESTIONS[0])


def test_processor_that_is_taken_away_is_told(disk: BadDisk) -> None:
    with screen(disk.environment) as chat:
        for question in QUESTIONS * 2:
            chat.status_below(question)
        with brake(chat.chat.pid):
            assert chat.says(THROTTLED)


def test_processor_that_is_throttled_is_told(disk: BadDisk) -> None:
    with screen(disk.environment) as chat:
        for question in QUESTIONS * 2:
            chat.status_below(question)
        try:
            with cpu_quota(chat.chat.pid, 0.2):
                assert chat.says(THROTTLED)
        except CgroupUnavailableError as error:
            pytest.skip(str(error))


# Needs the pages of a file all the time, as code is needed: which of the real code's are this process's alone depends
# on what else runs.
NEEDY = """
import mmap, os, threading, time
file = open(os.environ["NEEDED"], "rb")
pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
pages.madvise(mmap.MADV_RANDOM)
def need():
    while pages[::4096]:
        time.sleep(0.001)
threading.Thread(target=need, daemon=True).start()
"""


def take_memory(group: MemoryCgroup) -> None:
    """Have the kernel take what can be had again from disk, as it does when others need memory."""
    version_1 = group.directory / "memory.force_empty"
    with contextlib.suppress(BlockingIOError):  # it was less than was asked for
        (version_1 if version_1.exists() else group.directory / "memory.reclaim").write_text(str(BUDGET))


def test_memory_that_is_taken_away_is_told(disk: BadDisk, tmp_path: Path) -> None:
    needed = tmp_path / "needed"
    with needed.open("wb") as file:
        file.write(os.urandom(2 * MIB))
        file.flush()
        # Its pages are this process's; dropped, they count for who reads them.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    environment = {**disk.environment, "NEEDED": str(needed)}
    try:
        with (
            memory_cgroup(BUDGET + 32 * MIB) as group,
            screen(environment, group.command([]), NEEDY + HASTY) as chat,
        ):
            disk.control.bytes_per_s = 16 * MIB  # so that it takes a while
            chat.ask_and_see(QUESTIONS[1])
            for _ in range(5):
                take_memory(group)
                time.sleep(0.02)
            told = chat.status()
            assert re.search(r", memory is short: [\d,]+ pages that were taken away had to be read again$", told), told
            disk.control.bytes_per_s = 0
            assert "memory is short" not in chat.status_below(QUESTIONS[0])
    except CgroupUnavailableError as error:
        pytest.skip(str(error))
