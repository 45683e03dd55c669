"""How many threads compute when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from plain_llama import TINY_MOE

from edgemoe import Llama, backend
from edgemoe import threads as module
from edgemoe.threads import default_threads, processor_quota


@pytest.mark.parametrize(
    ("cores", "processors", "allowed", "threads"),
    [(4, 8, 8, 4), (4, 8, 2, 2), (None, 6, 6, 6), (None, None, 3, 1), (2, 2, 4, 2)],
    ids=["two threads a core", "bound to two", "cores unknown", "nothing known", "more allowed than there are"],
)
def test_one_for_each_core_that_may_be_used(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, processors: int | None, allowed: int, threads: int
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: processors if logical else cores)
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.setattr(module, "processor_quota", lambda: None)
    assert default_threads() == threads


def test_system_that_binds_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(module, "processor_quota", lambda: None)
    assert default_threads() == 4


@pytest.mark.parametrize(("quota", "threads"), [(None, 4), (8, 4), (3, 3), (1, 1)])
def test_a_quota_counts_too(monkeypatch: pytest.MonkeyPatch, quota: int | None, threads: int) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(module, "processor_quota", lambda: quota)
    assert default_threads() == threads


@pytest.mark.parametrize(
    ("own", "around", "processors"),
    [
        ("max 100000", "max 100000", None),
        ("200000 100000", "max 100000", 2),
        ("150000 100000", "400000 100000", 2),
        ("max 100000", "50000 100000", 1),
        ("400000 50000", "300000 100000", 3),
        ("junk", "", None),
        ("100000", "0 100000", None),
        ("-5 100000", "100000 0", None),
    ],
)
def test_quota_of_cgroup_version_2(tmp_path: Path, own: str, around: str, processors: int | None) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/box/inner\n")
    (tmp_path / "root" / "box" / "inner").mkdir(parents=True)
    (tmp_path / "root" / "box" / "cpu.max").write_text(around + "\n")
    (tmp_path / "root" / "box" / "inner" / "cpu.max").write_text(own + "\n")
    assert processor_quota(tmp_path / "root", membership) == processors


@pytest.mark.parametrize(("quota", "processors"), [("-1", None), ("250000", 3), ("junk", None)])
def test_quota_of_cgroup_version_1(tmp_path: Path, quota: str, processors: int | None) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:memory:/elsewhere\n3:cpu,cpuacct:/box\n0::/\n")
    box = tmp_path / "root" / "cpu" / "box"
    box.mkdir(parents=True)
    (box / "cpu.cfs_quota_us").write_text(quota + "\n")
    (box / "cpu.cfs_period_us").write_text("100000\n")
    assert processor_quota(tmp_path / "root", membership) == processors


def test_no_cgroup_has_no_quota(tmp_path: Path) -> None:
    assert processor_quota(tmp_path, tmp_path / "no_such_file") is None


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, (3, 3)),
        ({"n_threads": None, "n_threads_batch": 0}, (3, 3)),
        ({"n_threads": 1}, (1, 3)),
        ({"n_threads": 1, "n_threads_batch": 2}, (1, 2)),
    ],
)
def test_llama_takes_them_too(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, int | None], taken: tuple[int, int]
) -> None:
    monkeypatch.setattr(backend, "default_threads", lambda: 3)
    with Llama(str(TINY_MOE), ram="1GiB", n_ctx=32, **given) as llama:
        assert (llama.n_threads, llama.n_threads_batch) == taken
        params = llama.context_params
        assert (params.n_threads, params.n_threads_batch) == taken
