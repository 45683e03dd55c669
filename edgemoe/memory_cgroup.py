"""Runs a command inside a memory cgroup of its own (version 1 or 2): a machine with that much RAM."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemoe.own_cgroup import ROOT

_SWAP_BYTES = 1 << 20  # more than a processor charges at once


class CgroupUnavailableError(OSError):
    """No memory cgroup can be made here: none is mounted, or it takes root."""


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """A memory cgroup with a limit, as `memory_cgroup` yields it.

    Pages of shared libraries and files count for the cgroup that touched them first: drop the page cache before a
    run (`drop_page_cache`) to have all of them counted here.
    """

    directory: Path
    limit: int

    def command(self, command: Sequence[str | os.PathLike[str]]) -> list[str]:
        """Give the command line that runs `command` in this cgroup from its first byte on."""
        # A shell joins and becomes the command: code between fork and exec is not safe in a process with threads.
        return [
            "/bin/sh",
            "-c",
            'echo $$ >"$0/cgroup.procs" && exec "$@"',
            str(self.directory),
            *map(str, command),
        ]

    def used(self) -> int:
        """Give what is in use now, bytes, counted as in `peak`."""
        return int((self._first("memory.usage_in_bytes", "memory.current")).read_text())

    def peak(self) -> int:
        """Most memory that was in use at once, bytes: anonymous, page cache, page tables and other kernel memory."""
        return int((self._first("memory.max_usage_in_bytes", "memory.peak")).read_text())

    def times_full(self) -> int:
        """How often the limit was reached and the kernel had to reclaim something."""
        if (self.directory / "memory.failcnt").exists():
            return int((self.directory / "memory.failcnt").read_text())
        return self._event("memory.events", "max")

    def killed(self) -> int:
        """How many processes the kernel killed because nothing could be reclaimed."""
        return self._event(self._first("memory.oom_control", "memory.events").name, "oom_kill")

    def _first(self, version_1: str, version_2: str) -> Path:
        file = self.directory / version_1
        return file if file.exists() else self.directory / version_2

    def _event(self, file: str, name: str) -> int:
        for line in (self.directory / file).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
        return 0


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[MemoryCgroup]:
    """Make a cgroup that may use `limit` bytes and no swap; remove it afterwards.

    Raises
    ------
    CgroupUnavailableError
        Where none can be made.
    """
    version_1 = ROOT / "memory"
    directory = (version_1 if version_1.is_dir() else ROOT) / f"edgemoe-{os.getpid()}-{time.monotonic_ns()}"
    try:
        directory.mkdir()
    except OSError as error:
        raise CgroupUnavailableError(f"no memory cgroup can be made below {directory.parent}: {error}") from error
    try:
        try:
            if version_1.is_dir():
                (directory / "memory.limit_in_bytes").write_text(str(limit))
                # memsw is memory and swap together. Its limit is a little higher, as only the other one's is counted.
                no_swap = {"memory.swappiness": 0, "memory.memsw.limit_in_bytes": limit + _SWAP_BYTES}
            else:
                (directory / "memory.max").write_text(str(limit))
                no_swap = {"memory.swap.max": 0}
            for file, value in no_swap.items():
                with contextlib.suppress(OSError):  # absent where the kernel has no swap, or does not count it
                    (directory / file).write_text(str(value))
            # Fails without memory.peak, which is what all this is for (Linux 5.19).
            group = MemoryCgroup(directory, limit)
            group.peak()
        except OSError as error:
            raise CgroupUnavailableError(f"{directory.parent} makes no usable memory cgroup: {error}") from error
        yield group
    finally:
        _remove(directory)


def _remove(directory: Path) -> None:
    # A process that has just been killed leaves its cgroup a moment later.
    for _ in range(50):
        try:
            directory.rmdir()
            return
        except OSError:
            time.sleep(0.1)


def drop_page_cache() -> bool:
    """Drop all clean page cache of the machine; False without the right to do so."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True
