"""Workloads: the same tokens and experts for every arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plain_llama import TINY_MOE

from edgemoe.bench_arm import Settings
from edgemoe.bench_workload import LOST_AHEAD, MEASURED, departures, make_workload
from edgemoe.errors import EdgemoeError, TraceError
from edgemoe.index import ExpertIndex, read_index
from edgemoe.route_statistics import statistics
from edgemoe.routes import fitted_routes, uniform_routes

SETTINGS = Settings(str(TINY_MOE), n_ctx=48, n_ubatch=None, n_threads=1)


@pytest.fixture(scope="module")
def index() -> ExpertIndex:
    return read_index(TINY_MOE)


@pytest.mark.parametrize("routing", ["fitted", "uniform", "switch"])
def test_drawn_routes(routing: str, index: ExpertIndex) -> None:
    workload, run = make_workload(routing, index, SETTINGS, 32, 16, None)
    again, _ = make_workload(routing, index, SETTINGS, 32, 16, None)
    assert workload.forced and workload.routes is not None and again.routes is not None
    assert workload.routes.prompt.shape == (32, len(index.moe_layers), max(index.n_expert_used))
    assert np.array_equal(workload.routes.decode, again.routes.decode) and workload.decode == again.decode
    assert (len(workload.prompt), len(workload.decode)) == (32, 16)
    assert max(workload.prompt) < index.n_vocab and run == index


def test_the_prompt_has_one_token_in_the_last_layer(index: ExpertIndex) -> None:
    workload, _ = make_workload("uniform", index, SETTINGS, 32, 16, None)
    assert workload.routes is not None and index.moe_layers[-1] == index.n_layer - 1
    last, others = workload.routes.prompt[:, -1], workload.routes.prompt[:, -2]
    assert len(np.unique(last, axis=0)) == 1 < len(np.unique(others, axis=0))


def test_a_trace_sets_the_experts_per_token(index: ExpertIndex, tmp_path: Path) -> None:
    rows = [
        (0, phase, step, layer, slot, (3 * step + layer + slot) % 32)
        for phase, steps in ((0, range(3)), (1, range(3, 5)))
        for step in steps
        for layer in range(2)
        for slot in range(3)
    ]
    text = "# route_trace v1\n# n_layer=2 n_expert=32 n_expert_used=3\nturn,phase,step,layer,slot,expert\n"
    path = tmp_path / "short.csv"
    path.write_text(text + "".join(",".join(map(str, row)) + "\n" for row in rows))
    workload, run = make_workload(str(path), index, SETTINGS, 32, 16, None)
    assert workload.routes is not None and workload.routes.n_used == 3
    assert workload.routes.decode.shape == (16, len(index.moe_layers), 3)
    assert set(run.n_expert_used) == {3}


def test_predictions_are_right_so_often(index: ExpertIndex) -> None:
    workload, _ = make_workload("fitted", index, SETTINGS, 200, 100, 0.5)
    assert workload.routes is not None and workload.predicted is not None
    # One layer ahead, and two; in the last layer a prompt's tokens are all the last one's, not what each predicted.
    true = np.concatenate([workload.routes.prompt, workload.routes.decode])[:, :-1]
    for told, recall in zip(workload.predicted[:, :, :-1], (0.5, 0.5 - LOST_AHEAD), strict=True):
        assert told.shape == true.shape
        assert (told[..., None] == true[..., None, :]).any(-1).mean() == pytest.approx(recall, abs=0.05)


def test_fitted_routes_are_compared_with_their_trace() -> None:
    fitted = fitted_routes("qwen", 48, 128, 6, 8, MEASURED, 0)
    assert departures(fitted, statistics(fitted, MEASURED)) == []
    wider = fitted_routes("qwen", 12, 64, 6, 8, MEASURED, 0)
    uniform = uniform_routes(12, 128, 6, 8, MEASURED, 0)
    assert departures(wider, statistics(wider, MEASURED)) is None
    assert departures(uniform, statistics(uniform, MEASURED)) is None
    # Uniform routes by the name of fitted ones are found out.
    liar = replace(uniform, name=fitted.name)
    assert departures(liar, statistics(liar, MEASURED))


def test_natural_routes_are_the_model_s_own(index: ExpertIndex) -> None:
    workload, run = make_workload("natural", index, SETTINGS, 32, 16, None)
    assert not workload.forced and run == index and workload.routes is not None
    assert workload.routes.decode.shape == (16, len(index.moe_layers), max(index.n_expert_used))


@pytest.mark.parametrize(
    ("routing", "recall", "said"),
    [
        ("natural", 0.5, "--recall 0.5 needs forced routes"),
        ("nothing.csv", None, "nothing.csv cannot be read as a routing trace"),
    ],
)
def test_what_cannot_be(
    routing: str, recall: float | None, said: str, index: ExpertIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TraceError, match=said):
        make_workload(routing, index, SETTINGS, 32, 16, recall)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("hello\n")])
def test_no_trace(make: Callable[[Path], object], index: ExpertIndex, tmp_path: Path) -> None:
    make(tmp_path / "trace.csv")
    with pytest.raises(EdgemoeError, match=r"trace\.csv"):
        make_workload(str(tmp_path / "trace.csv"), index, SETTINGS, 32, 16, None)
