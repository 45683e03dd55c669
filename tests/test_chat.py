from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from fake_llama import MIB, FakeLlama

from edgemoe import chat
from edgemoe.chat import LONGEST_TOKEN, ChatSession, Sampling, complete
from edgemoe.errors import PromptError, StoreError

SAMPLING = Sampling(max_tokens=None, temperature=0.0, seed=7)


def session(llama: Any, max_tokens: int | None = None) -> ChatSession:
    return ChatSession(llama, Sampling(max_tokens, 0.0, 7))


def test_answer_streams_and_joins_the_history() -> None:
    llama = FakeLlama(["Fine", " thanks"], ["Bye"])
    talk = session(llama)
    assert list(talk.ask("How are you")) == ["Fine", " thanks"]
    assert talk.ask("Well").drain() == "Bye"
    assert llama.prompts[-1] == "user: How are you assistant: Fine thanks user: Well assistant:"
    assert talk.turns == [
        {"role": "user", "content": "How are you"},
        {"role": "assistant", "content": "Fine thanks"},
        {"role": "user", "content": "Well"},
        {"role": "assistant", "content": "Bye"},
    ]


def test_each_answer_takes_the_next_seed() -> None:
    llama = FakeLlama(["a"], ["b"])
    talk = ChatSession(llama, Sampling(None, 0.0, 2**32 - 1))  # type: ignore[arg-type]
    assert [talk.ask("x").seed, talk.ask("y").seed] == [2**32 - 1, 0]


def test_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FakeLlama(["one", " two", " three"])
    monkeypatch.setattr(chat.time, "perf_counter", lambda: llama.clock)
    answer = session(llama).ask("count to three")
    answer.drain()
    # 5 tokens of prompt at 0.1 s; then three steps of 0.5 s, the last of which finds the end mark.
    assert (answer.prompt_tokens, answer.reused_tokens, answer.tokens) == (5, 0, 3)
    assert answer.prompt_rate == pytest.approx(10)
    assert answer.generation_rate == pytest.approx(2)
    assert (answer.hits, answer.misses, answer.hit_rate) == (8, 8, 0.5)
    assert (answer.prompt_bytes, answer.generation_bytes, answer.bytes_per_token) == (5 * MIB, 3 * MIB, MIB)
    assert answer.finish_reason == "stop"
    assert (answer.waited_seconds, answer.busy_seconds, answer.retries) == (0, 0, 0)


def test_counters_of_one_answer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> None:
        llama.waited_seconds, llama.busy_seconds, llama.retries = 1.5, 2.5, 3

    llama = FakeLlama(["one"], ["two", wait, " three"])
    llama.waited_seconds, llama.busy_seconds, llama.retries = 1.0, 1.0, 1
    monkeypatch.setattr(chat.time, "perf_counter", lambda: llama.clock)
    talk = session(llama)
    talk.ask("first").drain()
    answer = talk.ask("again")
    answer.drain()
    # "user: first assistant: one" is still in the KV cache, "user: again assistant:" is not.
    assert (answer.prompt_tokens, answer.reused_tokens, answer.tokens) == (7, 4, 2)
    assert answer.prompt_rate == pytest.approx(10)
    assert answer.prompt_bytes == 3 * MIB
    assert (answer.waited_seconds, answer.busy_seconds, answer.retries) == (0.5, 1.5, 2)


def test_suspended_time_ruins_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks go on while the process is stopped, those of waiting and reading, too."""

    def stop() -> None:
        llama.reading = replace(llama.reading, stopped=llama.reading.stopped + 12)
        llama.clock += 12
        llama.waited_seconds += 12 + 0.125
        llama.busy_seconds += 12 + 0.25

    def sleep() -> None:
        llama.reading = replace(llama.reading, asleep=3600)

    llama = FakeLlama([stop, "one", stop, " two", sleep, " three"], ["fine"])
    monkeypatch.setattr(chat.time, "perf_counter", lambda: llama.clock)
    talk = session(llama)
    answer = talk.ask("count to three")
    answer.drain()
    assert answer.prompt_rate == pytest.approx(10)
    assert answer.generation_rate == pytest.approx(2)
    assert answer.suspended_seconds == 3624
    assert answer.conditions == ["was suspended 3624 s"]
    # Of the two steps in which it was stopped no more than they ran, 0.5 s each.
    assert (answer.waited_seconds, answer.busy_seconds) == pytest.approx((1, 1))
    again = talk.ask("well?")
    again.drain()
    assert (again.suspended_seconds, again.conditions) == (0, [])


def test_stopped_while_the_text_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FakeLlama(["one", " two"])
    monkeypatch.setattr(chat.time, "perf_counter", lambda: llama.clock)
    answer = session(llama).ask("count")
    for _ in answer:
        llama.clock += 30
        llama.reading = replace(llama.reading, stopped=llama.reading.stopped + 30)
    assert answer.generation_rate == pytest.approx(2)
    assert answer.suspended_seconds == 60


def test_slow_computing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither waiting for the disk nor for who takes the text is computing."""

    def wait() -> None:
        llama.clock += 5
        llama.waited_seconds += 5

    def throttle() -> None:
        llama.clock += 1

    llama = FakeLlama(["a"] * 20, [wait, "a"] * 20, [throttle, "a"] * 20, n_ctx=512)
    monkeypatch.setattr(chat.time, "perf_counter", lambda: llama.clock)
    talk, told = session(llama), []
    for _ in range(3):
        answer = talk.ask("x")
        for _ in answer:
            llama.clock += 7
        told.append(answer.conditions)
        talk.reset()
    assert told[:2] == [[], []]
    assert [words.partition(" times")[0] for words in told[2]] == ["computing took 3.0"]


