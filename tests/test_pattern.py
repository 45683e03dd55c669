from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_patterns import ROW, random_documents, random_scores, tiny_model, tiny_pattern

from edgemoe.errors import PatternError, PatternMismatchError
from edgemoe.evidence import MAX_DOCUMENTS, DocumentShares, Source, check_task_name
from edgemoe.loss_curves import LossCurves
from edgemoe.pattern import Pattern, merge, renumbered

# Few distinct values, so that ties are common.
SCORES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 20)),
    elements=st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1.0, 3e38]) | st.floats(-1e9, 1e9, width=32),
)


def of(scores: npt.NDArray[np.float32]) -> Pattern:
    return tiny_pattern(model=tiny_model(*scores.shape), scores={"peu": scores}, measured=False)


@given(SCORES)
def test_the_compact_pattern_is_the_direct_ranking(scores: npt.NDArray[np.float32]) -> None:
    n_expert = scores.shape[1]
    direct = [sorted(range(n_expert), key=lambda i, row=row: (-row[i], i)) for row in scores]  # type: ignore[misc]
    pattern = of(scores)
    assert pattern.rankings.tolist() == direct
    assert (np.sort(pattern.permutations, axis=1) == np.arange(n_expert)).all()


def test_the_table_of_deepseek_r1_is_small() -> None:
    scores = random_scores(tiny_model(58, 256))
    pattern = of(scores)
    assert pattern.permutations.shape == (57, 256) and pattern.permutations.dtype == np.uint8
    assert pattern.permutations.nbytes < 15_000
    assert pattern.vector.dtype == np.float32
    assert (np.sort(pattern.permutations, axis=1) == np.arange(256)).all()
    # The whole ranking, and with it the top M for every M.
    assert (pattern.rankings == np.argsort(-scores, axis=1, kind="stable")).all()


def test_more_than_256_experts_need_wider_ids() -> None:
    pattern = of(random_scores(tiny_model(2, 300)))
    assert pattern.permutations.dtype == np.uint16
    assert sorted(pattern.rankings[1].tolist()) == list(range(300))


def test_layers_are_the_models_own_numbers() -> None:
    pattern = tiny_pattern()
    assert pattern.layers == (1, 2, 3)


def test_another_model_is_refused_and_another_quantization_noted() -> None:
    pattern = tiny_pattern()
    assert pattern.note_for(tiny_model()) is None
    assert "profiled with Q_b and serves Q_c" in (pattern.note_for(tiny_model(quantization="c")) or "")
    for model in (tiny_model(router="d"), tiny_model(n_expert=16), tiny_model(n_layers=2)):
        with pytest.raises(PatternMismatchError, match="task 'maths' was profiled with tiny a"):
            pattern.note_for(model)


def test_merging_weighs_by_tokens() -> None:
    model = tiny_model()
    one, two = (tiny_pattern(task, model, n_tokens=n, seed=n) for task, n in (("maths", 300), ("law", 100)))
    both = merge([one, two], "both")
    for name in ("peu", "frequency"):
        np.testing.assert_allclose(both.scores[name], 0.75 * one.scores[name] + 0.25 * two.scores[name], atol=1e-6)
    direct = np.argsort(-both.scores["peu"], axis=1, kind="stable")
    assert (both.rankings == direct).all()
    assert both.sources == one.sources + two.sources
    assert (both.n_tokens, both.n_documents, len(both.documents)) == (400, 4, 4)
    assert (both.documents.shares[4:] == two.documents.shares).all()
    assert both.documents.document.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert both.sensitivity is None and both.quality == ()


def test_merging_is_associative() -> None:
    parts = [tiny_pattern(task, n_tokens=n, seed=n) for task, n in (("a", 100), ("b", 220), ("c", 330))]
    left = merge([merge(parts[:2], "x"), parts[2]], "every")
    assert left.sources == merge(parts, "every").sources
    np.testing.assert_allclose(left.scores["peu"], merge(parts, "every").scores["peu"], rtol=1e-5, atol=1e-6)


def test_no_text_counts_twice() -> None:
    one = tiny_pattern("one", tiny_model())
    with pytest.raises(PatternError, match=r"^task one is given 2 times, each counting its text again; name it once$"):
        merge([one, one], "both")


@pytest.mark.parametrize("name", ["all", "auto"])
def test_words_of_the_conversation_are_no_task_names(name: str) -> None:
    with pytest.raises(PatternError, match=rf"^{name} cannot be a task's name, .* use {name}-tasks$"):
        check_task_name(name)
    check_task_name(f"{name}-tasks")


def test_what_cannot_be_merged() -> None:
    model = tiny_model()
    peu = tiny_pattern("maths", model)
    reap = tiny_pattern("law", model, scores={"reap": random_scores(model), "frequency": random_scores(model)})
    with pytest.raises(PatternError, match="nothing to merge into task 'both'"):
        merge([], "both")
    with pytest.raises(PatternError, match="ranked by peu and task 'law' by reap"):
        merge([peu, reap], "both")
    with pytest.raises(PatternMismatchError):
        merge([peu, tiny_pattern("law", tiny_model(router="d"))], "both")
    only_peu = tiny_pattern("code", model, scores={"peu": random_scores(model)})
    assert merge([peu, only_peu], "both").scores.keys() == {"peu"}


