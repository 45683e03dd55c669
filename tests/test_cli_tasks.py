"""Tasks as a user meets them: profile, tasks, match, and a conversation that changes its topic."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click.testing
import pytest
from plain_llama import TINY_MOE, greedy, plain_llama
from task_texts import DOCUMENTS, told

from edgemoe.backend import Llama
from edgemoe.chat import ChatSession, Sampling
from edgemoe.cli import main
from edgemoe.errors import BudgetError, PatternError

RAM = "400MiB"
ROOM = "4GiB"  # in this process, whatever other tests have loaded
MATHS, GERMAN = DOCUMENTS["maths"], DOCUMENTS["german"]


def edgemoe(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgemoe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=300)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of the embedded model, as the command profiles them; one with loss curves."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, texts in DOCUMENTS.items():
        lines = write_lines(folder.parent / f"{task}.jsonl", texts)
        more = () if task == "maths" else ("--no-curves",)
        done = edgemoe("profile", TINY_MOE, lines, "--task", task, "--store", folder, "--ram", RAM, "--ctx", 128, *more)
        assert done.returncode == 0, done.stderr
        assert "share of router mass held by the best experts" in done.stdout
        assert f"saved as {folder / task}.pattern" in done.stderr
    return folder


def test_list_and_show(store: Path) -> None:
    listed = json.loads(edgemoe("tasks", "list", TINY_MOE, "--store", store, "--json").stdout)
    assert [task["task"] for task in listed["tasks"]] == ["german", "maths", "python"]
    assert [task["has_curves"] for task in listed["tasks"]] == [False, True, False]
    shown = edgemoe("tasks", "show", TINY_MOE, "maths", "--store", store).stdout
    assert "20 documents" in shown and "easy-ep" in shown and "16 of 32" in shown
    assert not list(store.glob(".*")), "what was recorded is removed once it is scored"


def test_life_of_a_task(store: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(store, tmp_path / "mine")
    where = ("--store", mine)
    assert edgemoe("tasks", "merge", TINY_MOE, "maths", "german", "--into", "both", *where).returncode == 0
    file = tmp_path / "both.pattern"
    assert edgemoe("tasks", "export", TINY_MOE, "both", file, *where).returncode == 0
    assert edgemoe("tasks", "remove", TINY_MOE, "both", *where).returncode == 0
    assert "no task 'both'" in edgemoe("tasks", "show", TINY_MOE, "both", *where).stderr
    assert edgemoe("tasks", "import", TINY_MOE, file, *where).returncode == 0
    assert "40 documents" not in edgemoe("tasks", "show", TINY_MOE, "both", *where).stderr
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    damaged = edgemoe("tasks", "import", TINY_MOE, file, *where)
    assert damaged.returncode == 1 and "checksum is wrong" in damaged.stderr


@pytest.mark.parametrize(("task", "texts"), DOCUMENTS.items())
def test_match_finds_the_task(store: Path, task: str, texts: list[str]) -> None:
    found = json.loads(edgemoe("match", TINY_MOE, "-", "--store", store, "--ram", RAM, "--json", text=texts[0]).stdout)
    assert found["nearest"] == task


def test_interrupted_profile_goes_on(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "many.jsonl", [f"{number}. {text}" for number in range(4) for text in MATHS])
    command = [sys.executable, "-m", "edgemoe", "profile", str(TINY_MOE), str(lines), "--task", "maths"]
    command += ["--store", str(tmp_path / "store"), "--ram", RAM, "--ctx", "128", "--no-curves"]
    folder = tmp_path / "store" / ".maths.recorded"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        give_up = time.monotonic() + 120
        while len(list(folder.glob("*.npz"))) < 3 and time.monotonic() < give_up:
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    kept = set(folder.glob("*.npz"))
    assert kept and re.search(r"Stopped after \d+ of 80 pieces, which are kept", said)
    stamps = {path: path.stat().st_mtime_ns for path in kept}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as again:
        while len(list(folder.glob("*.npz"))) <= len(kept) and again.poll() is None:
            assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path.exists())
            time.sleep(0.02)
        assert again.wait(timeout=300) == 0
    assert (tmp_path / "store" / "maths.pattern").exists()


def test_interrupted_while_layers_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgemoe.sensitivity.sensitivity", stopped)
    lines = write_lines(tmp_path / "few.jsonl", MATHS[:5])
    command = [
        "profile",
        TINY_MOE,
        lines,
        "--task",
        "maths",
        "--store",
        tmp_path / "store",
        "--ram",
        "4GiB",
        "--ctx",
        128,
    ]
    result = click.testing.CliRunner().invoke(main, [str(argument) for argument in command])
    assert result.exit_code == 130
    assert "Stopped: maths is saved, without what each layer loses" in " ".join(result.stderr.split())
    assert (tmp_path / "store" / "maths.pattern").exists() and list((tmp_path / "store" / ".maths.recorded").iterdir())
    other = write_lines(tmp_path / "other.jsonl", GERMAN[:5])
    refused = click.testing.CliRunner().invoke(main, [str(other if a is lines else a) for a in command])
    assert refused.exit_code == 1 and "task 'maths' exists already" in refused.stderr
    monkeypatch.undo()
    assert click.testing.CliRunner().invoke(main, [str(argument) for argument in command]).exit_code == 0
    assert not (tmp_path / "store" / ".maths.recorded").exists()


@pytest.mark.parametrize("texts", [MATHS, GERMAN])
def test_a_finished_task_is_not_replaced(store: Path, tmp_path: Path, texts: list[str]) -> None:
    before = (store / "maths.pattern").read_bytes()
    lines = write_lines(tmp_path / "texts.jsonl", texts)
    done = edgemoe("profile", TINY_MOE, lines, "--task", "maths", "--store", store, "--ram", RAM, "--ctx", 128)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("edgemoe: task 'maths' exists already in") and "edgemoe tasks remove" in line
    assert (store / "maths.pattern").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no documents in"),
        (b'{"text": "\xff\xfe"}\n', "is not UTF-8 text"),
        (b'{"body": "hello"}\n', 'expected an object with "text"'),
        (b'{"text": \n', "is not JSON"),
    ],
)
def test_calibration_text_that_cannot_be_read(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    done = edgemoe("profile", TINY_MOE, path, "--task", "bad", "--store", tmp_path / "store")
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_few_documents_and_long_ones_are_told(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" ".join(MATHS * 3))
    where = ("--store", tmp_path / "store")
    done = edgemoe("profile", TINY_MOE, path, "--task", "long", *where, "--ctx", 64, "--no-curves", "--ram", RAM)
    assert done.returncode == 0, done.stderr
    assert "1 documents tell little about a task" in done.stderr
    assert "longer than 64 tokens were cut" in done.stderr


def test_answers_of_the_model_are_profiled(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "What does os.path.join do?"}\n')
    where = ("--store", tmp_path / "store", "--ram", RAM, "--no-curves", "--json", "--ctx", 128)
    with_answer = edgemoe("profile", TINY_MOE, path, "--task", "asked", "--answers", 16, *where)
    assert with_answer.returncode == 0, with_answer.stderr
    alone = edgemoe("profile", TINY_MOE, path, "--task", "alone", *where)
    (asked,), (question,) = (json.loads(done.stdout)["sources"] for done in (with_answer, alone))
    assert asked["answers"] and not question["answers"]
    assert question["n_tokens"] < asked["n_tokens"] <= question["n_tokens"] + 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--experts", "task", "--keep", "3"), "needs at least 4 of them"),
        (("--experts", "task", "--keep", "33"), "has 32 experts in a layer"),
        (("--experts", "task", "--keep", "8/4"), "activates more experts than it keeps"),
        (("--experts", "task", "--keep", "many"), "is no number of experts to keep"),
        (("--keep", "16"), "--experts all does not; give --experts task"),
        (("--experts", "auto", "--keep", "16"), "--experts auto does not"),
        (("--experts", "auto", "--task", "mats"), "did you mean maths?"),
    ],
)
def test_options_that_contradict(store: Path, options: tuple[str, ...], said: str) -> None:
    done = edgemoe("run", TINY_MOE, "hello", "--store", store, "--ram", RAM, *options)
    assert done.returncode == 1 and said in done.stderr and done.stdout == ""


def test_no_task_yet(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="run edgemoe profile first"):
        Llama(str(TINY_MOE), ram=ROOM, experts="auto", tasks=tmp_path)


def test_more_experts_than_the_budget_holds(store: Path) -> None:
    with Llama(str(TINY_MOE), ram=ROOM, experts="task", tasks=store, n_ctx=512) as llama:
        free = llama.plan.bytes_of("left free") + llama.plan.bytes_of("headroom")
        fixed = llama.plan.budget.bytes - llama.plan.arena_bytes - free
    with pytest.raises(BudgetError, match="keep=30 takes") as refused:
        Llama(str(TINY_MOE), ram=fixed + (16 << 20), experts="task", keep="30", tasks=store, n_ctx=512)
    assert refused.value.needed is not None and refused.value.needed > fixed + (16 << 20)
    Llama(str(TINY_MOE), ram=refused.value.needed, experts="task", keep="30", tasks=store, n_ctx=512).close()


CONVERSATION = (told("maths"), told("maths", 2), told("german"), "Ja.", told("maths"))


@pytest.mark.parametrize("experts", ["task", "auto"])
def test_a_conversation_that_changes_its_topic(store: Path, experts: str) -> None:
    """Re-selects, reads no more than the difference, stays inside its arena; `auto` stays exact."""
    keep = "4/12" if experts == "task" else None
    active, read, answers = [], [], []
    with Llama(str(TINY_MOE), ram=ROOM, experts=experts, keep=keep, tasks=store, n_ctx=512, seed=1) as llama:
        mode = llama.task_mode
        assert mode is not None
        session = ChatSession(llama, Sampling(8, 0.0, 1))
        for text in CONVERSATION:
            before = mode.switch
            answers.append(session.ask(text).drain())
            active.append(mode.active)
            if mode.switch is not before and mode.switch is not None:
                read.append(mode.switch.bytes_read)
            assert llama.store.stats().resident_bytes <= llama.plan.arena_bytes
        first, second = mode.experts_of("maths"), mode.experts_of("german")
        if experts == "task":
            assert all(11 < chosen.mean_kept <= 12 for chosen in (first, second))
            assert first.kept != second.kept
    assert active == ["maths", "maths", "german", "german", "maths"]
    # What the first switch brought is there still: the arena holds both sets.
    slab = max(sum(t.slab_bytes for t in llama.index.experts if t.layer == layer) for layer in first.layers)
    pages = 3 * 2 * 4096
    assert read[1] <= len(second.missing_from(first)) * (slab + pages) < read[0]
    assert read[2] == 0
    if experts == "auto":
        with Llama(str(TINY_MOE), ram=ROOM, n_ctx=512, seed=1) as exact:
            plain = ChatSession(exact, Sampling(8, 0.0, 1))
            assert [plain.ask(text).drain() for text in CONVERSATION] == answers


def test_a_pinned_task_stays(store: Path) -> None:
    with Llama(str(TINY_MOE), ram=ROOM, experts="task", keep="12", task="python", tasks=store, n_ctx=512) as llama:
        mode = llama.task_mode
        assert mode is not None and mode.pinned and mode.active == "python"
        loaded = llama.store.stats().bytes_read
        ChatSession(llama, Sampling(4, 0.0, 1)).ask(GERMAN[0]).drain()
        assert mode.active == "python"
        assert llama.store.stats().bytes_read == loaded, "a miss cannot happen"
        mode.pin(None)
        assert mode.active_set is None
        mode.release()
        ChatSession(llama, Sampling(4, 0.0, 1)).ask(GERMAN[1]).drain()
        assert mode.active == "german"


def test_all_experts_again_are_the_plain_model(store: Path) -> None:
    with Llama(str(TINY_MOE), ram=ROOM, experts="task", keep="8", task="maths", tasks=store, n_ctx=256) as llama:
        prompt = llama.tokenize(MATHS[0].encode())[:40]
        assert llama.task_mode is not None
        llama.task_mode.pin(None)
        ours = greedy(llama, prompt, 24)
    assert ours == greedy(plain_llama(TINY_MOE, n_ctx=256), prompt, 24)


def test_chat_shows_pins_and_releases(store: Path) -> None:
    lines = "\n".join(
        [GERMAN[0].replace("\n", " "), "/task", "/task python", "/task nobody", "/task all", "/task auto"]
    )
    done = edgemoe(
        "chat", TINY_MOE, "--experts", "auto", "--store", store, "--ram", RAM, "--max-tokens", 4, text=lines + "\n"
    )
    assert done.returncode == 1, done.stderr  # one command was refused
    assert "task: german (german: distance" in done.stderr and "read in" in done.stderr
    assert "tasks: german, maths, python" in done.stderr
    assert "task: python (pinned)" in done.stderr
    assert "there is no task 'nobody'" in done.stderr
    assert "task: none (pinned), all experts may be chosen" in done.stderr
