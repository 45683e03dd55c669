"""Tasks of a model that runs: what it computes with them, bit for bit, and what prompts are matched by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_llama import TINY_MOE, arena_share, greedy, logits, plain_llama
from task_texts import DOCUMENTS, told
from tiny_models import write_tiny_model
from tiny_patterns import stored_patterns

from edgemoe.backend import Llama
from edgemoe.chat import ChatSession, Sampling, chat_prompt
from edgemoe.documents import Document
from edgemoe.errors import BackendError, PromptError
from edgemoe.evidence import Source
from edgemoe.expert_set import ExpertLayers
from edgemoe.fingerprint import fingerprint
from edgemoe.pattern import make_pattern
from edgemoe.patterns import PatternStore
from edgemoe.plan import expert_pages
from edgemoe.profiling import Spool, pieces_of, record, scores_of, shares_of
from edgemoe.task_mode import TaskMode
from edgemoe.trace import RouterTrace

SETTINGS = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "seed": 1}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks of the trained model, of 12 documents each."""
    folder = tmp_path_factory.mktemp("tasks")
    with Llama(str(TINY_MOE), ram="4GiB", n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True) as llama:
        store = PatternStore(fingerprint(llama.index), folder)
        for number, (task, texts) in enumerate(DOCUMENTS.items()):
            documents = [Document(task, text) for text in texts[:12]]
            pieces = list(pieces_of(llama, documents, 0))
            spool = Spool(folder / f".{task}")
            for piece in pieces:
                spool.add(piece, record(llama, piece, outputs=False))
                spool.take(piece)
            shares = shares_of(spool, pieces)
            source = Source(task, f"{number:064x}", 12, 1000, False, False)
            store.save(make_pattern(task, store.model, "peu", scores_of(spool), source, shares))
            spool.remove()
    return folder


@contextmanager
def served(
    tasks: Path, experts: str, share: float = 1.0, path: Path = TINY_MOE, **changes: Any
) -> Iterator[tuple[Llama, TaskMode]]:
    with arena_share(share), Llama(str(path), experts=experts, tasks=tasks, **{**SETTINGS, **changes}) as llama:
        assert llama.task_mode is not None
        yield llama, llama.task_mode


@pytest.mark.parametrize("share", [1.0, 0.3, 0.1])
def test_soft_is_the_full_model_bit_for_bit(tasks: Path, share: float) -> None:
    """Whatever task is warm, and however little fits."""
    with served(tasks, "auto", share) as (llama, mode):
        prompt = llama.tokenize(told("maths", 1).encode())[:60]
        plain = plain_llama(TINY_MOE, **{**SETTINGS, "n_ubatch": llama.plan.n_ubatch})
        answer = greedy(plain, prompt, 12)
        expected = logits(plain, prompt, answer)
        plain.close()
        for task in ("maths", "german", None):
            mode.pin(task)
            np.testing.assert_array_equal(logits(llama, prompt, answer), expected)
        stats = llama.store.stats()
        assert stats.peak_bytes <= stats.arena_bytes
        assert (stats.evictions > 0) is (share < 1.0)


def test_a_hard_set_is_never_missed_and_a_switch_reads_the_difference(tasks: Path) -> None:
    with served(tasks, "task", 0.45) as (llama, mode):
        index = llama.index
        mode.pin("maths")
        first, second = mode.experts_of("maths"), mode.experts_of("german")
        for chosen in (first, second):
            assert chosen.n_bytes(expert_pages(index)) <= llama.plan.arena_bytes
            assert chosen.n_bytes(expert_pages(index)) > 0.97 * llama.plan.arena_bytes
        mode.pin("german")
        assert mode.switch is not None
        sizes = dict(zip(first.layers, ExpertLayers.of(index).expert_bytes, strict=True))
        pages = dict(zip(first.layers, expert_pages(index), strict=True))
        missing = second.missing_from(first)
        assert 0 < len(missing) < second.n_kept
        # Pages that a neighbour shares are there already, so a little less than all pages of an expert.
        assert 0.8 * sum(sizes[layer] for layer, _ in missing) < mode.switch.bytes_read
        assert mode.switch.bytes_read <= sum(pages[layer] for layer, _ in missing)
        before = llama.store.stats()
        llama.create_completion(told("german", 1), max_tokens=12, temperature=0.0)
        after = llama.store.stats()
        assert (after.misses, after.bytes_read) == (0, before.bytes_read)


def test_a_lower_k_activates_fewer_and_matches_as_before(tasks: Path) -> None:
    """The query is made as the stored vectors were, whatever the pruned model activates."""
    found = {}
    for keep in ("2/12", "12"):
        with served(tasks, "task", keep=keep, logits_all=True) as (llama, mode):
            found[keep] = llama.match(llama.tokenize(told("german", 1).encode()), first=True)
            mode.pin("german")
            traces: list[RouterTrace] = []
            with llama.tap.watch(traces.append, outputs=True):
                llama.eval(list(range(20, 40)))
            assert traces[0].outputs is not None
            assert traces[0].outputs.ids.shape == (8, 20, 2 if keep == "2/12" else 4)
    assert found["2/12"] == found["12"]
    assert found["12"].nearest == "german"


