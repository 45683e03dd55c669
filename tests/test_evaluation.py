"""Windows of held-out text, means over tasks, and what is kept of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny_model
from tiny_patterns import tiny_pattern

from edgemoe.arms import ALL_TASKS, FULL, NEAREST, OWN, RANDOM, Arm
from edgemoe.backend import Llama
from edgemoe.documents import Document, Message
from edgemoe.errors import DocumentError
from edgemoe.evaluation import (
    Result,
    begin_of_text,
    cut_windows,
    distinct_sets,
    evaluate_task,
    held_out_tokens,
    summarise,
    with_quality,
)
from edgemoe.expert_set import ExpertLayers, ExpertSet, everything
from edgemoe.perplexity import Figures, measure
from edgemoe.quality import safe_point


def some(kept: int, first: int = 0, n_expert: int = 8) -> ExpertSet:
    return ExpertSet((1, 2, 3), n_expert, 2, (tuple(range(first, first + kept)),) * 3)


def figures(*losses: float, tokens: float = 10.0) -> Figures:
    ones = np.ones(len(losses))
    return Figures(ones * tokens, (np.array(losses) + 2) * tokens, ones * 2 * tokens, ones * tokens, ones * tokens / 2)


OWN_4 = Arm(OWN, "maths", "uniform", "peu", 4, (some(4),))


@given(st.integers(2, 400), st.integers(1, 12), st.integers(1, 64))
def test_windows_are_whole_evenly_spaced_and_followed_by_a_target(n_tokens: int, n_windows: int, window: int) -> None:
    found = cut_windows(range(n_tokens), n_windows, window)
    whole = max(1, (n_tokens - 1) // window)
    assert len(found) == min(n_windows, whole)
    starts = [text[0] for text in found]
    for text, start in zip(found, starts, strict=True):
        assert text == tuple(range(start, start + min(window + 1, n_tokens)))
        assert start % window == 0
    assert starts[0] == 0 and (len(found) == 1 or starts[-1] == (whole - 1) * window)
    assert len(set(starts)) == len(starts)


def test_windows_begin_as_the_model_was_trained() -> None:
    assert cut_windows(range(9), 2, 4, bos=99) == [(99, 1, 2, 3, 4), (99, 5, 6, 7, 8)]


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_text_without_anything_to_predict(n_tokens: int) -> None:
    with pytest.raises(DocumentError, match=f"has {n_tokens} tokens"):
        cut_windows(range(n_tokens), 8, 512)


def test_documents_end_with_the_end_of_text_and_conversations_go_through_the_template(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, "qwen3moe")
    talk = Document("b", "2 + 2?\n\n4", (Message("user", "2 + 2?"),), "4")
    with Llama(str(path), ram="1GiB", n_ctx=64, n_threads=1) as llama:
        assert begin_of_text(llama) is None  # the model's header says that none is added
        with mock.patch.object(llama, "tokenize", return_value=[llama.token_bos()]):
            assert begin_of_text(llama) == 256
        plain = llama.tokenize(b"one", add_bos=False)
        tokens = held_out_tokens(llama, [Document("a", "one"), talk])
        assert tokens[: len(plain) + 1] == [*plain, llama.token_eos()]
        said = llama.detokenize(tokens[len(plain) + 1 :], special=True).decode()
        assert said == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|endoftext|>"


def test_sets_in_common_are_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, "qwen3moe")
    with Llama(str(path), ram="1GiB", n_ctx=64, n_threads=1, logits_all=True) as llama:
        layers = ExpertLayers.of(llama.index)

        def half(first: int) -> ExpertSet:
            return ExpertSet(layers.numbers, layers.n_expert, 4, (tuple(range(first, first + 4)),) * 3)

        arms = [
            Arm(FULL, "", "", "", layers.n_expert, (everything(layers),)),
            Arm(OWN, "a", "uniform", "peu", 4, (half(0),)),
            Arm(NEAREST, "b", "uniform", "peu", 4, (half(0),)),
            Arm(RANDOM, "", "uniform", RANDOM, 4, (half(0), half(2))),
        ]
        assert distinct_sets(arms) == [everything(layers), half(0), half(2)]
        text = [tuple(range(20, 40)), tuple(range(50, 70))]
        evaluations: list[None] = []
        full, own, nearest, random = evaluate_task(llama, "a", text, arms, lambda: evaluations.append(None))
        assert len(evaluations) == 2 * (1 + 3)
        assert full.figures.loss == full.figures.kl == 0
        assert own.figures is nearest.figures
        zero, two = measure(llama, text, [half(0), half(2)])
        assert own.figures.loss == zero.loss
        assert random.figures.loss == pytest.approx((zero.loss + two.loss) / 2)
        assert len(random.figures.tokens) == 2


def test_every_task_counts_the_same_and_the_worst_is_named() -> None:
    results = [Result("maths", OWN_4, figures(0.1, 0.3, tokens=50)), Result("law", OWN_4, figures(0.5, 0.7))]
    (summary,) = summarise(results)
    assert summary.loss == pytest.approx(0.4)
    assert summary.perplexity_change == pytest.approx(math.exp(0.4) - 1)
    assert (summary.worst_task, summary.worst_loss) == ("law", pytest.approx(0.6))
    assert summary.standard_error == pytest.approx(math.sqrt(2) * 0.1 / 2)
    assert (summary.kl, summary.top1_agreement, summary.mean_kept) == (1.0, 0.5, 4.0)
    (single,) = summarise([results[0], Result("law", OWN_4, figures(0.5))])
    assert single.standard_error is None


def test_arms_are_told_apart_and_keep_their_order() -> None:
    others = [Arm(OWN, "maths", "mass", "peu", 4, (some(4),)), Arm(OWN, "maths", "uniform", "peu", 2, (some(2),))]
    results = [Result(task, arm, figures(0.1)) for task in ("a", "b") for arm in (OWN_4, *others)]
    assert [summary.arm for summary in summarise(results)] == [OWN_4, *others]


def test_quality_is_written_into_the_pattern_in_place_of_older_figures() -> None:
    pattern = tiny_pattern("maths")  # holds a row of 2/4, uniform, peu
    arms = [
        Arm(FULL, "", "", "", 8, (some(8),)),
        OWN_4,
        Arm(NEAREST, "law", "uniform", "peu", 4, (some(4, 2),)),
        Arm(ALL_TASKS, "", "uniform", "peu", 4, (some(4, 3),)),
        Arm(RANDOM, "", "uniform", RANDOM, 4, (some(4, 1), some(4, 4))),
    ]
    results = [Result("maths", arm, figures(0.1, 0.3, tokens=10 * len(arm.sets))) for arm in arms]
    quality = with_quality(pattern, results, "Q8_0").quality
    assert [(row.expert_set, row.criterion, row.seeds) for row in quality] == [
        ("full", "", 1),
        ("2/4", "peu", 1),
        ("2/4 of law, nearest task", "peu", 1),
        ("2/4 of all tasks", "peu", 1),
        ("2/4", "random", 2),
    ]
    assert {row.text for row in quality} == {"held-out text of maths, 20 tokens, Q8_0"}
    own = quality[1]
    assert own.perplexity_change == pytest.approx(math.expm1(0.2))
    assert (own.kl, own.top1_agreement, own.mean_kept) == (1.0, 0.5, 4.0)
    smaller = Arm(OWN, "maths", "uniform", "peu", 3, (some(3),))
    again = with_quality(with_quality(pattern, results, "Q8_0"), [Result("maths", smaller, figures(0.5))], "Q8_0")
    assert len(again.quality) == 6  # other sizes stay


def test_a_task_s_set_on_another_task_s_text_is_kept_with_the_task_too() -> None:
    law = tiny_pattern("law")
    arms = [OWN_4, Arm(NEAREST, "law", "uniform", "peu", 4, (some(4, 2),))]
    quality = with_quality(law, [Result("maths", arm, figures(0.1, 0.3)) for arm in arms], "Q8_0").quality
    (abroad,) = (row for row in quality if row not in law.quality)
    assert (abroad.expert_set, abroad.text) == ("2/4 on text of maths", "held-out text of maths, 20 tokens, Q8_0")
    assert safe_point(replace(law, quality=(abroad,))) is None, "it says nothing of the task's own text"
