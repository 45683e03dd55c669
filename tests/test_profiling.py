"""From a task's text to what is scored: pieces, what is kept of them, and which of their tokens count for what."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from plain_llama import arena_share
from test_score import recorded
from test_trace import assert_same
from tiny_models import write_tiny_model
from tiny_patterns import tiny_pattern

from edgemoe.backend import Llama
from edgemoe.chat import ChatSession, Sampling, chat_prompt
from edgemoe.documents import Document, Message
from edgemoe.errors import TraceError
from edgemoe.fingerprint import fingerprint
from edgemoe.patterns import PatternStore
from edgemoe.profiling import BEGINNINGS, Piece, Spool, pieces_of, record, scores_of, shares_of
from edgemoe.routed_shares import RoutedShares, routed_shares
from edgemoe.score import CRITERIA, score
from edgemoe.trace import RoutedTokens, RouterTrace, top_k

N_CTX = 64
SETTINGS = {"n_ctx": N_CTX, "n_batch": 32, "n_ubatch": 1, "n_threads": 1, "n_threads_batch": 1, "seed": 1}

RUNNING = Document("a", "one and two and three")
ASKED = Document("b", "2 + 2?\n\n4", (Message("user", "2 + 2?"),), "4")
UNANSWERED = Document("c", "2 + 2?", (Message("user", "2 + 2?"),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiling")


@contextmanager
def opened(folder: Path, name: str = "qwen3moe", seed: int = 0, **changes: Any) -> Iterator[Llama]:
    """A tiny model; with n_ubatch 1 a text gives the same bits in one go and token by token."""
    path = folder / f"{name}-{seed}.gguf"
    if not path.exists():
        write_tiny_model(path, name, seed=seed)
    with arena_share(1.0), Llama(str(path), **{**SETTINGS, "logits_all": True, **changes}) as llama:
        yield llama


@pytest.fixture(scope="module")
def llama(folder: Path) -> Iterator[Llama]:
    with opened(folder) as model:
        yield model


def pieces(llama: Llama, document: Document, n_answer: int = 0) -> list[Piece]:
    return list(pieces_of(llama, [document], n_answer))


def one(llama: Llama, document: Document, n_answer: int = 0) -> Piece:
    (piece,) = pieces(llama, document, n_answer)
    return piece


# ---------------------------------------------------------------- pieces


def test_running_text_is_taken_as_it_is(llama: Llama) -> None:
    piece = one(llama, RUNNING)
    assert llama.detokenize(list(piece.tokens)).decode() == RUNNING.text
    assert (piece.counted, piece.n_answer) == (slice(0, len(piece.tokens)), 0)


def test_the_model_is_hashed_once_for_all_documents(llama: Llama) -> None:
    with mock.patch("edgemoe.profiling.fingerprint", side_effect=fingerprint) as hashed:
        assert len(list(pieces_of(llama, [RUNNING, ASKED, UNANSWERED], 0))) == 3
    assert hashed.call_count == 1


def test_a_conversation_goes_through_the_chat_template(llama: Llama) -> None:
    """As a chat would put the same question."""
    prompt = chat_prompt(llama, [{"role": "user", "content": "2 + 2?"}])
    answered, asked = one(llama, ASKED), one(llama, UNANSWERED)
    said = llama.detokenize(list(answered.tokens), special=True).decode()
    assert said == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4"
    assert list(asked.tokens) == list(answered.tokens[: len(prompt)]) == prompt
    # What was asked is what prompts are compared with, but for its ends: not the template's words, not the answer.
    assert answered.counted == asked.counted
    assert llama.detokenize(prompt[asked.counted], special=True).decode() == " + 2"
    assert len(prompt) < len(answered.tokens)


def test_of_several_turns_the_last_one_counts(llama: Llama) -> None:
    turns = (Message("user", "One?"), Message("assistant", "One."), Message("user", "And two?"))
    piece = one(llama, Document("d", "", turns, "Two."))
    assert llama.detokenize(list(piece.tokens[piece.counted])).decode() == "nd two"


def test_a_model_without_a_template_gets_plain_text(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "index", replace(llama.index, has_chat_template=False))
    piece = one(llama, ASKED)
    assert llama.detokenize(list(piece.tokens)).decode() == ASKED.text


def test_an_answer_is_asked_for_where_there_is_none_and_room_for_it(llama: Llama) -> None:
    length = len(one(llama, UNANSWERED).tokens)
    assert one(llama, UNANSWERED, N_CTX - length).n_answer == N_CTX - length
    assert one(llama, UNANSWERED, N_CTX - length + 1).n_answer == 0
    assert one(llama, ASKED, 4).n_answer == 0
    # A plain text that the model is to go on with is the prompt of what it says.
    running = one(llama, RUNNING, 4)
    assert (running.counted, running.n_answer) == (slice(0, len(running.tokens)), 4)


def test_text_longer_than_the_context_is_cut_and_nothing_is_lost(llama: Llama) -> None:
    text = " ".join(f"{number} is a number" for number in range(30))
    long = Document("d", text, (Message("user", text),), "so it is")
    for document, n_answer in ((Document("e", text), 0), (Document("e", text), 4), (long, 4)):
        found = pieces(llama, document, n_answer)
        assert len(found) > 3 and all(len(piece.tokens) == N_CTX for piece in found[:-1])
        assert all(piece.n_answer == 0 for piece in found)
        assert len({piece.key for piece in found}) == len(found)
        tokens = [token for piece in found for token in piece.tokens]
        whole = llama.detokenize(tokens, special=True).decode()
        assert whole == text if document is not long else whole.startswith("<|im_start|>user\n" + text)
    # Prompts are compared with what was asked, the template's beginning and end and the answer left out.
    counted = llama.detokenize([token for piece in found for token in piece.tokens[piece.counted]]).decode()
    assert text.startswith(counted, 1) and len(counted) > len(text) - 2 * BEGINNINGS[0]
    assert [piece.counted for piece in found[1:-2]] == [slice(0, N_CTX)] * (len(found) - 3)


def test_what_little_is_left_of_a_long_text_does_not_count(llama: Llama) -> None:
    """A few tokens tell a task badly, and the matcher would take short prompts for known ones."""
    for left, counts in ((BEGINNINGS[0] - 1, False), (BEGINNINGS[0], True)):
        first, last = pieces(llama, Document("d", "x" * (N_CTX + left)))
        assert len(last.tokens) == left
        assert (first.counted.stop, last.counted.stop) == (N_CTX, left if counts else 0)
    short = one(llama, Document("d", "x"))
    assert short.counted == slice(0, 1), "a short document is what it is"


def test_a_piece_keeps_its_name_as_long_as_it_is_evaluated_alike(llama: Llama, folder: Path) -> None:
    known = one(llama, UNANSWERED)
    as_text = Document("elsewhere", llama.detokenize(list(known.tokens), special=True).decode())
    assert one(llama, as_text).key == known.key
    others = [one(llama, RUNNING), one(llama, ASKED), one(llama, UNANSWERED, 4), one(llama, UNANSWERED, 5)]
    with opened(folder, n_threads=2) as again:
        assert one(again, UNANSWERED).key == known.key
    # Same tokenizer, same header but for what it says; other weights; fewer experts per token; another type.
    with opened(folder, seed=1) as other:
        others.append(one(other, UNANSWERED))
    with opened(folder, kv_overrides={"qwen3moe.expert_used_count": 2}) as other:
        others.append(one(other, UNANSWERED))
    (small,) = write_tiny_model(folder / "small-0.gguf", "qwen3moe", expert_type="q8_0")
    with opened(folder, "small") as other:
        assert other.index.path == small
        others.append(one(other, UNANSWERED))
    names = [piece.key for piece in (known, *others)]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------- what is recorded


def test_a_piece_is_recorded_as_its_traces_are(llama: Llama) -> None:
    piece = one(llama, Document("a", "some words that take more than a single batch of tokens"))
    assert 32 < len(piece.tokens) <= N_CTX
    traces: list[RouterTrace] = []
    llama.reset()
    with llama.tap.watch(traces.append, outputs=True):
        llama.eval(piece.tokens)
    assert len(traces) == 2
    expected = RoutedTokens.concatenate([top_k(trace, 4, compiled=False) for trace in traces])
    assert_same(record(llama, piece), expected)
    assert_same(record(llama, piece), expected)
    assert_same(record(llama, piece, outputs=False), replace(expected, outputs=None))


def test_the_models_own_answer_is_recorded_as_if_it_had_been_given(llama: Llama) -> None:
    piece = one(llama, UNANSWERED, 12)
    found = record(llama, piece)
    answer = llama.input_ids[len(piece.tokens) : llama.n_tokens].tolist()
    assert len(answer) == 12 and found.n_token == len(piece.tokens) + 12
    given = Piece("", (*piece.tokens, *answer), piece.counted, 0)
    assert_same(found, record(llama, given))
    assert_same(record(llama, piece), found)


@pytest.mark.parametrize("end", ["eos", "eot"])
def test_an_answer_stops_where_the_model_ends_it(llama: Llama, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = one(llama, UNANSWERED, 12)
    last = {"eos": llama.token_eos(), "eot": llama.tokenize(b"<|im_end|>", add_bos=False, special=True)[0]}[end]
    assert (last == llama.token_eos()) is (end == "eos")
    said = iter([30, 31, 32, last, 33, 34])
    monkeypatch.setattr(llama, "sample", lambda *_, **__: next(said))
    assert record(llama, piece).n_token == len(piece.tokens) + 3


def test_experts_whose_outputs_mean_something_else_are_left_out(folder: Path) -> None:
    """llama4 weighs what goes into its experts."""
    with opened(folder, "llama4") as llama:
        assert record(llama, one(llama, RUNNING)).outputs is None
    with opened(folder, "arctic") as llama:
        found = record(llama, one(llama, RUNNING))
        assert found.outputs is not None and np.isnan(found.outputs.change).all()


# ---------------------------------------------------------------- the spool


def named(key: str, counted: slice = slice(0, 3)) -> Piece:
    return Piece(key, (1, 2, 3), counted, 0)


def test_what_was_recorded_is_taken_again(tmp_path: Path) -> None:
    a, b, c = (recorded(seed=seed) for seed in range(3))
    first = Spool(tmp_path / "spool")
    assert not first.take(named("a")) and not (tmp_path / "spool").exists()
    for key, tokens in (("a", a), ("b", b)):
        first.add(named(key), tokens)
    assert len(first) == 0, "a piece counts once it is taken"
    again = Spool(tmp_path / "spool")
    assert [again.take(named(key)) for key in ("b", "c", "a")] == [True, False, True]
    again.add(named("c"), c)
    assert again.take(named("c")) and again.take(named("c"))
    for _ in range(2):  # any number of times, one piece at a time, in the order they were taken
        for found, expected in zip(again, (b, a, c, c), strict=True):
            assert_same(found, expected)
    assert len(again) == 4
    again.remove()
    assert not (tmp_path / "spool").exists()
    again.remove()


@pytest.mark.parametrize("damage", [b"", b"PK\3\4", None])
def test_a_damaged_file_is_recorded_anew(tmp_path: Path, damage: bytes | None) -> None:
    spool = Spool(tmp_path)
    for key in ("a", "b"):
        spool.add(named(key), recorded())
    (file,) = tmp_path.glob("a*")
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    again = Spool(tmp_path)
    assert [again.take(named(key)) for key in ("a", "b")] == [False, True]
    again.add(named("a"), recorded(seed=1))
    assert again.take(named("a"))
    for found, seed in zip(again, (0, 1), strict=True):
        assert_same(found, recorded(seed=seed))


def test_a_folder_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="file/spool cannot be made: Not a directory; check its permissions"):
        Spool(tmp_path / "file" / "spool").add(named("a"), recorded())


# ---------------------------------------------------------------- scores and shares


def spool_of(folder: Path, *parts: RoutedTokens) -> Spool:
    spool = Spool(folder)
    for number, tokens in enumerate(parts):
        spool.add(named(str(number)), tokens)
        assert spool.take(named(str(number)))
    return spool


def test_pieces_are_scored_as_one_text_under_every_criterion(tmp_path: Path) -> None:
    parts = [recorded(n_token=n, seed=n) for n in (5, 40, 17)]
    found = scores_of(spool_of(tmp_path, *parts))
    whole = [RoutedTokens.concatenate(parts)]
    assert list(found) == list(CRITERIA) and next(iter(found)) == "peu"
    for name, scores in found.items():
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(scores, score(whole, CRITERIA[name]).scores().astype(np.float32))


def test_criteria_that_cannot_be_had_are_left_out(tmp_path: Path) -> None:
    of_router = {name for name, criterion in CRITERIA.items() if not criterion.needs_outputs}
    assert set(scores_of(spool_of(tmp_path / "a", replace(recorded(), outputs=None)))) == of_router
    unknown = recorded()
    assert unknown.outputs is not None
    unknown.outputs.change[1] = np.nan
    assert set(CRITERIA) - set(scores_of(spool_of(tmp_path / "b", unknown))) == {"easy-ep"}
    with pytest.raises(TraceError, match=r"^nothing was recorded; give text of the task$"):
        scores_of(Spool(tmp_path / "c"))


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """One piece is in memory at a time, however many there are."""
    piece = recorded(n_token=2000)
    peaks = []
    for n_pieces in (2, 12):
        spool = spool_of(tmp_path / str(n_pieces), *[piece] * n_pieces)
        scores_of(spool)
        tracemalloc.start()
        scores_of(spool)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_prompts_are_matched_and_answers_are_ranked_too(tmp_path: Path) -> None:
    """Shares of what was asked alone are stored beside scores of prompt and answer."""
    parts = [recorded(n_token=n, seed=n) for n in (4, 10, 30)]
    template, asked, answer = parts
    both = RoutedTokens.concatenate([template, asked, answer])
    spool = spool_of(tmp_path, both)
    found, whole = (shares_of(spool, [named("0", counted)]) for counted in (slice(4, 14), slice(0, 44)))
    assert found.tokens.tolist() == [10] and whole.tokens.tolist() == [32, 44]
    np.testing.assert_array_equal(found.shares[0], routed_shares(asked, slice(0, 10)).astype(np.float16))
    np.testing.assert_array_equal(whole.shares[1], routed_shares(both, slice(0, 44)).astype(np.float16))
    np.testing.assert_array_equal(scores_of(spool)["peu"], score([both], CRITERIA["peu"]).scores().astype(np.float32))


def test_beginnings_are_kept_beside_the_whole(tmp_path: Path) -> None:
    texts = [recorded(n_token=n, seed=n) for n in (200, 7, 32)]
    spool = spool_of(tmp_path, *texts)
    found = shares_of(spool, [named("0", slice(0, 200)), named("1", slice(0, 0)), named("2", slice(0, 32))])
    assert BEGINNINGS == (32, 128)
    assert found.tokens.tolist() == [32, 128, 200, 32]
    assert found.document.tolist() == [0, 0, 0, 2] and len(found) == 2, "a piece that does not count is none"
    for row, (text, n_token) in enumerate(zip((0, 0, 0, 2), found.tokens.tolist(), strict=True)):
        expected = routed_shares(texts[text], slice(0, n_token))
        np.testing.assert_array_equal(found.shares[row], expected.astype(np.float16))


def test_a_question_is_stored_as_the_same_question_is_heard_in_a_chat(folder: Path, tmp_path: Path) -> None:
    """With the chat template on both sides, and its words counted on neither."""
    question = "How many pears are left of twelve?"
    document = Document("a", question, (Message("user", question),), "Seven.")
    with opened(folder) as llama:
        piece = one(llama, document)
        stored = shares_of(spool_of(tmp_path / "spool", record(llama, piece)), [piece])
        model = fingerprint(llama.index)
    store = PatternStore(model, tmp_path / "tasks")
    store.save(tiny_pattern("pears", model, scores={"peu": np.ones((3, 16), np.float32)}, measured=False))
    said: list[RoutedShares] = []
    with opened(folder, logits_all=False, experts="auto", tasks=store.folder) as llama:
        assert llama.task_mode is not None
        consider = llama.task_mode.consider
        with mock.patch.object(llama.task_mode, "consider", lambda heard: said.append(heard) or consider(heard)):
            ChatSession(llama, Sampling(1, 0.0, 1)).ask(question).drain()
    assert [heard.layers for heard in said] == [(0,), (0, 1)]
    for heard in said:
        assert heard.n_token == stored.tokens[-1] == piece.counted.stop - piece.counted.start > 20
        expected = stored.shares[-1, : len(heard.layers)].astype(np.float32)
        np.testing.assert_allclose(heard.shares(), expected, atol=1e-3)
