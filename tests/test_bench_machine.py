"""What a result depends on, and cold starts."""

from __future__ import annotations

import json
import mmap
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from bench_models import coolable_model
from plain_llama import REPOSITORY, TINY_MOE

from edgemoe import bench_machine
from edgemoe.bench_machine import describe, disk_bandwidth, make_cold
from edgemoe.errors import StoreError


def test_machine_and_model() -> None:
    found = describe(TINY_MOE)
    json.dumps(found)
    assert datetime.now(timezone.utc) - datetime.fromisoformat(found["date"]) < timedelta(minutes=1)
    assert found["cores"] >= 1 and found["ram"] > 1 << 28 and found["cpu"] and found["disk"]
    assert found["disk_bytes_per_s"] is None or found["disk_bytes_per_s"] > 1 << 20
    assert found["model"]["architecture"] and found["model"]["file_bytes"] == TINY_MOE.stat().st_size
    if (REPOSITORY / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{7,}(\+changes)?", found["commit"])


def test_an_installed_package_has_a_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_machine, "REPOSITORY", tmp_path)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", describe(TINY_MOE)["commit"])


def test_a_clone_that_another_user_owns_has_a_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()  # git refuses somebody else's clone as it does what is none
    monkeypatch.setattr(bench_machine, "REPOSITORY", tmp_path)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", describe(TINY_MOE)["commit"])


def test_a_machine_without_git_has_a_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", describe(TINY_MOE)["commit"])


def test_a_disk_that_cannot_be_measured() -> None:
    assert disk_bandwidth(Path("/proc/self/status")) is None


def test_a_file_that_is_cold(tmp_path: Path) -> None:
    path = coolable_model(tmp_path)
    path.read_bytes()
    make_cold(path)


def test_a_file_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = coolable_model(tmp_path)
    monkeypatch.setattr(bench_machine, "_TRIES", 1)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert sum(pages[at] for at in range(0, len(pages), mmap.PAGESIZE)) > 0
        with pytest.raises(StoreError, match=r"% of .* stays in the page cache"):
            make_cold(path)
