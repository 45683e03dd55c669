"""Sets of experts: what they say of themselves, and what differs between two."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plain_llama import TINY_MOE

from edgemoe.errors import AllocationError, BudgetError
from edgemoe.expert_set import ExpertLayers, ExpertSet, everything
from edgemoe.index import read_index

LAYERS = ExpertLayers((3, 4), 4, (2, 1), (10, 7))
SOME = ExpertSet((3, 4), 4, 2, ((0, 1, 3), (2,)))


def test_what_a_set_says() -> None:
    assert (SOME.sizes, SOME.n_kept, SOME.mean_kept) == ((3, 1), 4, 2.0)
    assert SOME.n_bytes(LAYERS.expert_bytes) == 37
    assert str(SOME) == "2/2 (mean of 2 layers, 1 to 3)"
    assert str(ExpertSet((0, 1), 4, 2, ((0, 1, 2), (0, 3)))) == "2/2.5 (mean of 2 layers, 2 to 3)"
    assert str(everything(LAYERS)) == "2/4"
    assert everything(LAYERS).kept == ((0, 1, 2, 3),) * 2
    assert everything(LAYERS).layers == LAYERS.numbers


def test_switching_reads_the_difference() -> None:
    other = ExpertSet((3, 4), 4, 2, ((0, 2), (1, 2)))
    assert SOME.missing_from(other) == ((3, 1), (3, 3))
    assert other.missing_from(SOME) == ((3, 2), (4, 1))
    assert SOME.missing_from(SOME) == SOME.missing_from(everything(LAYERS)) == ()
    with pytest.raises(AllocationError, match="different models"):
        SOME.missing_from(replace(SOME, layers=(3, 5)))


def test_the_reason_is_not_compared() -> None:
    assert replace(SOME, why="because") == SOME
    assert hash(replace(SOME, why="because")) == hash(SOME)


@pytest.mark.parametrize(
    "kept", [((0, 1), (4,)), ((0, 1), (-1, 2)), ((1, 0), (2,)), ((1, 1), (2,)), ((), (2,)), ((0, 1),), ()]
)
def test_sets_that_no_model_has(kept: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(AllocationError):
        ExpertSet((3, 4), 4, 2, kept)


@pytest.mark.parametrize(
    "change",
    [
        {"n_expert_used": (2,)},
        {"expert_bytes": (10,)},
        {"numbers": ()},
        {"n_expert_used": (2, 5)},
        {"n_expert_used": (0, 1)},
        {"expert_bytes": (10, 0)},
        {"n_group": 3},
        {"n_group": 0},
        {"n_group": 2, "n_group_used": 3},
        {"n_group": 2, "n_group_used": 0},
    ],
)
def test_models_that_contradict_themselves(change: dict[str, object]) -> None:
    with pytest.raises(AllocationError, match=r"; (give|take) .*"):
        replace(LAYERS, **change)  # type: ignore[arg-type]


def test_floors() -> None:
    assert LAYERS.floor == (2, 1)
    deepseek = ExpertLayers((3, 4), 256, (8, 8), (1, 1), n_group=8, n_group_used=4)
    assert deepseek.floor == (16, 16)  # two of each of the eight groups: four groups then hold eight
    assert replace(deepseek, n_expert_used=(12, 4)).floor == (24, 16)
    assert replace(deepseek, n_group_used=1).floor == (64, 64)


def test_fewer_active_experts() -> None:
    assert LAYERS.activating(1).n_expert_used == (1, 1)
    assert LAYERS.activating(2) == LAYERS
    for k in (0, 3):
        with pytest.raises(BudgetError, match=rf"^{k} active experts were asked of a model that uses 2; give k/M"):
            LAYERS.activating(k)


def test_a_header_gives_the_layers() -> None:
    index = read_index(TINY_MOE)
    found = ExpertLayers.of(index)
    assert found.numbers == index.moe_layers
    assert found.n_expert_used == (4,) * 8
    assert (found.n_group, found.n_group_used) == (1, 1)
    assert everything(found).n_bytes(found.expert_bytes) == index.expert_bytes
