"""How a `Llama` is used: by how many threads, interrupted, forked, copied, and after it was closed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from plain_llama import TINY_MOE, logits
from tiny_patterns import stored_patterns

from edgemoe.backend import Llama
from edgemoe.errors import BackendError
from edgemoe.plan import PlanLine
from edgemoe.store import Tuning

SETTINGS: dict[str, Any] = {"ram": "1GiB", "n_ctx": 256, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1}
PROMPT = "def read(path):\n    "
CLOSED = r"^the model is closed; open it again$"
IN_USE = r"^the model is in use by another thread; call it when that one's answer has ended, or its stream was closed$"

Pool = ThreadPoolExecutor


@pytest.fixture(scope="module")
def ours() -> Iterator[Llama]:
    with Llama(str(TINY_MOE), **SETTINGS) as llama:
        yield llama


@pytest.fixture
def other() -> Iterator[Pool]:
    """Another thread."""
    with Pool(1) as pool:
        yield pool


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


class Waiting:
    """A stopping criterion that holds an answer up in mid-computation until it is let go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> bool:
        self.reached.set()
        assert self.go_on.wait(60)
        return False

    def answer(self, llama: Llama) -> str:
        criteria = llama_cpp.StoppingCriteriaList([self])
        return text_of(llama(PROMPT, max_tokens=8, temperature=0.0, stopping_criteria=criteria))


# ---------------------------------------------------------------- closed

REACHING: dict[str, Callable[[Llama], object]] = {
    "call": lambda llama: llama("hi"),
    "create_completion": lambda llama: next(llama.create_completion("hi", stream=True)),
    "create_chat_completion": lambda llama: llama.create_chat_completion([{"role": "user", "content": "hi"}]),
    "generate": lambda llama: next(llama.generate([5])),
    "eval": lambda llama: llama.eval([5]),
    "interrupt": lambda llama: llama.interrupt(),
    "sample": lambda llama: llama.sample(),
    "reset": lambda llama: llama.reset(),
    "embed": lambda llama: llama.embed("hi"),
    "create_embedding": lambda llama: llama.create_embedding("hi"),
    "tokenize": lambda llama: llama.tokenize(b"hi"),
    "detokenize": lambda llama: llama.detokenize([5]),
    "tokenizer": lambda llama: llama.tokenizer().encode("hi"),
    "n_vocab": lambda llama: llama.n_vocab(),
    "n_embd": lambda llama: llama.n_embd(),
    "token_eos": lambda llama: llama.token_eos(),
    "token_bos": lambda llama: llama.token_bos(),
    "token_nl": lambda llama: llama.token_nl(),
    "pooling_type": lambda llama: llama.pooling_type(),
    "save_state": lambda llama: llama.save_state(),
    "load_state": lambda llama: llama.load_state(STATE[0]),
    "ends_with": lambda llama: llama.ends_with(5),
    "skip_mass": lambda llama: setattr(llama, "skip_mass", 0.1),
    "ctx": lambda llama: llama.ctx,
    "model": lambda llama: llama.model,
    "with": lambda llama: llama.__enter__(),
}
STATE: list[Any] = []


@pytest.fixture(scope="module")
def closed(ours: Llama) -> Llama:
    ours.eval([5])
    STATE.append(ours.save_state())
    llama = Llama(str(TINY_MOE), embedding=True, **SETTINGS)
    llama.close()
    return llama


@pytest.mark.parametrize("name", REACHING)
def test_a_closed_model_says_so(closed: Llama, name: str) -> None:
    with pytest.raises(BackendError, match=CLOSED):
        REACHING[name](closed)


def test_a_stream_ends_with_a_sentence_when_its_model_is_closed() -> None:
    llama = Llama(str(TINY_MOE), **SETTINGS)
    stream = llama(PROMPT, max_tokens=20, stream=True)
    assert text_of(next(stream))
    llama.close()
    with pytest.raises(BackendError, match=CLOSED):
        next(stream)


def test_closing_waits_for_the_answer_of_another_thread(other: Pool) -> None:
    llama, waiting = Llama(str(TINY_MOE), **SETTINGS), Waiting()
    answer = other.submit(waiting.answer, llama)
    assert waiting.reached.wait(60)
    closing = threading.Thread(target=llama.close)
    closing.start()
    time.sleep(0.2)
    assert closing.is_alive()
    with pytest.raises(BackendError, match=CLOSED):
        llama.tokenize(b"hi")
    waiting.go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert answer.result(60)
    with pytest.raises(BackendError, match=CLOSED):
        llama("hi")


