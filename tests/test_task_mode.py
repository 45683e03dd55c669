"""Tasks of a model: what they may hold, and when they change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_llama import PLAN
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny_model
from tiny_patterns import random_documents, stored_patterns, tiny_model, tiny_pattern

from edgemoe.allocation import ExpertBudget, by_mass, mass_share, measured, uniform
from edgemoe.errors import BudgetError, PatternError
from edgemoe.evidence import QualityRow
from edgemoe.expert_set import ExpertLayers, ExpertSet, everything
from edgemoe.index import read_index
from edgemoe.keep import Keep
from edgemoe.loss_curves import LossCurves
from edgemoe.matcher import Match
from edgemoe.memory import Budget
from edgemoe.pattern import Pattern
from edgemoe.plan import ExpertPlan
from edgemoe.residency import Switch
from edgemoe.task_mode import FEWEST_TOKENS, WARM_SHARE, TaskMode, choose, open_tasks

MODEL = tiny_model()  # layers 1 to 3 of 8 experts, two per token
LAYERS = ExpertLayers(MODEL.layers, 8, (2,) * 3, (100,) * 3)
WHOLE = 3 * 8 * 100
PEU = np.abs(np.random.default_rng(4).standard_normal((3, 8), dtype=np.float32))


def pattern(task: str, *, curves: bool = False, scores: np.ndarray = PEU) -> Pattern:
    made = tiny_pattern(task, MODEL, scores={"peu": scores}, measured=False)
    loss = np.array([[0.9, 0.4, 0.0], [0.2, 0.1, 0.0], [0.3, 0.3, 0.0]])
    return replace(made, sensitivity=LossCurves((2, 4, 8), loss)) if curves else made


def plan(arena_bytes: int) -> ExpertPlan:
    return replace(
        PLAN,
        budget=Budget(1000 << 20, "ram=1000MiB"),
        arena_bytes=arena_bytes,
        resident_share=min(1.0, arena_bytes / WHOLE),
    )


def plan_within(n_bytes: int, arena: int) -> ExpertPlan:
    return replace(plan(arena + n_bytes - (1000 << 20)), budget=Budget(n_bytes, ""))


class Recorded:
    """A residency that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def restrict(self, chosen: ExpertSet) -> Switch:
        self.asked.append(chosen)
        return Switch(7, 0.1)

    def prefer(self, chosen: ExpertSet) -> Switch:
        self.asked.append(chosen)
        return Switch(7, 0.1)

    def allow_all(self) -> None:
        self.asked.append(None)


def opened(mode: str = "task", arena: int = 1400, keep: str | None = None, *patterns: Pattern) -> tuple[Any, Any]:
    """A mode with a plan, and what it asks of the residency."""
    residency: Any = Recorded()
    known = patterns or (pattern("maths"), pattern("law"))
    found = TaskMode(mode, known, LAYERS, (1, 2), None if keep is None else Keep.parse(keep))
    found.settle(plan(arena), lambda n_bytes: plan_within(n_bytes, arena))
    found.attach(residency)
    return found, residency.asked


# ---------------------------------------------------------------- what is chosen


def test_the_budget_goes_where_cutting_costs_least() -> None:
    budget = ExpertBudget(per_layer=4)
    plain, known = pattern("maths"), pattern("maths", curves=True)
    signed = pattern("maths", scores=PEU - np.float32(1))
    assert known.sensitivity is not None
    assert choose(known, LAYERS, budget) == measured(known.rank_scores, LAYERS, budget, known.sensitivity)
    assert choose(plain, LAYERS, budget) == by_mass(PEU, LAYERS, budget)
    assert choose(signed, LAYERS, budget) == uniform(signed.rank_scores, LAYERS, budget)
    assert len({choose(one, LAYERS, budget).sizes for one in (plain, known, signed)}) == 3


@pytest.mark.parametrize("arena", [600, 1400, 2300])
def test_a_task_takes_what_the_arena_holds(arena: int) -> None:
    mode, _ = opened("task", arena)
    assert mode.experts_of("maths").n_bytes(LAYERS.expert_bytes) == arena
    assert mode.experts_of("maths") == choose(pattern("maths"), LAYERS, ExpertBudget(n_bytes=arena))


def test_a_task_keeps_every_expert_where_all_fit() -> None:
    assert opened("task", WHOLE)[0].experts_of("maths") == everything(LAYERS)


def test_the_experts_asked_for_are_a_mean_over_layers() -> None:
    mode, _ = opened("task", 1400, "4")
    assert mode.k is None and mode.experts_of("law").n_kept == 3 * 4
    assert opened("task", 1400, "1/4")[0].k == 1


def test_more_experts_than_the_arena_holds_are_refused_at_once() -> None:
    with pytest.raises(
        BudgetError,
        match=r"^keep=5 takes 1\.46 KiB of experts, but ram=1000MiB leaves 1\.37 KiB; give ram=1001MiB, or keep",
    ) as refused:
        opened("task", 1400, "5")
    assert refused.value.needed == 1001 << 20
    assert opened("task", WHOLE, "8")[0].experts_of("law") == everything(LAYERS)


