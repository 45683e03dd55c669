"""A machine with that much RAM: what a cgroup counts, limits and leaves behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemoe import memory_cgroup as module
from edgemoe.memory_cgroup import CgroupUnavailableError, MemoryCgroup, memory_cgroup

MIB = 1 << 20


@pytest.fixture
def group() -> Iterator[MemoryCgroup]:
    try:
        with memory_cgroup(64 * MIB) as made:
            yield made
    except CgroupUnavailableError as error:
        pytest.skip(str(error))


def run(group: MemoryCgroup, n_bytes: int) -> int:
    return subprocess.run(group.command([sys.executable, "-c", f"print(len(bytearray(b'x' * {n_bytes})))"])).returncode


def test_what_fits_is_counted(group: MemoryCgroup) -> None:
    assert run(group, 10 * MIB) == 0
    assert 20 * MIB < group.peak() < 64 * MIB
    assert group.killed() == 0


def test_what_does_not_fit_is_killed(group: MemoryCgroup) -> None:
    assert run(group, 200 * MIB) == -9
    assert group.killed() == 1 and group.times_full() > 0
    assert group.peak() <= 64 * MIB


def test_there_is_no_swap(group: MemoryCgroup) -> None:
    limits = {"memory.swappiness": 0, "memory.memsw.limit_in_bytes": 65 * MIB, "memory.swap.max": 0}
    there = [name for name in limits if (group.directory / name).exists()]
    assert [int((group.directory / name).read_text()) for name in there] == [limits[name] for name in there]


def test_nothing_is_left(group: MemoryCgroup) -> None:
    with memory_cgroup(64 * MIB) as inner:
        assert inner.directory.is_dir() and inner.directory != group.directory
    assert not inner.directory.exists()


def test_none_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path / "nothing")
    with pytest.raises(CgroupUnavailableError, match="no memory cgroup can be made"), memory_cgroup(64 * MIB):
        pass