def test_closing_in_the_midst_of_one_s_own_answer_is_refused(ours: Llama) -> None:
    criteria = llama_cpp.StoppingCriteriaList([lambda *_: ours.close()])
    with pytest.raises(BackendError, match=r"^the model is computing in this very call; close it afterwards$"):
        ours(PROMPT, stopping_criteria=criteria)
    assert ours(PROMPT, max_tokens=2)


def test_threads_that_read_the_vocabulary_while_the_model_is_closed() -> None:
    """A crash would end the whole process."""
    llama, text = Llama(str(TINY_MOE), **SETTINGS), b"for x in range(10): print(x) " * 200

    def read() -> str:
        while True:
            try:
                llama.detokenize(llama.tokenize(text))
            except BackendError as error:
                return str(error)

    with Pool(3) as readers:
        ends = [readers.submit(read) for _ in range(3)]
        time.sleep(0.2)
        llama.close()
    assert {end.result() for end in ends} == {"the model is closed; open it again"}


# ---------------------------------------------------------------- threads


def test_another_thread_is_refused_while_one_computes(ours: Llama, other: Pool) -> None:
    alone = text_of(ours(PROMPT, max_tokens=8, temperature=0.0))
    waiting = Waiting()
    answer = other.submit(waiting.answer, ours)
    assert waiting.reached.wait(60)
    for name in ("call", "create_completion", "generate", "eval", "reset", "embed", "save_state", "skip_mass"):
        with pytest.raises(BackendError, match=IN_USE):
            REACHING[name](ours)
    assert ours.detokenize(ours.tokenize(b"hi", add_bos=False)) == b"hi"
    waiting.go_on.set()
    assert answer.result(60) == alone
    assert text_of(ours(PROMPT, max_tokens=8, temperature=0.0)) == alone


def test_many_threads_at_once_get_the_answer_or_a_sentence(ours: Llama) -> None:
    alone = text_of(ours(PROMPT, max_tokens=12, temperature=0.0))

    def ask(_: int) -> str:
        try:
            return text_of(ours(PROMPT, max_tokens=12, temperature=0.0))
        except BackendError as error:
            return str(error)

    with Pool(4) as pool:
        answers = set(pool.map(ask, range(40)))
    assert alone in answers
    assert len(answers) <= 2
    assert all(answer == alone or "in use by another thread" in answer for answer in answers)


def test_a_stream_half_read_keeps_others_out_until_it_is_closed(ours: Llama, other: Pool) -> None:
    stream = ours(PROMPT, max_tokens=20, stream=True)
    next(stream)
    with pytest.raises(BackendError, match=IN_USE):
        other.submit(ours, "hi", max_tokens=2).result(60)
    stream.close()
    assert other.submit(ours, "hi", max_tokens=2).result(60)


def test_a_stream_may_go_on_in_another_thread(ours: Llama, other: Pool) -> None:
    """As web servers read generators: each piece in whichever thread is free."""
    alone = text_of(ours(PROMPT, max_tokens=8, temperature=0.0))
    stream = ours(PROMPT, max_tokens=8, temperature=0.0, stream=True)
    text = text_of(next(stream)) + text_of(other.submit(next, stream).result(60))
    with pytest.raises(BackendError, match=IN_USE):
        ours("hi")
    assert text + "".join(map(text_of, stream)) == alone


def test_the_same_thread_may_begin_anew_and_the_old_stream_says_so(ours: Llama) -> None:
    alone = text_of(ours(PROMPT, max_tokens=8, temperature=0.0))
    old = ours("An unfinished", max_tokens=20, stream=True)
    next(old)
    assert text_of(ours(PROMPT, max_tokens=8, temperature=0.0)) == alone
    with pytest.raises(
        BackendError, match=r"^the model has evaluated something else since; ask for this answer again$"
    ):
        next(old)
    assert text_of(ours(PROMPT, max_tokens=8, temperature=0.0)) == alone


# ---------------------------------------------------------------- interrupted