def test_an_arena_below_what_a_token_activates_is_refused_at_once() -> None:
    with pytest.raises(
        BudgetError,
        match=r"^experts=task holds at least 600 B of experts, as many as routing needs in all layers, but"
        r" ram=1000MiB leaves 500 B; give ram=1001MiB, or experts=auto$",
    ) as refused:
        opened("task", 500)
    assert refused.value.needed == 1001 << 20
    opened("task", 600)
    opened("auto", 500)


def test_so_few_experts_that_they_were_measured_to_be_unsafe_are_refused_at_once() -> None:
    """With the number, and the budget, that would do."""
    costs = {3: 0.9, 5: 0.2}
    rows = [QualityRow(f"2/{n}", "mass", "peu", n, 9.0, cost, 0.1, 0.9, "text", 1) for n, cost in costs.items()]
    measured_dear = replace(pattern("maths"), quality=tuple(rows))
    said = r"^2/4 .* are too few for task maths: fewer than 5 of 8 .* than 25% .* keep 5 with ram=1001MiB, or give"
    with pytest.raises(BudgetError, match=said) as refused:
        opened("task", 1400, "4", measured_dear, pattern("law"))
    assert refused.value.needed == 1001 << 20
    opened("task", 1500, "5", measured_dear, pattern("law"))
    opened("auto", 1400, None, measured_dear, pattern("law"))


@settings(deadline=None, max_examples=25)  # each fits matchers
@given(
    seed=st.integers(0, 50),
    sharp=st.sampled_from([0.2, 1.0, 6.0]),
    arena=st.integers(600, WHOLE) | st.just(WHOLE),
    curves=st.booleans(),
)
@example(seed=1, sharp=1.0, arena=WHOLE, curves=False)
def test_what_is_read_ahead_stays_within_the_arena_and_leaves_out_what_is_hardly_used(
    seed: int, sharp: float, arena: int, curves: bool
) -> None:
    mass = (np.random.default_rng(seed).random((3, 8)) ** sharp).astype(np.float32)
    mode, asked = opened("auto", arena, None, pattern("maths", scores=mass, curves=curves))
    mode.pin("maths")
    (warm,) = asked
    assert warm == mode.active_set
    most = max(600, min(arena, mass_share(mass, LAYERS, WARM_SHARE).n_bytes(LAYERS.expert_bytes)))
    assert warm.n_bytes(LAYERS.expert_bytes) <= most
    assert all(size >= k for size, k in zip(warm.sizes, LAYERS.floor, strict=True))


# ---------------------------------------------------------------- when it changes


def heard(n_token: int = 64, layers: tuple[int, ...] = (1,)) -> Any:
    return SimpleNamespace(n_token=n_token, layers=layers)


def match(task: str | None, distances: Mapping[str, float], short: bool = False) -> Match:
    first, second = sorted(distances, key=distances.__getitem__)[:2]
    return Match(task, first, distances[first], second, distances[second], 0.0, 1.0, 64, short, distances)


def say(mode: TaskMode, monkeypatch: pytest.MonkeyPatch, found: Match, n_token: int = 64) -> bool:
    monkeypatch.setattr(mode, "match_of", lambda _: found)
    return mode.consider(heard(n_token))


MATHS, LAW = match("maths", {"maths": 1.0, "law": 3.0}), match("law", {"maths": 3.0, "law": 1.0})
HARDLY_LAW, NONE = match("law", {"maths": 1.0, "law": 0.9}), match(None, {"maths": 3.0, "law": 5.0})


def test_a_conversation_changes_its_task_with_hysteresis(monkeypatch: pytest.MonkeyPatch) -> None:
    mode, asked = opened()
    assert mode.active is None and mode.active_set is None and mode.match is None and mode.switch is None
    assert say(mode, monkeypatch, MATHS) and mode.active == "maths"
    assert mode.switch == Switch(7, 0.1) and mode.match is MATHS
    assert asked == [mode.experts_of("maths")] == [mode.active_set]
    for same in (MATHS, HARDLY_LAW):  # not nearer by the margin
        assert not say(mode, monkeypatch, same)
        assert (mode.active, mode.match) == ("maths", same)
    assert not say(mode, monkeypatch, LAW, FEWEST_TOKENS - 1), "a few words do not question a task"
    assert mode.match is HARDLY_LAW
    assert say(mode, monkeypatch, LAW, FEWEST_TOKENS) and mode.active == "law"
    assert asked == [mode.experts_of("maths"), mode.experts_of("law")]


def test_a_text_of_no_task_has_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    mode, asked = opened()
    assert not say(mode, monkeypatch, NONE) and asked == []
    say(mode, monkeypatch, MATHS)
    assert say(mode, monkeypatch, NONE)
    assert (mode.active, mode.active_set, mode.switch) == (None, None, None)
    assert asked == [mode.experts_of("maths"), None]
    assert say(mode, monkeypatch, LAW, 1) and mode.active == "law", "without a task the first words decide"


