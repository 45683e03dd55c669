"""The chat's screens, with a model that answers from a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click.testing
import pytest
from fake_llama import MIB, FakeLlama
from plain_llama import TINY_MOE

from edgemoe import chat
from edgemoe.cli import main, ui
from edgemoe.cli.options import ModelOptions
from edgemoe.conditions import Reading
from edgemoe.errors import StoreError
from edgemoe.residency import Switch

SWITCH = Switch(3 * MIB, 0.5)
HELP = """\
/task         show the tasks, and which is active
/task NAME    use that task; /task all: all experts; /task auto: whatever the prompts are about
/system TEXT  set the system message; without TEXT remove it
/save FILE    save the conversation, its task, and which experts are in memory
/load FILE    go on with a saved one
/reset        forget the conversation
/plan         show where the memory goes
/stats        show what the latest answer took
/help         show this
/quit         leave, as Ctrl-D does
Ctrl-C stops an answer, Alt-Enter starts a new line, a blank before / makes it text.
"""


def converse(monkeypatch: pytest.MonkeyPatch, llama: FakeLlama, lines: str, *arguments: str) -> click.testing.Result:
    """What `edgemoe chat` prints when these lines are piped into it."""
    monkeypatch.setattr(ModelOptions, "open", lambda *_, **__: llama)
    monkeypatch.setattr(chat.time, "perf_counter", lambda: llama.clock)
    monkeypatch.setattr(ui, "current_rss", lambda: 80 * MIB)
    monkeypatch.setattr(ui, "peak_rss", lambda: 90 * MIB)
    result = click.testing.CliRunner().invoke(main, ["chat", "fake.gguf", "--seed", "1", *arguments], input=lines)
    assert llama.closed
    return result


def test_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FakeLlama(["Fine,", " thanks."], ["Bye."])
    result = converse(monkeypatch, llama, "How are you?\n\nWell then\n")
    assert result.exit_code == 0
    assert result.stdout == "Fine, thanks.\nBye.\n"
    assert result.output == (
        "Fine, thanks.\n"
        "2 tokens, 2.0 tok/s, hit rate 50.0%, RAM 80.0 MiB of 100 MiB (peak 90.0 MiB)\n"
        "Bye.\n"
        "1 token, 2.0 tok/s, hit rate 50.0%, RAM 80.0 MiB of 100 MiB (peak 90.0 MiB)\n"
    )


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FakeLlama(["Yes."])
    lines = "/stats\n/help\n/system Be brief.\nReally?\n/stats\n/reset\n/system\n/nonsense\n/plan\n/quit\nnever read\n"
    result = converse(monkeypatch, llama, lines)
    assert result.exit_code == 1, "one was refused"
    assert result.stdout == "Yes.\n"
    assert result.stderr == (
        "No answer yet.\n"
        + HELP
        + "The system message is set.\n"
        + "1 token, 2.0 tok/s, hit rate 50.0%, RAM 80.0 MiB of 100 MiB (peak 90.0 MiB)\n"
        + "peak memory  90.0 MiB of 100 MiB\n"
        + "hit rate     50.0% of 14 expert parts\n"
        + "prompt       6 tokens, 10.0 tok/s\n"
        + "generation   1 token, 2.0 tok/s\n"
        + "read         6.00 MiB for the prompt, then 1.00 MiB for each token\n"
        + "io           direct: it works\n"
        + "seed         1\n"
        + "The conversation is forgotten.\n"
        + "There is no system message.\n"
        + "edgemoe: there is no command /nonsense; /help lists them\n"
        + "dense weights  60.0 MiB  every token\n"
        + "expert arena   40.0 MiB  half of them\n"
        + "total           100 MiB  --ram 100MiB\n"
        + "\n"
        + "context         64 tokens\n"
        + "prompt batch    32 tokens, all experts of a batch fit at once\n"
        + "smallest --ram  71MiB at this context\n"
        + "\n"
        + "A note.\n"
    )
    assert llama.prompts == ["system: Be brief. user: Really? assistant:"]


def test_disk_that_was_worse_than_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def happens(waited_seconds: float, busy_seconds: float, retries: int) -> Callable[[], None]:
        def happen() -> None:
            llama.waited_seconds += waited_seconds
            llama.busy_seconds += busy_seconds
            llama.retries += retries

        return happen

    # The first takes 0.8 s and reads 4 MiB, each other one 0.7 s and 3 MiB, of which one word is known.
    llama = FakeLlama(
        ["Slow.", happens(0.4, 0.05, 1)],
        ["Failing.", happens(0.0, 0.0, 3)],
        ["Little wait.", happens(0.17, 0.05, 0)],
        ["Half as fast as it was.", happens(0.6, 0.0057, 0)],
    )
    result = converse(monkeypatch, llama, "a\n/stats\n/reset\nb\n/reset\nc\n/reset\nd\n")
    answers = [line for line in result.stderr.splitlines() if "tok/s, hit rate" in line]
    told = [line.partition("(peak 90.0 MiB)")[2] for line in answers]
    slow = "83.9 MB/s, 1.1 GB/s when measured: waiting for it took 50% of the time; 1 read failed and was repeated"
    assert told == [f", disk: {slow}", ", disk: 3 reads failed and were repeated", "", ""]
    assert f"\ndisk         {slow}\n" in result.stderr


def test_bad_conditions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def happen() -> None:
        llama.clock += 12
        llama.reading = Reading(stopped=12)

    def lose_memory() -> None:
        llama.reading = Reading(stopped=12, faults=1200)

    llama = FakeLlama(["Well,", happen, " yes.", lose_memory, " Or no."], ["Fine."])
    result = converse(monkeypatch, llama, "a\n/stats\nb\n")
    first, *table, last = result.stderr.splitlines()
    stopped, taken = "was suspended 12 s", "memory is short: 1,200 pages that were taken away had to be read again"
    assert first.startswith("3 tokens, 2.0 tok/s, hit rate")
    assert first.endswith(f" (peak 90.0 MiB), {stopped}, {taken}")
    assert f"conditions   {stopped}; {taken}" in table
    assert last.endswith(" (peak 90.0 MiB)")
    assert result.stdout == "Well, yes. Or no.\nFine.\n"


def test_what_was_skipped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FakeLlama(["Yes."])
    llama.skip_mass = 0.02
    result = converse(monkeypatch, llama, "Really?\n")
    assert ", skipped 12.5% of routings, 1.0% of router mass (bound 2.0%), " in result.stderr


def test_blank_before_a_slash_makes_it_text(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FakeLlama(["A folder."])
    assert converse(monkeypatch, llama, " /etc\n").stdout == "A folder.\n"
    assert llama.prompts == ["user: /etc assistant:"]


def test_session_files_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def model(*scripts: list[str]) -> FakeLlama:
        llama = FakeLlama(*scripts)
        llama.index.path = TINY_MOE
        llama.store.residents = lambda: {0: (5, 1)}
        llama.residency = SimpleNamespace(restore=lambda residents, preferred: restored.append(residents) or SWITCH)
        return llama

    restored: list[dict[int, tuple[int, ...]]] = []
    talk = tmp_path / "talk.json"
    result = converse(monkeypatch, model(["Yes."]), f"/system Be brief.\nReally?\n/save {talk}\n/save\n")
    assert result.stderr.splitlines()[-2:] == [
        f"Saved: {talk}.",
        "edgemoe: /save needs a file, as in /save talk.json",
    ]
    llama = model(["Sure."])
    result = converse(monkeypatch, llama, f"/load {talk}\nSure?\n")
    assert result.stderr.splitlines()[0] == f"{talk}: 2 messages; 3.00 MiB of experts read in 0.5 s."
    assert llama.prompts == ["system: Be brief. user: Really? assistant: Yes. user: Sure? assistant:"]
    assert restored == [{0: (5, 1)}]


def test_what_is_refused_ends_nothing_but_is_in_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "over.txt"
    other.write_text("mine")
    lines = [f"/load {tmp_path / 'none.json'}", f"/save {other}", "/load", "/task law", "/foo", "word " * 9, "Hi"]
    llama = FakeLlama(["Yes."], n_ctx=8)
    llama.index.path = TINY_MOE
    llama.store.residents = lambda: {}
    result = converse(monkeypatch, llama, "\n".join(lines), "--quiet")
    assert (result.exit_code, result.stdout, other.read_text()) == (1, "Yes.\n", "mine")
    assert result.stderr.splitlines() == [
        f"edgemoe: {tmp_path / 'none.json'} cannot be read: No such file or directory;"
        " check the path and its permissions",
        f"edgemoe: {other} is no edgemoe session, or a damaged one; give the path of one, or of a new file",
        "edgemoe: /load needs a file, as in /load talk.json",
        "edgemoe: this chat knows no tasks; start it with --experts task or auto",
        "edgemoe: there is no command /foo; /help lists them",
        "edgemoe: the prompt has 11 tokens, but the context holds 8 with the answer; shorten it or give a larger --ctx",
    ]


def test_a_session_is_saved_after_each_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    talk, seen = tmp_path / "talk.json", []

    def look() -> None:
        saved = json.loads(talk.read_text())
        seen.append((saved["turns"], saved["n_asked"], saved["residents"]))
        residents[0] = (6, 5)

    residents = {0: (5, 1)}
    llama = FakeLlama([look, "Yes."], [look, "No."])
    llama.index.path = TINY_MOE
    llama.store.residents = lambda: residents
    assert converse(monkeypatch, llama, "Really?\nSure?\n", "--session", str(talk)).exit_code == 0
    assert seen == [([], 0, {"0": [5, 1]}), (["Really?", "Yes."], 1, {"0": [6, 5]})]


def test_a_session_that_cannot_be_saved_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    talk = folder / "talk.json"
    llama = FakeLlama([lambda: folder.rename(tmp_path / "away"), "Yes."], [folder.mkdir, "No."])
    llama.index.path = TINY_MOE
    llama.store.residents = lambda: {}
    folder.mkdir()
    result = converse(monkeypatch, llama, "Really?\nSure?\n", "--session", str(talk), "--quiet")
    assert (result.exit_code, result.stdout) == (1, "Yes.\nNo.\n")
    assert result.stderr.startswith(f"edgemoe: {talk} cannot be written: No such file or directory")
    assert json.loads(talk.read_text())["turns"] == ["Really?", "Yes.", "Sure?", "No."]


def test_a_session_is_saved_however_it_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llama = FakeLlama(["Yes."], ["Well,", StoreError("the disk is gone")])
    llama.index.path = TINY_MOE
    llama.store.residents = lambda: {}
    talk = tmp_path / "talk.json"
    assert converse(monkeypatch, llama, "Really?\nAnd?\n", "--session", str(talk)).exit_code == 1
    assert json.loads(talk.read_text())["turns"] == ["Really?", "Yes.", "And?", "Well,"]
    talk.write_text("{")
    llama = FakeLlama()
    llama.index.path = TINY_MOE
    result = converse(monkeypatch, llama, "Really?\n", "--session", str(talk))
    assert (result.exit_code, llama.prompts, talk.read_text()) == (1, [], "{"), "what is damaged is not overwritten"


def test_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    result = converse(monkeypatch, FakeLlama(["Yes."], has_chat_template=False), "Really?\n", "--quiet")
    assert (result.stdout, result.stderr) == ("Yes.\n", "")


def test_json_is_a_line_for_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_ahead() -> None:
        llama.prefetched_bytes, llama.wasted_bytes = 4 * MIB, MIB
        llama.waited_seconds, llama.busy_seconds, llama.retries = 0.5, 0.25, 2

    llama = FakeLlama(["Yes,", read_ahead, " two\nlines."], ["No."])
    result = converse(monkeypatch, llama, "Really?\nNo?\n", "--json")
    first, second = map(json.loads, result.stdout.splitlines())
    assert result.stderr == ""
    assert (first["text"], second["text"]) == ("Yes, two\nlines.", "No.")
    assert first["finish_reason"] == "stop"
    assert first["dropped_turns"] == 0
    assert first["timings"] == {
        "prompt_tokens": 3,
        "reused_tokens": 0,
        "prompt_seconds": pytest.approx(0.3),
        "prompt_tokens_per_second": pytest.approx(10),
        "generated_tokens": 2,
        "generation_seconds": pytest.approx(1),
        "generated_tokens_per_second": pytest.approx(2),
        "suspended_seconds": 0,
    }
    assert first["stats"] == {
        "hits": 5,
        "misses": 5,
        "hit_rate": 0.5,
        "prompt_bytes_read": 3 * MIB,
        "generation_bytes_read": 2 * MIB,
        "bytes_read_per_token": MIB,
        "prefetched_bytes": 4 * MIB,
        "wasted_bytes": MIB,
        "waited_seconds": 0.5,
        "busy_seconds": 0.25,
        "retries": 2,
        "conditions": [],
        "skip_mass": 0.0,
        "skipped_share": None,
        "skipped_mass": None,
        "rss_bytes": 80 * MIB,
        "peak_rss_bytes": 90 * MIB,
        "budget_bytes": 100 * MIB,
        "io": "direct",
        "io_reason": "it works",
        "seed": 1,
    }


def test_dropped_turns_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FakeLlama(["a1"], ["a2"], n_ctx=8)
    result = converse(monkeypatch, llama, "q1\nq2\n")
    assert result.output.splitlines()[2:4] == ["The context is full: the oldest questions (1) were dropped.", "a2"]


def test_full_context_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    result = converse(monkeypatch, FakeLlama(["a", " b", " c", " d"], n_ctx=5), "q\n")
    assert result.stderr.startswith("2 tokens, 2.0 tok/s, cut: the context is full, hit rate")


def test_model_without_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    result = converse(monkeypatch, FakeLlama(["Yes."], has_chat_template=False), "Really?\n")
    assert result.stderr.splitlines()[0] == "fake has no chat template: using the format llama-2."


def test_disk_error_keeps_the_text_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    result = converse(monkeypatch, FakeLlama(["One", " two", StoreError("the disk failed")]), "Count\nnever read\n")
    assert result.exit_code == 1
    assert result.stdout == "One two\n"
    assert result.stderr.splitlines()[-1] == "edgemoe: the disk failed"


def test_interrupt_ends_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    result = converse(monkeypatch, FakeLlama(["One", KeyboardInterrupt()]), "Count\nnever read\n")
    assert result.exit_code == 130
    assert result.stdout == "One\n"
    assert result.stderr.startswith("1 token, stopped, hit rate")


def test_message_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FakeLlama(["Hi."])
    result = converse(monkeypatch, llama, b"caf\xe9\nHello\n", "--quiet")  # type: ignore[arg-type]
    assert (result.exit_code, result.stdout) == (1, "Hi.\n")
    assert result.stderr == "edgemoe: standard input is not UTF-8 text (byte 0xe9 at 3); convert it first\n"
