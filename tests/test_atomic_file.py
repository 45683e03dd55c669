from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemoe.atomic_file import atomic_file


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new, and longer")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new, and longer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_failed(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    with pytest.raises(type(error)), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "none" / "file"):
        pytest.fail("opened")


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    with atomic_file(path) as file:
        file.write(b"data")
    assert synced == [False]


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def write(path: Path, data: bytes, mode: int = 0o666) -> int:
    """Write it, and give its permissions."""
    with atomic_file(path, mode) as file:
        file.write(data)
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("usual_umask")
def test_permissions_are_kept(tmp_path: Path) -> None:
    assert write(tmp_path / "usual", b"") == 0o644
    assert write(tmp_path / "private", b"", 0o600) == 0o600
    for kept in (0o600, 0o666, 0o444):
        (tmp_path / "usual").chmod(kept)
        assert write(tmp_path / "usual", b"new", 0o640) == kept


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "file", tmp_path / "link"
    link.symlink_to("folder/file")
    for data in (b"new", b"newer"):
        write(link, data)
        assert link.is_symlink() and not target.is_symlink() and target.read_bytes() == data
    assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / "folder", target, link])
