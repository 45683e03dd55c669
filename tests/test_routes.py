"""Routes: read strictly, stretched and shaped without inventing anything, drawn from seeds, predicted with a recall."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import TraceError
from edgemoe.routes import (
    Routes,
    fitted_routes,
    predictions,
    read_routes,
    task_switch_routes,
    uniform_routes,
)

TRACES = Path(__file__).resolve().parent.parent / "benchmarks" / "routes"
HEAD = "# route_trace v1\n# model=m.gguf arch=a n_layer=2 n_expert=4 n_expert_used=2\n# layer=0 expert_bytes=1\n"
COLUMNS = "turn,phase,step,layer,slot,expert,weight\n"


def rows(routes: Routes) -> str:
    """A trace's lines, in which prompt tokens but the last lack the last layer."""
    lines = []
    for phase, tokens in ((0, routes.prompt), (1, routes.decode)):
        for step, token in enumerate(tokens):
            for layer, ids in enumerate(token):
                if phase == 1 or step == len(tokens) - 1 or layer < max(routes.n_layer - 1, 1):
                    lines += [f"0,{phase},{step},{layer},{slot},{expert},0.5\n" for slot, expert in enumerate(ids)]
    return "".join(lines)


@st.composite
def small_routes(draw: st.DrawFn) -> Routes:
    n_expert = draw(st.integers(1, 9))
    n_used = draw(st.integers(1, n_expert))
    sizes = st.integers(1, 4)
    drawn = uniform_routes(
        draw(sizes), n_expert, n_used, draw(st.integers(0, 4)), draw(sizes), draw(st.integers(0, 1000))
    )
    return drawn


@given(small_routes(), st.randoms(use_true_random=False))
def test_a_trace_is_read_whatever_the_order_of_its_rows(tmp_path_factory, routes, random):
    head = f"# route_trace v1\n# n_layer={routes.n_layer} n_expert={routes.n_expert} n_expert_used={routes.n_used} x\n"
    lines = rows(routes).splitlines(keepends=True)
    random.shuffle(lines)
    path = tmp_path_factory.mktemp("trace") / "drawn.route.csv.gz"
    path.write_bytes(gzip.compress((head + COLUMNS + "".join(lines)).encode()))
    found = read_routes(path)
    assert (found.name, found.n_expert) == ("drawn", routes.n_expert)
    np.testing.assert_array_equal(found.decode, routes.decode)
    np.testing.assert_array_equal(found.prompt[:, :-1], routes.prompt[:, :-1])
    if routes.n_layer > 1:
        assert np.all(found.prompt[:, -1] == routes.prompt[-1:, -1])
    else:
        np.testing.assert_array_equal(found.prompt, routes.prompt)


@pytest.mark.parametrize(
    ("name", "prompt", "decode"),
    [("qwen", (28, 48, 6), (128, 48, 6)), ("gemma", (29, 30, 6), (128, 30, 6)), ("gptoss", (85, 36, 2), (64, 36, 2))],
)
def test_the_traces_that_are_kept(name, prompt, decode):
    found = read_routes(TRACES / f"{name}.route.csv.gz")
    assert (found.n_expert, found.prompt.shape, found.decode.shape) == (128, prompt, decode)


GOOD = HEAD + COLUMNS + "0,1,0,0,0,3,1\n0,1,0,0,1,1,1\n0,1,0,1,0,0,1\n0,1,0,1,1,2,1\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not start with"),
        (GOOD.replace("v1", "v2"), "does not start with"),
        (HEAD.splitlines(keepends=True)[0], "second line"),
        (GOOD.replace("n_expert=4", "n_expert=x"), "second line"),
        (GOOD.replace("n_expert=4", "n_expert=1"), "make no sense"),
        (GOOD.replace("n_layer=2", "n_layer=0"), "make no sense"),
        (GOOD.replace("step,layer", "layer,step"), "columns"),
        (HEAD + COLUMNS, "no tokens"),
        (GOOD.replace("0,1,0,0,0,3,1\n", ""), "fewer than 2 experts"),
        (GOOD.replace("0,1,0,1,0,0,1\n0,1,0,1,1,2,1\n", ""), "lacks experts"),
        (GOOD + "0,0,0,0,0,3,1\n0,0,0,0,1,1,1\n", "last prompt token"),
        (GOOD + "0,1,0,0,0,3,1\n", "twice"),
        (GOOD + "0,2,0,0,0,3,1\n", "neither 0 nor 1"),
        (GOOD + "0,1,1,0\n", "4 of 6 columns"),
        (GOOD.replace(",3,1", ",4,1"), "not among the 4"),
        (GOOD.replace(",3,1", ",1,1"), "twice for one token"),
        (GOOD.replace(",3,1", ",-1,1"), "outside"),
        (GOOD.replace("0,1,0,1,", "0,1,0,2,"), "outside"),
        (GOOD.replace(",3,1", ",3.5,1"), "invalid literal"),
        (GOOD.replace(",3,1", "," + "9" * 30 + ",1"), "large"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(tmp_path, text, why):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=rf"^{path} is no sound routing trace: .*{why}.*; record it again$"):
        read_routes(path)