def test_a_first_prompt_may_be_short(monkeypatch: pytest.MonkeyPatch) -> None:
    mode, _ = opened()
    assert say(mode, monkeypatch, MATHS, 1) and mode.active == "maths"


def test_pinning_and_releasing() -> None:
    mode, asked = opened()
    mode.pin("law")
    assert (mode.active, mode.pinned) == ("law", True)
    mode.pin(None)
    assert (mode.active, mode.pinned) == (None, True)
    mode.release()
    assert (mode.active, mode.pinned) == (None, False)
    assert asked == [mode.experts_of("law"), None]
    for ask in (mode.pin, mode.pattern, mode.experts_of):
        with pytest.raises(PatternError, match=r"^there is no task 'physics'; known are maths, law$"):
            ask("physics")
    assert (mode.active, mode.pinned) == (None, False)


def test_one_layer_is_matched_by_the_first_and_several_by_all_that_run() -> None:
    shares = random_documents(MODEL, 1).shares
    mode, _ = opened()
    for layers in ((1,), (1, 2)):
        place = slice(0, len(layers))
        found = mode.match_of(SimpleNamespace(layers=layers, n_token=9, shares=lambda p=place: shares[0, p]))
        assert found.n_tokens == 9 and set(found.distances) == {"maths", "law"}


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = write_tiny_model(tmp_path_factory.mktemp("task_mode") / "tiny.gguf", "qwen3moe")
    return path


@pytest.mark.parametrize(
    ("experts", "keep", "task", "said"),
    [
        ("some", None, None, r"^experts=some is unknown; give all, task or auto$"),
        ("all", "8", None, r"^keep=8 limits the experts, which experts=all does not; give experts=task$"),
        ("all", None, "law", r"^task=law says nothing with experts=all; give experts=task or experts=auto$"),
        ("auto", "8", None, r"^keep=8 limits the experts, which experts=auto does not; give experts=task$"),
        ("task", "3", None, r"^keep=3 cannot be: tiny qwen3moe has 16 experts in a layer and needs at least 4"),
        ("task", "17", None, r"^keep=17 cannot be: tiny qwen3moe has 16 experts"),
        ("task", "2/1", None, r"^2/1 activates more experts than it keeps"),
        ("task", "5/8", None, r"^5 active experts were asked of a model that uses 4; give k/M with a k from 1 to 4$"),
        ("task", "few", None, r"is no number of experts to keep"),
    ],
)
def test_options_that_contradict(
    tiny: Path, tmp_path: Path, experts: str, keep: str | None, task: str | None, said: str
) -> None:
    with pytest.raises(BudgetError, match=said):
        open_tasks(read_index(tiny), experts, keep, task, stored_patterns(tiny, tmp_path))


def test_fewer_active_experts_need_fewer_kept(tiny: Path, tmp_path: Path) -> None:
    mode = open_tasks(read_index(tiny), "task", "2/3", None, stored_patterns(tiny, tmp_path))
    assert mode is not None and (mode.k, mode.k_a) == (2, 4)


def test_tasks_that_are_not_there(tiny: Path, tmp_path: Path) -> None:
    index = read_index(tiny)
    assert open_tasks(index, "all", None, None, tmp_path) is None
    with pytest.raises(PatternError, match=r"^there is no task for tiny qwen3moe in .*; run edgemoe profile first$"):
        open_tasks(index, "auto", None, None, tmp_path)
    (tmp_path / "bad.pattern").write_bytes(b"?")
    with pytest.raises(PatternError, match=r"there is no task for .*bad\.pattern is damaged .*; run edgemoe profile"):
        open_tasks(index, "auto", None, None, tmp_path)
    stored_patterns(tiny, tmp_path)
    with pytest.raises(PatternError, match=r"did you mean maths\?"):
        open_tasks(index, "auto", None, "mats", tmp_path)
    found = open_tasks(index, "auto", None, "maths", tmp_path)
    assert found is not None and found.names == ("law", "maths"), "a damaged file hides no other"


def test_another_models_tasks_are_none_and_another_quantizations_are_welcome(tiny: Path, tmp_path: Path) -> None:
    (stranger,) = write_tiny_model(tmp_path / "stranger.gguf", "qwen3moe", seed=1)
    (small,) = write_tiny_model(tmp_path / "small.gguf", "qwen3moe", expert_type="q8_0")
    folder = stored_patterns(tiny, tmp_path / "tasks")
    with pytest.raises(PatternError, match=r"whose experts are not those of .*; run edgemoe profile first"):
        open_tasks(read_index(stranger), "auto", None, None, folder)
    for path, said in ((small, r"task 'law' was profiled with .* and serves .*: the ranking holds"), (tiny, None)):
        found = open_tasks(read_index(path), "auto", None, None, folder)
        assert found is not None and found.names == ("law", "maths") and found.note is None
        residency: Any = Recorded()
        found.settle(plan(1 << 30), lambda n_bytes: plan_within(n_bytes, 1 << 30))
        found.attach(residency)
        found.pin("law")
        assert found.note is None if said is None else re.match(said, found.note or "")