def test_of_many_documents_an_even_sample_is_kept() -> None:
    pattern = tiny_pattern(n_documents=3 * MAX_DOCUMENTS, n_tokens=10**6)
    everything = random_documents(tiny_model(), 3 * MAX_DOCUMENTS)
    kept = pattern.documents
    assert len(kept) == MAX_DOCUMENTS and pattern.n_documents == 3 * MAX_DOCUMENTS
    assert kept.tokens[0] == everything.tokens[0] and (kept.shares[-1] == everything.shares[-1]).all()


@pytest.mark.parametrize("name", ["maths", "a", "0", "qwen3_coder-480b", "x" * 64])
def test_task_names(name: str) -> None:
    check_task_name(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Maths", "; use maths"),
        ("my task", "; use my-task"),
        ("../../etc/passwd", "; use etc-passwd"),
        ("maths\n", "; use maths"),
        ("maths.pattern", "; use maths-pattern"),
        ("x" * 65, "; use " + "x" * 64),
        ("", "; use a name like maths"),
        ("-v", "; use v"),
        ("\x1b[2J", "; use 2j"),
        ("Übung", "; use bung"),
    ],
)
def test_names_that_are_no_file_names_everywhere(name: str, near: str) -> None:
    with pytest.raises(PatternError) as caught:
        check_task_name(name)
    assert str(caught.value).endswith(near) and str(caught.value).isprintable()


def change(array: npt.NDArray[Any], value: float) -> npt.NDArray[Any]:
    changed = array.copy()
    changed.flat[0] = value
    return changed


def documents(pattern: Pattern, **changes: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> DocumentShares:
    return replace(pattern.documents, **{k: f(getattr(pattern.documents, k)) for k, f in changes.items()})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: replace(p, task="A"),
        lambda p: replace(p, criterion="reap"),
        lambda p: replace(p, scores={**p.scores, "\n": p.scores["peu"]}),
        lambda p: replace(p, scores={"peu": p.scores["peu"][:2]}),
        lambda p: replace(p, scores={"peu": p.scores["peu"].astype(np.float64)}),
        lambda p: replace(p, scores={"peu": change(p.scores["peu"], np.nan)}),
        lambda p: replace(p, scores={f"c{i}": p.scores["peu"] for i in range(100)}, criterion="c0"),
        lambda p: replace(p, vector=change(p.vector, np.inf)),
        lambda p: replace(p, vector=p.vector[1:]),
        lambda p: replace(p, permutations=p.permutations[:1]),
        lambda p: replace(p, permutations=p.permutations.astype(np.uint16)),
        lambda p: replace(p, permutations=change(p.permutations, p.permutations[0, 1])),
        lambda p: replace(p, permutations=change(p.permutations, 8)),
        lambda p: replace(p, sources=()),
        lambda p: replace(p, documents=random_documents(tiny_model(), MAX_DOCUMENTS + 1)),
        lambda p: replace(p, documents=random_documents(tiny_model(2), 2)),
        lambda p: documents(p, tokens=lambda a: a[:1]),
        lambda p: documents(p, tokens=lambda a: change(a, 0)),
        lambda p: documents(p, document=lambda a: change(a, -1)),
        lambda p: documents(p, document=lambda a: a[::-1]),
        lambda p: documents(p, shares=lambda a: change(a, 1.5)),
        lambda p: documents(p, shares=lambda a: change(a, np.nan)),
        lambda p: replace(p, documents=documents(p, shares=lambda a: a[:, :, :4])),
        lambda p: replace(p, sensitivity=LossCurves((2, 4, 8), p.sensitivity.loss[:2])),
        lambda p: replace(p, sensitivity=LossCurves((2, 4, 9), p.sensitivity.loss)),
        lambda p: replace(ROW, kl=float("inf")),
        lambda p: replace(ROW, text="\x1b[2J"),
        lambda p: replace(ROW, seeds=0),
        lambda p: replace(p, quality=(ROW,) * 5000),
        lambda p: Source("maths", "x", 1, 1, chat_template=True, answers=True),
        lambda p: Source("maths", "c" * 64, 5, 4, chat_template=True, answers=True),
    ],
)
def test_parts_that_do_not_fit_are_refused(spoil: Callable[[Pattern], object]) -> None:
    with pytest.raises(PatternError):
        spoil(tiny_pattern())


def test_renumbered_ranks_the_same_experts() -> None:
    model = tiny_model()
    pattern = tiny_pattern(model=model)
    order = np.array([np.random.default_rng(layer).permutation(8) for layer in range(3)])
    found = renumbered(pattern, order, replace(model, router="c" * 64))
    np.testing.assert_array_equal(np.take_along_axis(order, found.rankings.astype(int), 1), pattern.rankings)
    for name, scores in pattern.scores.items():
        np.testing.assert_array_equal(found.scores[name], np.take_along_axis(scores, order, 1))
    np.testing.assert_array_equal(found.documents.shares[1, 2], pattern.documents.shares[1, 2][order[2]])
    assert found.fingerprint.router == "c" * 64 and found.permutations.dtype == pattern.permutations.dtype
    back = renumbered(found, np.argsort(order, axis=1), model)
    np.testing.assert_array_equal(back.rankings, pattern.rankings)
    with pytest.raises(PatternError, match="every expert of every layer once"):
        renumbered(pattern, np.zeros((3, 8), np.int64), model)
