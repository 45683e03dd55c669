"""A machine that misbehaves while a program runs: it suspends it, takes its processor or its memory away."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgemoe.memory_cgroup import CgroupUnavailableError, MemoryCgroup


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, killed at the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def suspended(process: int) -> Iterator[None]:
    """A child is stopped, and goes on afterwards."""
    os.kill(process, signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, process, os.WSTOPPED)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(process, signal.SIGCONT)


# Suspends a process 30 milliseconds of 40.
BRAKE = """
import itertools, os, signal, sys, time
for number, seconds in itertools.cycle([(signal.SIGSTOP, 0.03), (signal.SIGCONT, 0.01)]):
    os.kill(int(sys.argv[1]), number)
    time.sleep(seconds)
"""


@contextlib.contextmanager
def brake(process: int) -> Iterator[subprocess.Popen[bytes]]:
    """A child has the processor a quarter of the time; gives what takes it away."""
    try:
        with running([sys.executable, "-c", BRAKE, str(process)]) as braking:
            os.waitid(os.P_PID, process, os.WSTOPPED | os.WNOWAIT)
            yield braking
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(process, signal.SIGCONT)


@contextlib.contextmanager
def cpu_quota(process: int, share: float) -> Iterator[Path]:
    """Let a process have this share of one processor, by a cgroup of version 1 or 2; gives the cgroup.

    Raises
    ------
    CgroupUnavailableError
        Where none can be made.
    """
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
        raise CgroupUnavailableError(f"no cgroup for processors can be made: {error}") from error
    try:
        yield group
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and left the cgroup with that
            (root / "cgroup.procs").write_text(str(process))
        group.rmdir()


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


@contextlib.contextmanager
def neighbour(group: MemoryCgroup, held: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process in a memory cgroup that holds so many bytes, and reads as many through the page cache."""
    path = folder / "file of the neighbour"
    with path.open("wb") as file:
        file.write(os.urandom(held))
        file.flush()
        # Its pages are this process's; dropped, they count for who reads them.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with running(group.command([sys.executable, "-c", NEIGHBOUR, str(held), str(path)])) as other:
        assert other.stdout is not None
        if other.stdout.readline() != b"busy\n":
            raise ChildProcessError("the process beside it ended early")
        yield other