def test_bounded_answer() -> None:
    answer = session(FakeLlama(["a", " b", " c"]), max_tokens=2).ask("x")
    assert answer.drain() == "a b"
    assert (answer.finish_reason, answer.tokens) == ("length", 2)


def test_empty_answer_has_no_rates_and_is_not_remembered() -> None:
    class Silent(FakeLlama):
        def create_completion(self, prompt: list[int], **_: Any) -> Any:
            yield {"choices": [{"text": "", "finish_reason": "stop"}]}

    talk = session(Silent())
    answer = talk.ask("x")
    assert answer.drain() == ""
    assert (answer.generation_rate, answer.hit_rate, answer.bytes_per_token) == (None, None, None)
    assert talk.turns == []


def test_interrupted_answer_is_kept() -> None:
    talk = session(FakeLlama(["one", " two", KeyboardInterrupt()]))
    answer = talk.ask("count")
    with pytest.raises(KeyboardInterrupt):
        answer.drain()
    assert (answer.text, answer.finish_reason, answer.tokens) == ("one two", "interrupted", 2)
    assert [turn["content"] for turn in talk.turns] == ["count", "one two"]


def test_abandoned_answer_is_kept() -> None:
    talk = session(FakeLlama(["one", " two"]))
    answer = talk.ask("count")
    with contextlib.closing(iter(answer)) as pieces:
        next(pieces)
    assert (answer.text, answer.finish_reason) == ("one", "interrupted")
    assert talk.turns[-1]["content"] == "one"


def test_interrupted_before_the_first_token_leaves_no_trace() -> None:
    llama = FakeLlama([KeyboardInterrupt()], ["fine"])
    talk = session(llama)
    answer = talk.ask("first")
    with pytest.raises(KeyboardInterrupt):
        answer.drain()
    assert (answer.tokens, answer.prompt_rate, answer.text) == (0, None, "")
    talk.ask("second").drain()
    assert llama.prompts[-1] == "user: second assistant:"


def test_disk_error_keeps_the_text() -> None:
    answer = session(FakeLlama(["one", StoreError("disk")])).ask("count")
    with pytest.raises(StoreError):
        answer.drain()
    assert (answer.text, answer.finish_reason) == ("one", "error")


def test_oldest_turns_are_dropped() -> None:
    llama = FakeLlama(["a1"], ["a2"], ["a3"], ["a4"], n_ctx=16)
    talk = session(llama)
    dropped = []
    for question in ("q1", "q2", "q3", "q4"):
        talk.ask(question).drain()
        dropped.append(talk.dropped_turns)
    # A turn takes 4 tokens, a question 3, and a quarter of the 16 is for the answer: three turns are too many.
    assert dropped == [0, 0, 0, 1]
    assert llama.prompts[-1] == "user: q2 assistant: a2 user: q3 assistant: a3 user: q4 assistant:"


def test_system_message_survives_dropping_and_reset() -> None:
    llama = FakeLlama(["a1"], ["a2"], ["a3"], n_ctx=12)
    talk = session(llama)
    talk.system = "Be brief"
    talk.ask("q1").drain()
    talk.ask("q2").drain()
    assert talk.dropped_turns == 1
    assert llama.prompts[-1] == "system: Be brief user: q2 assistant:"
    talk.reset()
    talk.ask("q3").drain()
    assert llama.prompts[-1] == "system: Be brief user: q3 assistant:"


def test_question_longer_than_the_context() -> None:
    llama = FakeLlama(["a1"], ["a2"], n_ctx=16)
    talk = session(llama)
    talk.ask("q1").drain()
    with pytest.raises(
        PromptError, match=r"^the prompt has 22 tokens, but the context holds 16 with the answer; .*n_ctx"
    ):
        talk.ask("word " * 20)
    assert [turn["content"] for turn in talk.turns] == ["q1", "a1"]


@pytest.mark.parametrize(
    "ask", [lambda llama, text: session(llama).ask(text), lambda llama, text: complete(llama, text, SAMPLING)]
)
def test_text_that_cannot_fit_is_not_tokenized(ask: Any) -> None:
    llama = FakeLlama(["a"], n_ctx=16)
    said = r"^the prompt has more than 16 tokens, but the context holds 16"
    with mock.patch.object(llama, "tokenize", side_effect=AssertionError), pytest.raises(PromptError, match=said):
        ask(llama, "x" * 16 * LONGEST_TOKEN)


def test_question_that_leaves_little_room_is_tried() -> None:
    answer = session(FakeLlama(["a", " b", " c"], n_ctx=8)).ask("1 2 3 4")
    assert answer.drain() == "a b"
    assert answer.finish_reason == "length"


def test_template_that_refuses() -> None:
    talk = session(FakeLlama())
    with pytest.raises(
        PromptError, match=r"^the chat template of fake\.gguf refuses this conversation \(no such role\)"
    ):
        talk.ask("REFUSE")
    assert talk.turns == []


def test_complete_continues_the_text_itself() -> None:
    llama = FakeLlama([" upon", " a"])
    answer = complete(llama, "Once", SAMPLING)  # type: ignore[arg-type]
    assert answer.drain() == " upon a"
    assert llama.prompts == ["Once"]


def test_complete_longer_than_the_context() -> None:
    with pytest.raises(PromptError, match="has 4 tokens, but the context holds 4"):
        complete(FakeLlama(n_ctx=4), "1 2 3 4", SAMPLING)  # type: ignore[arg-type]