def test_a_pinned_task_is_not_asked(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tasks, "auto", task="python") as (llama, mode):
        assert (mode.active, mode.pinned) == ("python", True)
        monkeypatch.setattr(mode, "consider", lambda _: pytest.fail("asked"))
        llama.create_completion(told("german", 1), max_tokens=2)
        assert mode.active == "python" and mode.match is None
        monkeypatch.undo()
        mode.release()
        llama.create_completion(told("german", 2), max_tokens=2)
        assert mode.active == "german"


def test_a_task_changes_before_an_answer_and_never_within(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tasks, "task", keep="12") as (llama, mode):
        asked: list[int] = []
        consider = mode.consider
        monkeypatch.setattr(mode, "consider", lambda heard: asked.append(llama.n_tokens) or consider(heard))
        pieces = llama.create_completion(told("german", 1), max_tokens=12, temperature=0.0, stream=True)
        assert asked == []
        next(pieces)
        assert len(asked) == 2 and mode.active == "german", "the first router, then all of them"
        active = [mode.active for _ in pieces]
        assert len(active) > 4 and set(active) == {"german"} and len(asked) == 2
        tokens = llama.tokenize(told("maths", 1).encode())
        next(llama.generate(tokens, reset=False))
        assert len(asked) == 2 and mode.active == "german", "text that goes on belongs to the same answer"


def test_prompts_longer_than_the_context(tasks: Path) -> None:
    with served(tasks, "auto", n_ctx=64, n_batch=64) as (llama, mode):
        long = " ".join(DOCUMENTS["maths"])
        tokens = llama.tokenize(long.encode())
        assert len(tokens) > 2 * llama.n_ctx()
        found = llama.match(tokens)
        assert (found.nearest, found.n_tokens) == ("maths", 64), "what the context holds is matched"
        with pytest.raises(PromptError, match=r"the prompt has \d+ tokens, but the context holds 64"):
            ChatSession(llama, Sampling(8, 0.0, 1)).ask(long)
        with pytest.raises(ValueError, match="exceed context window"):
            llama.create_completion(long, max_tokens=4)
        assert mode.active is None and mode.match is None
        assert llama.create_completion(told("maths", 1)[:60], max_tokens=2)["choices"]


def test_what_was_said_is_matched_without_the_words_around_it(tasks: Path) -> None:
    """As the first message of a conversation is heard, so is a prompt that is only asked about."""
    question = told("german", 3)
    with served(tasks, "auto") as (llama, mode):
        found = llama.match(chat_prompt(llama, [{"role": "user", "content": question}]), question, first=True)
        whole = llama.match(chat_prompt(llama, [{"role": "user", "content": question}]), first=True)
        assert found.n_tokens == len(llama.tokenize(question.encode(), add_bos=False)) - 2 < whole.n_tokens
        ChatSession(llama, Sampling(1, 0.0, 1)).ask(question).drain()
        assert mode.match is not None and mode.match.n_tokens == found.n_tokens
        assert found.nearest == "german"


@pytest.mark.parametrize("name", ["qwen3moe", "granitehybrid", "gpt-oss", "deepseek2"])
def test_a_conversation_with_soft_tasks_says_what_it_says_without(name: str, tmp_path: Path) -> None:
    """Matching evaluates prompts early, cuts graphs and goes back; recurrent states cannot go back."""
    (path,) = write_tiny_model(tmp_path / f"{name}.gguf", name)
    folder = stored_patterns(path, tmp_path / "tasks")
    questions = ("What is a river, and where does it end?", "And how long is the longest one of all?", "Why?")

    def talk(llama: Llama) -> list[str]:
        session = ChatSession(llama, Sampling(6, 0.0, 1))
        return [session.ask(question).drain() for question in questions]

    with arena_share(1.0), Llama(str(path), **SETTINGS) as llama:
        expected = talk(llama)
    with served(folder, "auto", path=path) as (llama, mode):
        assert talk(llama) == expected
        assert mode.match is not None


def test_a_recurrent_model_is_asked_on_every_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = write_tiny_model(tmp_path / "hybrid.gguf", "granitehybrid")
    with served(stored_patterns(path, tmp_path / "tasks"), "auto", path=path) as (llama, mode):
        heard_tokens: list[int] = []
        monkeypatch.setattr(mode, "consider", lambda heard: bool(heard_tokens.append(heard.n_token)))
        tokens = list(range(20, 60))
        for token in llama.generate(tokens, temp=0.0):
            answer = [token]
            break
        before = len(heard_tokens)
        more = [*llama.input_ids[: llama.n_tokens].tolist(), *answer, *range(70, 90)]
        next(llama.generate(more, temp=0.0))
        assert heard_tokens[before:] == [21]


def test_a_model_without_tasks_matches_nothing(tmp_path: Path) -> None:
    (path,) = write_tiny_model(tmp_path / "tiny.gguf", "qwen3moe")
    with (
        Llama(str(path), ram="4GiB", **SETTINGS) as llama,
        pytest.raises(BackendError, match='open it with experts="auto" or "task"'),
    ):
        llama.match([5, 6])