def test_files_that_cannot_be_read(tmp_path):
    for name, data in (
        ("cut.csv.gz", gzip.compress(b"x" * 999)[:-9]),
        ("no.csv.gz", b"text"),
        ("bin.csv", b"\xff\xfe"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TraceError, match="cannot be read as a routing trace"):
            read_routes(tmp_path / name)
    with pytest.raises(TraceError, match="cannot be read as a routing trace"):
        read_routes(tmp_path / "missing.csv")


@given(st.binary(max_size=200))
def test_no_other_error_leaves_the_reader(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("trace") / "any.csv"
    path.write_bytes(GOOD.encode()[: len(data)] + data + GOOD.encode()[len(data) :])
    try:
        read_routes(path)
    except TraceError as error:
        assert str(path) in str(error)


def test_stretching_goes_on_with_the_other_passage():
    prompt, decode = (np.array(ids, np.int32).reshape(-1, 1, 1) for ids in ([0, 1], [2, 3, 4]))
    long = Routes("r", 5, prompt, decode).stretched(5, 9)
    assert long.prompt.ravel().tolist() == [0, 1, 0, 1, 0]
    assert long.decode.ravel().tolist() == [2, 3, 4, 0, 1, 2, 3, 4, 0]
    short = Routes("r", 5, prompt[:0], decode).stretched(2, 1)
    assert (short.prompt.ravel().tolist(), short.decode.ravel().tolist()) == ([2, 3], [2])
    with pytest.raises(TraceError, match="no tokens to repeat"):
        Routes("r", 5, prompt[:0], decode[:0]).stretched(1, 1)


def test_shapes_of_other_models():
    routes = uniform_routes(6, 8, 2, 3, 4, seed=1)
    fewer = routes.shaped(3, 16)
    np.testing.assert_array_equal(fewer.decode, routes.decode[:, [0, 2, 4]])
    assert fewer.n_expert == 16
    np.testing.assert_array_equal(routes.shaped(12, 8).prompt, routes.prompt[:, np.arange(12) // 2])
    with pytest.raises(TraceError, match="use experts up to 7, the model has 7"):
        routes.shaped(6, 7)


def test_routes_that_contradict_themselves():
    ids = np.zeros((1, 1, 1), np.int32)
    for prompt, decode in ((ids, ids[0]), (ids, ids.astype(np.int64)), (ids, np.zeros((1, 2, 1), np.int32))):
        with pytest.raises(TraceError, match="expected int32 arrays"):
            Routes("r", 1, prompt, decode)


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: fitted_routes("gemma", 3, 16, 4, 5, 40, seed),
        lambda seed: uniform_routes(3, 16, 4, 5, 40, seed),
        lambda seed: task_switch_routes("qwen", 3, 16, 4, 5, 40, seed, every=15),
    ],
)
def test_drawn_routes_come_from_their_seed(draw):
    one, again, other = draw(1), draw(1), draw(2)
    assert (one.prompt.shape, one.decode.shape) == ((5, 3, 4), (40, 3, 4))
    np.testing.assert_array_equal(one.decode, again.decode)
    assert np.any(one.decode != other.decode)


def test_what_cannot_be_drawn():
    with pytest.raises(TraceError, match="no generator is fitted to 'llama'; choose one of qwen, gemma, gptoss"):
        fitted_routes("llama", 2, 8, 2, 1, 1, 0)
    with pytest.raises(TraceError, match="with 9 of 8 experts"):
        uniform_routes(2, 8, 9, 1, 1, 0)
    with pytest.raises(TraceError, match="every 0 tokens"):
        task_switch_routes("qwen", 2, 8, 2, 1, 1, 0, every=0)


def test_uniform_routes_use_all_experts_alike_and_remember_nothing():
    routes = uniform_routes(2, 32, 4, 0, 2000, seed=3)
    counts = np.bincount(routes.decode.ravel(), minlength=32)
    assert counts.sum() / 32 == 500 and np.all(np.abs(counts - 500) < 5 * 500**0.5)
    again = (routes.decode[1:, :, :, None] == routes.decode[:-1, :, None]).any(3)
    assert again.mean() == pytest.approx(4 / 32, abs=0.01)


def test_a_switched_task_uses_other_experts():
    decode = task_switch_routes("qwen", 8, 128, 6, 10, 400, seed=0).decode

    def hot(rows):
        return [set(np.argsort(-np.bincount(rows[:, layer].ravel(), minlength=128))[:12]) for layer in range(1, 8)]

    first, second, third = (hot(decode[start : start + 100]) for start in (0, 100, 200))
    shared = [np.mean([len(a & b) for a, b in zip(first, others, strict=True)]) for others in (second, third)]
    assert shared[0] > 2 * shared[1]


@pytest.mark.parametrize("recalls", [(0.0,), (0.3, 0.3), (0.59, 0.5, 0.2), (0.8, 0.76), (1.0, 0.9)])
def test_predictions_have_their_recall_which_falls_with_rank(recalls):
    rows = uniform_routes(10, 40, 8, 0, 1000, seed=4).decode
    told = predictions(rows, 40, recalls, seed=5)
    assert (told.dtype, told.shape) == (rows.dtype, (len(recalls), *rows.shape))
    for found, recall in zip(told, recalls, strict=True):
        check_recall(rows, found, recall)


def check_recall(rows, found, recall):
    kept = found == rows
    assert kept.mean() == pytest.approx(recall, abs=0.01)
    by_rank = kept.mean((0, 1))
    assert np.all(np.diff(by_rank) <= 0.02)
    if 0 < recall < 1:
        assert by_rank[0] - by_rank[-1] == pytest.approx(1.6 * min(recall, 1 - recall), abs=0.03)
    # What is not kept is wrong, not another of the true ones, and nothing is there twice.
    assert not (found[..., None] == rows[..., None, :]).any(3)[~kept].any()
    assert np.all(np.diff(np.sort(found, axis=2), axis=2) > 0)
    assert np.all((found >= 0) & (found < 40))


def test_predictions_from_farther_are_right_where_the_later_ones_are_and_repeat_half_of_the_others():
    rows = uniform_routes(10, 128, 6, 0, 1000, seed=4).decode
    near, far = predictions(rows, 128, (0.8, 0.7), seed=5)
    assert not ((far == rows) & (near != rows)).any()
    wrong = near != rows
    assert (far == near)[wrong].mean() == pytest.approx(0.5, abs=0.02)


def test_half_of_the_wrong_predictions_were_used_a_moment_ago():
    rows = uniform_routes(6, 128, 6, 0, 1000, seed=4).decode
    found = predictions(rows, 128, (0.5,), seed=5)[0]
    recent = np.zeros(found.shape, bool)
    for back in range(1, 5):
        recent[back:] |= (found[back:, :, :, None] == rows[:-back, :, None, :]).any(3)
    assert recent[4:][(found != rows)[4:]].mean() == pytest.approx(0.5, abs=0.01)


def test_predictions_that_cannot_be_emulated():
    rows = uniform_routes(1, 4, 2, 0, 1, seed=0).decode
    for n_expert, recalls in ((4, (-0.1,)), (4, (1.1,)), (3, (0.5,)), (5, (0.5, 0.4)), (6, (0.5, 1.4))):
        with pytest.raises(TraceError, match="cannot be emulated"):
            predictions(rows, n_expert, recalls, 0)
    assert predictions(rows[..., :1], 4, (0.5,), 0).shape == (1, 1, 1, 1)
