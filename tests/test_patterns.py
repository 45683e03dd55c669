from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from tiny_patterns import tiny_model, tiny_pattern

from edgemoe.errors import PatternError, PatternMismatchError
from edgemoe.pattern_file import encode, read_pattern, write_pattern
from edgemoe.patterns import PatternStore


@pytest.fixture
def store(tmp_path: Path) -> PatternStore:
    return PatternStore(tiny_model(), tmp_path / "store" / "tasks")


def test_the_default_folder_is_the_models_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert PatternStore(tiny_model()).folder == tmp_path / "edgemoe" / "tasks" / ("a" * 16)
    assert not list(tmp_path.iterdir()), "looking makes no folders"


def test_a_task_is_saved_listed_loaded_and_removed(store: PatternStore) -> None:
    assert store.list().patterns == () and store.names() == ()
    for task in ("maths", "law"):
        store.save(tiny_pattern(task))
    assert store.names() == ("law", "maths")
    assert [pattern.task for pattern in store.list().patterns] == ["law", "maths"]
    again = tiny_pattern("maths", seed=5)
    path = store.save(again)
    assert path == store.folder / "maths.pattern"
    assert encode(store.load("maths")) == encode(again)
    store.remove("maths")
    assert store.names() == ("law",) and list(store.folder.iterdir()) == [store.folder / "law.pattern"]


def test_unknown_tasks_get_a_suggestion(store: PatternStore) -> None:
    with pytest.raises(PatternError, match=r"no task 'maths' for tiny a .*, there is none yet; profile it first"):
        store.load("maths")
    store.save(tiny_pattern("maths"))
    store.save(tiny_pattern("law"))
    with pytest.raises(PatternError, match=r"known are law, maths; did you mean maths\?"):
        store.remove("math")
    with pytest.raises(PatternError, match="known are law, maths; profile it first"):
        store.load("../../secret")


def test_a_damaged_file_hides_no_other(store: PatternStore) -> None:
    store.save(tiny_pattern("maths"))
    (store.folder / "bad.pattern").write_bytes(b"?")
    (store.folder / "BAD NAME.pattern").write_bytes(b"?")
    write_pattern(tiny_pattern("other", tiny_model(router="d")), store.folder / "other.pattern")
    write_pattern(tiny_pattern("old-name"), store.folder / "new-name.pattern")
    (store.folder / "folder.pattern").mkdir()
    (store.folder / "notes.txt").write_text("mine")
    found = store.list()
    assert [pattern.task for pattern in found.patterns] == ["maths"]
    assert len(found.problems) == 5
    for problem, expected in zip(
        found.problems,
        ("cannot be a task's name", "checksum is wrong", "not a regular file", "rename it to old-name", "tiny d"),
        strict=True,
    ):
        assert expected in problem
    store.remove("bad")
    assert "bad" not in store.names()


def test_another_models_patterns_stay_out(store: PatternStore, tmp_path: Path) -> None:
    stranger = tiny_pattern(model=tiny_model(router="d"))
    with pytest.raises(PatternMismatchError):
        store.save(stranger)
    write_pattern(stranger, tmp_path / "stranger.pattern")
    with pytest.raises(PatternMismatchError):
        store.import_(tmp_path / "stranger.pattern")
    assert store.names() == ()


def test_another_quantization_is_welcome(store: PatternStore) -> None:
    store.save(tiny_pattern(model=tiny_model(quantization="c")))
    assert store.load("maths").note_for(store.model) is not None


def test_export_and_import(store: PatternStore, tmp_path: Path) -> None:
    pattern = tiny_pattern("maths")
    store.save(pattern)
    assert store.export("maths", tmp_path) == tmp_path / "maths.pattern"
    path = store.export("maths", tmp_path / "for a friend.pattern")
    with pytest.raises(PatternError, match="exists already; remove it"):
        store.export("maths", path)
    with pytest.raises(PatternError, match=r"task 'maths' exists already in .*; remove that one first"):
        store.import_(path)
    other = PatternStore(tiny_model(quantization="c"), tmp_path / "other")
    assert encode(other.import_(path)) == encode(read_pattern(path)) == encode(pattern)
    assert other.names() == ("maths",)
    path.write_bytes(b"?")
    with pytest.raises(PatternError, match="checksum is wrong"):
        other.import_(path)


def test_merging_saves_the_result(store: PatternStore) -> None:
    for task in ("maths", "law"):
        store.save(tiny_pattern(task))
    merged = store.merge(["maths", "law"], "both")
    assert [source.task for source in merged.sources] == ["maths", "law"]
    assert encode(store.load("both")) == encode(merged)
    with pytest.raises(PatternError, match="no task 'physics'"):
        store.merge(["maths", "physics"], "another")
    with pytest.raises(PatternError, match="use all-of-it"):
        store.merge(["maths"], "All of it")


@pytest.mark.parametrize("into", ["law", "maths"])
def test_merging_replaces_no_task(store: PatternStore, into: str) -> None:
    for task in ("maths", "law"):
        store.save(tiny_pattern(task))
    before = store.path(into).read_bytes()
    with pytest.raises(PatternError, match=f"task '{into}' exists already in .*; remove that one first"):
        store.merge(["maths", "law"], into)
    assert store.path(into).read_bytes() == before


def test_removing_takes_all_tasks_or_none(store: PatternStore) -> None:
    for task in ("maths", "law"):
        store.save(tiny_pattern(task))
    with pytest.raises(PatternError, match=r"no task 'nope' .*, known are law, maths; nothing was removed"):
        store.remove("maths", "nope")
    assert store.names() == ("law", "maths")
    store.remove("maths", "law", "law")
    assert store.names() == ()


def test_a_folder_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = PatternStore(tiny_model(), tmp_path / "file" / "tasks")
    with pytest.raises(PatternError, match="cannot be made"):
        store.save(tiny_pattern())
    store = PatternStore(tiny_model(), tmp_path / "file")
    with pytest.raises(PatternError, match="cannot be read"):
        store.list()


def save_often(folder: Path, seed: int) -> None:
    store, pattern = PatternStore(tiny_model(), folder), tiny_pattern(seed=seed)
    for _ in range(20):
        store.save(pattern)


def test_processes_that_save_at_once_leave_a_whole_file(store: PatternStore) -> None:
    store.save(tiny_pattern())
    context = multiprocessing.get_context("spawn")
    savers = [context.Process(target=save_often, args=(store.folder, seed)) for seed in (1, 2)]
    for saver in savers:
        saver.start()
    while any(saver.is_alive() for saver in savers):
        assert store.load("maths").task == "maths"
    for saver in savers:
        saver.join()
        assert saver.exitcode == 0
    assert encode(store.load("maths")) in [encode(tiny_pattern(seed=seed)) for seed in (1, 2)]
    assert list(store.folder.iterdir()) == [store.folder / "maths.pattern"]