def test_an_interrupt_between_two_batches_is_not_lost(ours: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    ours.reset()
    decode, batches = ours._ctx.decode, []

    def decode_and_interrupt(batch: Any) -> None:
        decode(batch)
        batches.append(batch.n_tokens())
        ours.interrupt()

    monkeypatch.setattr(ours._ctx, "decode", decode_and_interrupt)
    monkeypatch.setattr(ours, "n_batch", 8)
    with pytest.raises(KeyboardInterrupt):
        ours.eval(list(range(5, 29)))
    assert batches == [8]
    monkeypatch.undo()
    ours.reset()
    ours.eval([5])


def test_an_interrupt_between_two_tokens_ends_the_answer(ours: Llama, other: Pool) -> None:
    stream = ours.create_completion(PROMPT, max_tokens=8, temperature=0.0, stream=True)
    next(stream)
    other.submit(ours.interrupt).result()
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert text_of(ours(PROMPT, max_tokens=4, temperature=0.0))


def test_an_interrupt_is_for_what_is_under_way_alone(ours: Llama) -> None:
    expected = text_of(ours(PROMPT, max_tokens=4, temperature=0.0))
    ours.interrupt()
    assert text_of(ours(PROMPT, max_tokens=4, temperature=0.0)) == expected
    stream = ours.create_completion(PROMPT, max_tokens=8, temperature=0.0, stream=True)
    next(stream)
    ours.interrupt()
    stream.close()  # before it could end by itself
    assert text_of(ours(PROMPT, max_tokens=4, temperature=0.0)) == expected


@pytest.mark.parametrize("name", ["reset", "eval", "load_state"])
def test_a_stream_does_not_go_on_in_another_context(ours: Llama, name: str) -> None:
    state = ours.save_state()
    uses = {"reset": ours.reset, "eval": lambda: ours.eval([5]), "load_state": lambda: ours.load_state(state)}
    stream = ours.create_completion(PROMPT, max_tokens=8, temperature=0.0, stream=True)
    next(stream)
    uses[name]()
    with pytest.raises(BackendError, match="evaluated something else since; ask for this answer again"):
        list(stream)


def test_a_stream_goes_on_after_what_changes_nothing(ours: Llama) -> None:
    expected = text_of(ours(PROMPT, max_tokens=8, temperature=0.0))
    text = ""
    for piece in ours.create_completion(PROMPT, max_tokens=8, temperature=0.0, stream=True):
        text += text_of(piece)
        ours.save_state()
    assert text == expected


def test_a_fork_says_that_the_model_is_not_its_own() -> None:
    program = f"""
import gc, os, signal, warnings
from edgemoe import Llama
from edgemoe.dry_run import plan_for
from edgemoe.errors import BackendError
from edgemoe.index import read_index
warnings.simplefilter("ignore")  # forks of processes with threads
llama = Llama({str(TINY_MOE)!r}, ram="90MiB", n_threads=1)
before = llama("hi", max_tokens=4, temperature=0.0)["choices"][0]["text"]
for delete in (False, True):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            llama("hi", max_tokens=4)
        except BackendError as error:
            print(error, flush=True)
        if delete:
            del llama
            gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
assert llama("hi", max_tokens=4, temperature=0.0)["choices"][0]["text"] == before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == 2 * "the model was opened by another process, of which this is a fork; open it here\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_sent_to_a_generator_reaches_it() -> None:
    with Llama(str(TINY_MOE), logits_all=True, **SETTINGS) as llama:
        steps = llama.generate([5, 6, 7], temp=0.0)
        first = next(steps)
        steps.send([50, 60])
        assert llama.input_ids[: llama.n_tokens].tolist() == [5, 6, 7, first, 50, 60]


def test_a_thread_that_streams_until_the_program_ends_leaves_no_complaint() -> None:
    program = f"""
import threading, time
from edgemoe.backend import Llama
llama = Llama({str(TINY_MOE)!r}, ram="1GiB", n_ctx=256)
begun = threading.Event()
def stream():
    while True:
        for piece in llama("def", max_tokens=100, stream=True):
            begun.set()
threading.Thread(target=stream, daemon=True).start()
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- copies


def test_pickled_and_opened_again() -> None:
    with Llama(str(TINY_MOE), io="pread", **SETTINGS) as first:
        expected = logits(first, [5, 6, 7], [])
        packed = pickle.dumps(first)
    with pickle.loads(packed) as again:
        assert again.store.io == "pread"
        assert again.plan.budget == first.plan.budget
        assert np.array_equal(logits(again, [5, 6, 7], []), expected)


def test_a_copy_is_given_what_the_first_was(tmp_path: Path) -> None:
    folder = stored_patterns(TINY_MOE, tmp_path)
    own: dict[str, Any] = {
        "experts": "auto",
        "task": "maths",
        "tasks": folder,
        "reserved": (PlanLine("a cache of mine", 1 << 20, "for testing"),),
        "tuning": Tuning(look_ahead=False),
    }
    with Llama(str(TINY_MOE), **own, **SETTINGS) as first:
        first.skip_mass = 0.25
        again = copy.copy(first)
    with again:
        state = again.__getstate__()
        assert {name: state[name] for name in own} == own
        assert (state["ram"], state["io"], state["keep"], state["skip_mass"]) == ("1GiB", "auto", None, 0.25)
        assert again.skip_mass == 0.25
        assert again.task_mode is not None
        assert (again.task_mode.mode, again.task_mode.active) == ("auto", "maths")
        assert again.plan.bytes_of("a cache of mine") == 1 << 20
