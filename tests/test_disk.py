from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe import disk
from edgemoe.disk import CANDIDATES, VERSION, DiskSpeed, bandwidth, disk_of, probe
from edgemoe.errors import ModelFileError, StoreError

KIB, MIB = 1 << 10, 1 << 20
DEFAULTS = (8, MIB, None)
DISKS = {
    # Bandwidth by lanes and bytes of a read, and the first good way.
    "nvme": (lambda lanes, size: min(3e9, lanes * size / (80e-6 + size / 1.5e9)), (8, MIB)),
    "usb stick": (lambda lanes, size: size / (1e-3 + size / 100e6), (8, MIB)),
    "hard disk": (lambda lanes, size: size / (12e-3 + size / 180e6), (4, 4 * MIB)),
    "all the same": (lambda lanes, size: 1e9, (8, MIB)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "disks.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Big enough to be measured, and empty."""
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.truncate(disk.SMALL + 1)
    return path


def found(speed: DiskSpeed) -> tuple[int, int, float | None]:
    return speed.lanes, speed.read_bytes, speed.bytes_per_s


def pretend(monkeypatch: pytest.MonkeyPatch, speed: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """A disk of that bandwidth, and the list of what is tried on it."""
    tried = []

    def pretended(path: Path, lanes: int, read_bytes: int, seconds: float) -> float:
        tried.append((lanes, read_bytes))
        return speed(lanes, read_bytes)

    monkeypatch.setattr(disk, "bandwidth", pretended)
    return tried


@pytest.mark.parametrize("name", DISKS)
def test_first_of_the_good_ways(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, best = DISKS[name]
    pretend(monkeypatch, speed)
    assert found(probe(model)) == (*best, speed(*best))


@given(st.lists(st.floats(1, 1e12), min_size=len(CANDIDATES), max_size=len(CANDIDATES)))
def test_nothing_before_it_comes_near(speeds: list[float]) -> None:
    by_candidate = dict(zip(CANDIDATES, speeds, strict=True))
    chosen = disk._measured(lambda lanes, read_bytes, _: by_candidate[lanes, read_bytes])
    near = [candidate for candidate in CANDIDATES if by_candidate[candidate] >= disk.NEAR_BEST * max(speeds)]
    assert (chosen.lanes, chosen.read_bytes) == near[0]
    assert chosen.bytes_per_s == by_candidate[near[0]]


@given(st.sampled_from(CANDIDATES[1:]), st.integers(0, disk.ROUNDS - 1), st.floats(1.7, 100))
def test_one_lucky_try_decides_nothing(lucky: tuple[int, int], which: int, factor: float) -> None:
    n_tries: Counter[tuple[int, int]] = Counter()

    def measure(lanes: int, read_bytes: int, _: float) -> float:
        way = lanes, read_bytes
        n_tries[way] += 1
        return 1e9 * (factor if way == lucky and n_tries[way] == which + 1 else 1)

    chosen = disk._measured(measure)
    assert (chosen.lanes, chosen.read_bytes, chosen.bytes_per_s) == (*CANDIDATES[0], 1e9)


def test_buffers_are_bounded() -> None:
    assert max(lanes * read_bytes for lanes, read_bytes in CANDIDATES) == 16 * MIB
    assert {lanes for lanes, _ in CANDIDATES} == {1, 2, 4, 8, 16}


def test_a_disk_that_answers_slowly_is_tried_less(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def slow(lanes: int, read_bytes: int) -> float:
        nonlocal clock
        clock += 1.5
        return 1e6 * lanes

    monkeypatch.setattr(time, "monotonic", lambda: clock)
    tried = pretend(monkeypatch, slow)
    assert found(probe(model)) == (16, MIB, 16e6)
    assert tried == list(CANDIDATES[:3])


def test_second_probe_reads_nothing(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = pretend(monkeypatch, DISKS["nvme"][0])
    first = probe(model)
    assert first.reason == f"measured on {time.strftime('%Y-%m-%d')}"
    tried.clear()
    assert probe(model) == first
    assert tried == []
    assert [path.name for path in cache.parent.iterdir()] == ["disks.json"]
    other = model.with_name("other.gguf")
    other.write_bytes(b"GGUF")
    os.truncate(other, 2 * disk.SMALL)
    assert probe(other) == first


def test_old_results_are_measured_again_and_leave(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda *_: 1e9)
    probe(model)
    document = json.loads(cache.read_text())
    (entry,) = document["disks"].values()
    document["disks"]["gone"] = {**entry}
    for age, measured_again in ((29 * 86400, False), (31 * 86400, True), (-3600, True)):
        for known in document["disks"].values():
            known["measured"] = time.time() - age
        cache.write_text(json.dumps(document))
        tried = pretend(monkeypatch, lambda *_: 2e9)
        assert probe(model).bytes_per_s == (2e9 if measured_again else 1e9)
        assert bool(tried) == measured_again
        assert ("gone" in json.loads(cache.read_text())["disks"]) == (not measured_again)


ENTRY = {"lanes": 4, "read_bytes": MIB, "bytes_per_s": 5e8, "measured": 0.0}
DAMAGES: dict[str, Any] = {
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "a list": [],
    "no version": {"disks": {}},
    "another version": {"version": VERSION - 1, "disks": {"": {**ENTRY, "measured": time.time()}}},
    "no disks": {"version": VERSION},
    "disks in a list": {"version": VERSION, "disks": [1]},
    "deep": b"[" * 100_000,
} | {
    f"{key} {value!r}": {"version": VERSION, "disks": {"": {**ENTRY, key: value}}}
    for key, value in [
        ("lanes", 0),
        ("lanes", 4.0),
        ("lanes", "4"),
        ("lanes", [4]),
        ("read_bytes", 123),
        ("read_bytes", 64 * MIB),
        ("bytes_per_s", -1),
        ("bytes_per_s", float("nan")),
        ("bytes_per_s", float("inf")),
        ("bytes_per_s", None),
        ("measured", "now"),
        ("more", 1),
    ]
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_cache_is_ignored_and_written_anew(
    damage: str, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = DAMAGES[damage]
    if isinstance(content, dict) and isinstance(content.get("disks"), dict):
        disks = {disk_of(model): entry for entry in content["disks"].values()}
        for entry in disks.values():
            entry["measured"] = entry["measured"] or time.time()
        content = {**content, "disks": disks}
    cache.parent.mkdir()
    cache.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    tried = pretend(monkeypatch, lambda *_: 1e9)
    assert probe(model).bytes_per_s == 1e9
    assert tried
    assert disk_of(model) in json.loads(cache.read_text())["disks"]


def test_small_models_are_not_measured(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = pretend(monkeypatch, lambda *_: 1e9)
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.truncate(disk.SMALL)
    speed = probe(path)
    assert found(speed) == DEFAULTS
    assert speed.reason == "a model of 256 MiB is not worth measuring"
    assert not tried
    assert not cache.exists()


def test_cache_folder_that_cannot_be_made(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEMOE_CACHE", str(tmp_path / "file" / "cache"))
    pretend(monkeypatch, lambda *_: 1e9)
    assert probe(model).bytes_per_s == 1e9


@pytest.mark.parametrize("refusing", ["open", "preadv"])
def test_without_o_direct(refusing: str, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, refusing, refuse)
    speed = probe(model)
    assert found(speed) == DEFAULTS
    assert "Invalid argument" in speed.reason
    assert not cache.exists()


def test_system_without_o_direct(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    assert found(probe(model)) == DEFAULTS


def test_missing_file(tmp_path: Path) -> None:
    for ask in (probe, disk_of):
        with pytest.raises(ModelFileError, match=r"model\.gguf cannot be found \(No such file or directory\)"):
            ask(tmp_path / "model.gguf")
    with pytest.raises(StoreError, match=r"model\.gguf \(No such file or directory\)"):
        bandwidth(tmp_path / "model.gguf", 1, MIB, 0.01)


def test_file_that_was_emptied(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(StoreError):
        bandwidth(tmp_path / "model.gguf", 2, MIB, 0.01)


def test_reads_are_spread_whole_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(4 * MIB + 100))
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def recorded(file: int, buffers: list[Any], offset: int) -> int:
        reads.append((offset, len(buffers[0])))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", recorded)
    try:
        speed = bandwidth(path, 4, MIB, 0.05)
    except StoreError as error:
        pytest.skip(str(error))
    assert 0 < speed < len(reads) * MIB / 0.05
    assert len(reads) >= 4
    assert {size for _, size in reads} == {MIB}
    assert all(offset % 4096 == 0 and offset + MIB <= 4 * MIB + 100 for offset, _ in reads)
    assert len({offset for offset, _ in reads}) > 1


def test_a_real_probe_gives_its_memory_back(model: Path) -> None:
    """In a process of its own, for others have left their marks in this one's peak."""
    program = """
import json, sys, time
from edgemoe.disk import probe
from edgemoe.memory import current_rss, peak_rss
before, begin = current_rss(), time.monotonic()
speed = probe(sys.argv[1])
print(json.dumps([speed.bytes_per_s, time.monotonic() - begin, current_rss() - before, peak_rss() - before]))
"""
    done = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, text=True, check=True)
    bytes_per_s, seconds, kept, peak = json.loads(done.stdout)
    if bytes_per_s is None:
        pytest.skip("no O_DIRECT here")
    assert 1.5 < seconds < 10
    assert kept < 2 * MIB
    assert peak < 20 * MIB


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /sys of our own, where the disk of `tmp_path` is a partition."""
    device = tmp_path.stat().st_dev
    (tmp_path / "sda" / "sda1").mkdir(parents=True)
    (tmp_path / "sda" / "sda1" / "partition").write_text("1\n")
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / f"{os.major(device)}:{os.minor(device)}").symlink_to(tmp_path / "sda" / "sda1")
    monkeypatch.setattr(disk, "_SYSTEM", tmp_path / "block")
    return tmp_path / "sda"


@pytest.mark.parametrize("name", disk._IDENTITIES)
def test_disk_has_its_own_name(name: str, devices: Path, tmp_path: Path) -> None:
    file_system = f"{os.statvfs(tmp_path).f_fsid:x}"
    assert disk_of(tmp_path) == f"{os.major(devices.stat().st_dev)}:{os.minor(devices.stat().st_dev)} {file_system}"
    (devices / name).parent.mkdir(exist_ok=True)
    (devices / name).write_text(" WD-123 \n")
    assert disk_of(tmp_path) == f"WD-123 {file_system}"


def test_empty_serial_number_is_none(devices: Path, tmp_path: Path) -> None:
    (devices / "serial").write_text("\n")
    (devices / "device").mkdir()
    (devices / "device" / "model").write_bytes(b"\xff\xfe")
    assert ":" in disk_of(tmp_path).split()[0]


def test_what_is_no_disk_has_its_device_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_SYSTEM", tmp_path / "nowhere")
    device = tmp_path.stat().st_dev
    assert disk_of(tmp_path).startswith(f"{os.major(device)}:{os.minor(device)} ")
