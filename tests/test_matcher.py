"""Which task a text is nearest to, and when it is none of them, on clusters that are known."""

import time

import numpy as np
import pytest

from edgemoe.errors import PatternError
from edgemoe.matcher import Match, TaskDocuments, TaskMatcher, next_task

L, N, K = 4, 16, 4
METRICS = ["whitened", "hellinger", "l2", "l2-normalised", "cosine"]


def task_routing(seed: int) -> np.ndarray:
    """How a task routes on average, [L, N]."""
    return np.random.default_rng(seed).dirichlet(np.full(N, 0.5), size=L)


def text(routing: np.ndarray, n_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Shares of a text of that length, [L, N]: texts of a task differ, and so do their tokens."""
    own = np.stack([rng.dirichlet(40 * row + 0.02) for row in routing])
    return np.stack([rng.multinomial(K * n_tokens, row) for row in own]) / (K * n_tokens)


def documents(seed: int, n_documents: int = 20, lengths: tuple[int, ...] = (32, 128, 512)) -> TaskDocuments:
    rng = np.random.default_rng(1000 + seed)
    shares = np.stack([text(task_routing(seed), n, rng) for _ in range(n_documents) for n in lengths])
    tokens = np.tile(np.array(lengths, np.int32), n_documents)
    return TaskDocuments(shares.astype(np.float16), tokens, np.repeat(np.arange(n_documents), len(lengths)))


def stored(*seeds: int, n_documents: int = 20) -> dict[str, TaskDocuments]:
    return {f"task{seed}": documents(seed, n_documents) for seed in seeds}


def matches(matcher: TaskMatcher, seed: int, n_tokens: int, count: int = 20) -> list[Match]:
    rng = np.random.default_rng(77)
    layers = list(matcher.layers)
    return [matcher.match(text(task_routing(seed), n_tokens, rng)[layers], n_tokens) for _ in range(count)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layers", [None, (0,), (0, 1, 2)])
def test_texts_find_their_task(metric, layers):
    matcher = TaskMatcher(stored(1, 2, 3), layers, metric)
    for seed in (1, 2, 3):
        found = [match.nearest for match in matches(matcher, seed, 256)]
        assert found.count(f"task{seed}") >= 19


@pytest.mark.parametrize("n_tokens", [32, 128, 512])
def test_texts_of_no_stored_task_are_rejected_and_others_are_not(n_tokens):
    matcher = TaskMatcher(stored(1, 2, 3, 4))
    known = [match.task for seed in (1, 2, 3, 4) for match in matches(matcher, seed, n_tokens)]
    unknown = [match.task for match in matches(matcher, 9, n_tokens)]
    assert known.count(None) <= 0.12 * len(known)
    assert unknown.count(None) >= 0.8 * len(unknown)


def test_a_text_between_two_tasks_is_of_neither():
    matcher = TaskMatcher(stored(1, 2, 3))
    rng = np.random.default_rng(4)
    half = (task_routing(1) + task_routing(2)) / 2
    assert sum(matcher.match(text(half, 512, rng), 512).task is None for _ in range(20)) >= 18


@pytest.mark.parametrize("metric", ["whitened", "hellinger"])
def test_a_task_of_one_kind_takes_less_than_one_of_many(metric):
    # Every document of task1 is alike, those of task2 lean to one of two sides.
    rng = np.random.default_rng(2)
    sides = [0.7 * task_routing(2) + 0.3 * task_routing(side) for side in (5, 6)]
    diverse = np.stack([text(sides[place % 2], 512, rng) for place in range(40)])
    alike = rng.multinomial(K * 512, task_routing(1), (40, L)) / (K * 512)
    tasks = {
        name: TaskDocuments(shares, np.full(40, 512), np.arange(40))
        for name, shares in (("task1", alike), ("task2", diverse))
    }
    matcher = TaskMatcher(tasks, metric=metric)
    strange = [0.85 * mean + 0.15 * task_routing(9) for mean in (alike.mean(0), diverse.mean(0))]
    assert [matcher.match(vector, 512).nearest for vector in strange] == ["task1", "task2"]
    assert [matcher.match(vector, 512).task for vector in strange] == [None, "task2"]


def test_a_short_text_is_not_held_to_the_distances_of_a_long_one():
    matcher = TaskMatcher(stored(1, 2, 3))
    one_length = TaskMatcher({f"task{seed}": documents(seed, 20, (512,)) for seed in (1, 2, 3)})
    by_length = sum(match.task is None for match in matches(matcher, 1, 16))
    by_one = sum(match.task is None for match in matches(one_length, 1, 16))
    assert by_length <= by_one


def test_l2_is_the_choice_of_the_paper():
    # Squared L2 to the mean vector of the first MoE layer, the nearest one wins.
    tasks = stored(1, 2, 3)
    matcher = TaskMatcher(tasks, (0,), "l2")
    for n_tokens in (8, 64):
        rng = np.random.default_rng(5)
        for seed in (1, 2, 3, 9):
            vector = text(task_routing(seed), n_tokens, rng)[:1]
            means = {name: task.shares[task.tokens == 512, 0].astype(float).mean(0) for name, task in tasks.items()}
            expected = {name: float(((vector[0] - mean) ** 2).sum()) for name, mean in means.items()}
            match = matcher.match(vector, n_tokens)
            assert match.nearest == min(expected, key=expected.__getitem__)
            assert dict(match.distances) == pytest.approx(expected, rel=1e-9)


def test_cosine_by_hand():
    one = TaskDocuments(np.array([[[1.0, 0.0]]]), np.array([9]), np.array([0]))
    both = TaskDocuments(np.array([[[0.5, 0.5]]]), np.array([9]), np.array([0]))
    match = TaskMatcher({"one": one, "both": both}, metric="cosine").match(np.array([[0.0, 1.0]]), 9)
    assert match.nearest == "both"
    assert match.distances["one"] == pytest.approx(1.0)
    assert match.distances["both"] == pytest.approx(1 - 2**-0.5)


def test_scale_of_shares_does_not_matter_by_default():
    tasks = stored(1, 2)
    times_four = {name: TaskDocuments(task.shares * 4, task.tokens, task.document) for name, task in tasks.items()}
    vector = text(task_routing(1), 64, np.random.default_rng(3))
    match, scaled = TaskMatcher(tasks).match(vector, 64), TaskMatcher(times_four).match(vector / 2, 64)
    assert scaled.oddness == pytest.approx(match.oddness, rel=1e-2)
    assert scaled.distance == pytest.approx(match.distance, rel=1e-2)


@pytest.mark.parametrize("metric", METRICS)
def test_the_farther_the_odder(metric):
    matcher = TaskMatcher(stored(1, 2, 3), metric=metric)
    start, strange = task_routing(1), np.zeros((L, N))
    strange[:, 3] = 1  # everything to one expert
    results = [matcher.match((1 - part) * start + part * strange, 128) for part in np.linspace(0, 1, 11)]
    rejected = [match.task is None for match in results]
    assert not rejected[0]
    assert rejected[-1]
    assert rejected == sorted(rejected)
    assert all((match.oddness > match.threshold) == (match.task is None) for match in results)


@pytest.mark.parametrize("metric", METRICS)
def test_the_order_of_tasks_changes_nothing(metric):
    tasks = stored(1, 2, 3, 4)
    turned = dict(reversed(tasks.items()))
    rng = np.random.default_rng(6)
    one, other, again = TaskMatcher(tasks, metric=metric), TaskMatcher(turned, metric=metric), TaskMatcher(tasks)
    for seed in (1, 2, 9):
        vector = text(task_routing(seed), 64, rng)
        assert one.match(vector, 64) == other.match(vector, 64)
        assert again.match(vector, 64) == TaskMatcher(tasks).match(vector, 64)


def test_a_tie_goes_to_the_first_name():
    same = documents(1)
    for names in (("b", "a"), ("a", "b")):
        match = TaskMatcher(dict.fromkeys(names, same)).match(task_routing(1), 64)
        assert (match.nearest, match.runner_up) == ("a", "b")
        assert match.distance == match.runner_up_distance


def test_a_single_task_has_only_rejection_to_decide():
    matcher = TaskMatcher(stored(1))
    own, foreign = matches(matcher, 1, 128), matches(matcher, 9, 128)
    assert sum(match.task is None for match in own) <= 3
    assert sum(match.task is None for match in foreign) >= 18
    assert own[0].runner_up is None and own[0].runner_up_distance is None
    assert "then" not in own[0].reason


@pytest.mark.parametrize("n_documents", [1, 2, 3, 5])
@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_few_documents_work(n_documents, n_tasks):
    matcher = TaskMatcher(stored(*range(1, n_tasks + 1), n_documents=n_documents))
    own = matches(matcher, 1, 512)
    assert [match.nearest for match in own].count("task1") >= 19
    assert sum(match.task is None for match in own) <= 8
    if n_documents == 1:
        assert own[0].threshold == np.inf
        assert "never rejected" in own[0].reason


def test_one_document_more_than_the_others_have():
    tasks = stored(1, 2, n_documents=1) | {"task3": documents(3, 12)}
    assert [match.nearest for match in matches(TaskMatcher(tasks), 1, 512)].count("task1") >= 19


def test_documents_that_are_all_equal():
    shares = np.broadcast_to(task_routing(1), (8, L, N))
    same = TaskDocuments(shares, np.full(8, 64), np.arange(8))
    match = TaskMatcher({"same": same, "other": documents(2)}).match(task_routing(1), 64)
    assert match.task == "same"


def test_the_match_says_why():
    matcher = TaskMatcher(stored(1, 2))
    taken, refused = matches(matcher, 1, 128, 1)[0], matcher.match(np.eye(L, N), 128)
    assert taken.reason.startswith("task1: distance") and "then task2" in taken.reason and "limit" in taken.reason
    assert refused.reason.startswith("no task: nearest is") and "rejected" in refused.reason
    assert "\n" not in taken.reason + refused.reason


@pytest.mark.parametrize(
    ("vector", "n_tokens", "words"),
    [
        (np.ones(N), 9, "shape"),
        (np.ones((L, N + 1)), 9, "shape"),
        (np.ones((L - 1, N)), 9, "shape"),
        (np.ones((L, N)), 0, "0 tokens"),
        (np.full((L, N), np.nan), 9, "no numbers"),
        (np.full((L, N), -1.0), 9, "negative"),
    ],
)
def test_what_is_no_vector_is_refused(vector, n_tokens, words):
    with pytest.raises(PatternError, match=words):
        TaskMatcher(stored(1, 2, n_documents=3)).match(vector, n_tokens)


def test_what_cannot_be_stored_is_refused():
    good = documents(1, 3)
    none = TaskDocuments(good.shares[:0], good.tokens[:0], good.document[:0])
    for tasks, words in [
        ({}, "no stored task"),
        ({"a": good, "b": none}, "no documents"),
        ({"a": good, "b": TaskDocuments(good.shares[:, :2], good.tokens, good.document)}, "shape"),
        ({"a": TaskDocuments(good.shares[0], good.tokens, good.document)}, "shape"),
        ({"a": TaskDocuments(good.shares, good.tokens * 0, good.document)}, "token count"),
        ({"a": TaskDocuments(good.shares, good.tokens, good.document[:2])}, "token count"),
        ({"a": TaskDocuments(good.shares * np.nan, good.tokens, good.document)}, "no numbers"),
    ]:
        with pytest.raises(PatternError, match=words):
            TaskMatcher(tasks)
    with pytest.raises(PatternError, match="layers"):
        TaskMatcher({"a": good}, (L,))
    with pytest.raises(PatternError, match="layers"):
        TaskMatcher({"a": good}, ())
    with pytest.raises(PatternError, match="metric"):
        TaskMatcher({"a": good}, metric="manhattan")


def a_match(task: str | None, near: float, far: float, short: bool = False) -> Match:
    return Match(task, "new", near, "old", far, 0.0, 1.0, 64, short, {"new": near, "old": far})


@pytest.mark.parametrize(
    ("active", "match", "after"),
    [
        (None, a_match("new", 1.0, 2.0), "new"),
        (None, a_match(None, 1.0, 2.0), None),
        ("old", a_match("new", 1.0, 2.0), "new"),
        ("old", a_match("new", 1.9, 2.0), "old"),  # not nearer by the margin
        ("new", a_match("new", 1.9, 2.0), "new"),
        ("old", a_match(None, 1.0, 2.0), None),
        ("old", a_match(None, 1.0, 2.0, short=True), None),  # wherever it belongs, it is not here
        ("old", a_match(None, 1.9, 2.0, short=True), "old"),  # nothing is known of texts that short
        ("gone", a_match("new", 1.9, 2.0), "new"),
        ("gone", a_match(None, 1.0, 2.0, short=True), None),
    ],
)
def test_hysteresis(active, match, after):
    assert next_task(active, match) == after


def test_a_conversation_from_one_task_to_another_changes_over():
    matcher = TaskMatcher(stored(1, 2, 3))
    active, seen = None, []
    for seed in (1, 1, 1, 2, 2):
        active = next_task(active, matches(matcher, seed, 128, 1)[0])
        seen.append(active)
    assert seen == ["task1", "task1", "task1", "task2", "task2"]


def test_real_sizes_take_little_time():
    rng = np.random.default_rng(8)
    shares = {f"task{i}": rng.dirichlet(np.full(128, 0.1 + i / 20), size=(40, 48)) for i in range(12)}
    tasks = {name: TaskDocuments(s, np.full(40, 512), np.arange(40)) for name, s in shares.items()}
    started = time.perf_counter()
    matcher = TaskMatcher(tasks)
    fitted = time.perf_counter()
    matcher.match(shares["task3"][0], 512)
    assert fitted - started < 20  # about a second on a quiet machine
    assert time.perf_counter() - fitted < 1
