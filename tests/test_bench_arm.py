"""Arms as processes: they answer, they die, they are too slow."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plain_llama import TINY_MOE

from edgemoe.bench_arm import EDGEMOE, PLAIN, Arm, ArmError, Settings, ask_plan, ask_text
from edgemoe.index import read_index

MIB = 1 << 20
SETTINGS = Settings(str(TINY_MOE), n_ctx=64, n_ubatch=32, n_threads=1, ram=96 * MIB)


def test_both_arms_compute_the_same() -> None:
    checksums = []
    for name in (EDGEMOE, PLAIN):
        with Arm(name, SETTINGS) as arm:
            assert arm.ready["load_s"] > arm.ready["open_s"] > 0
            first = arm.prompt(32)
            answer = arm.decode(8)
            assert len(answer["seconds"]) == 8 and answer["checksums"][-1] == answer["logits_crc32"]
            assert first["seconds"] > 0 and answer["peak_rss"] > 10 * MIB
            checksums.append(answer["checksums"])
    assert checksums[0] == checksums[1]
    assert len(set(checksums[0])) == 8


def test_what_edgemoe_says_when_it_is_ready_and_after() -> None:
    with Arm(EDGEMOE, SETTINGS) as arm:
        assert sum(arm.ready["plan"].values()) == SETTINGS.ram
        before = arm.prompt(32)
        after = arm.ask(do="decode", n_tokens=4, tokens=[1, 2, 3, 4])
        index = read_index(TINY_MOE)
        slabs = 3 * sum(index.n_expert_used[layer] for layer in index.moe_layers)
        assert after["hits"] + after["misses"] - before["hits"] - before["misses"] == 4 * slabs


def test_a_slow_arm_stops_decoding_in_time() -> None:
    with Arm(EDGEMOE, SETTINGS) as arm:
        arm.prompt(4)
        assert len(arm.ask(do="decode", n_tokens=20, limit_s=0.0, least=3)["seconds"]) == 3


@pytest.mark.parametrize("name", [EDGEMOE, PLAIN])
def test_forced_routes_change_logits_alike(name: str, tmp_path: Path) -> None:
    def run(arm: Arm, seed: int) -> list[int]:
        index = read_index(TINY_MOE)
        layers, k = index.moe_layers, max(index.n_expert_used)
        rng = np.random.default_rng(seed)
        rows = [[rng.permutation(index.n_expert)[:k] for _ in layers] for _ in range(12)]
        path = tmp_path / "ids.npz"
        np.savez(path, layers=np.array(layers, np.int32), ids=np.array(rows, np.int32))
        arm.ask(do="force", path=str(path))
        arm.prompt(8)
        checksums: list[int] = arm.ask(do="decode", n_tokens=4, tokens=[1, 2, 3, 4])["checksums"]
        return checksums

    with Arm(name, replace(SETTINGS, forced_bytes=MIB)) as arm:
        first, other, again = run(arm, 0), run(arm, 1), run(arm, 0)
    assert first == again != other
    for tuning in ("plain", "blind", "lru"):
        with Arm(EDGEMOE, replace(SETTINGS, tuning=tuning, forced_bytes=MIB)) as arm:
            assert run(arm, 0) == first


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("given", "told"), [({}, "300000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_plain_llama_cpp_spins_as_it_would_alone(
    given: dict[str, str], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with Arm(PLAIN, SETTINGS) as arm:
        environment = Path(f"/proc/{arm._process.pid}/environ").read_text().split("\0")
    found = [entry.partition("=")[2] for entry in environment if entry.startswith("GOMP_SPINCOUNT=")]
    assert found == ([] if told is None else [told])


def test_a_model_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ArmError, match=r"edgemoe ended with status 1: .*no\.gguf"):
        Arm(EDGEMOE, replace(SETTINGS, model=str(tmp_path / "no.gguf")))


def test_a_child_that_is_killed() -> None:
    with pytest.raises(ArmError, match="ended with status -9: it said nothing"), Arm(EDGEMOE, SETTINGS) as arm:
        os.kill(arm._process.pid, signal.SIGKILL)
        arm.prompt(4)


def test_an_answer_is_not_waited_for_for_ever() -> None:
    with pytest.raises(ArmError, match="no answer for 0 s"):
        Arm(EDGEMOE, SETTINGS, patience=0.01)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_child_is_left_behind(error: type[BaseException]) -> None:
    with pytest.raises(error), Arm(EDGEMOE, SETTINGS) as arm:
        raise error
    with pytest.raises(ProcessLookupError):
        os.kill(arm._process.pid, 0)


def test_plans() -> None:
    plan = ask_plan(replace(SETTINGS, n_ubatch=None))
    assert plan["floor"] < 96 * MIB < plan["everything"]
    assert 0 < plan["arena"] < read_index(TINY_MOE).expert_bytes and plan["n_ubatch"] == 64
    # Fewer experts for each token take fewer bytes at the floor.
    assert ask_plan(replace(SETTINGS, n_expert_used=1))["floor"] < plan["floor"]
    # Routes that will be forced take their memory from the experts.
    forced = ask_plan(replace(SETTINGS, forced_bytes=MIB))
    assert forced["arena"] == pytest.approx(ask_plan(SETTINGS)["arena"] - MIB, abs=MIB // 10)


def test_a_plan_that_cannot_be_kept() -> None:
    with pytest.raises(ArmError, match="MiB"):
        ask_plan(SETTINGS.within(30 * MIB))


def test_text_and_its_routes() -> None:
    tokens, ids = ask_text(replace(SETTINGS, n_ctx=40), 40)
    index = read_index(TINY_MOE)
    assert len(tokens) == 40 and len(set(tokens)) > 10
    assert ids is not None and ids.shape == (40, len(index.moe_layers), max(index.n_expert_used))
    assert all(len(set(row)) == ids.shape[2] for row in ids.reshape(-1, ids.shape[2]).tolist())


@pytest.mark.parametrize("ask", [ask_plan, lambda settings: ask_text(settings, 4)])
def test_questions_about_no_model(ask: Callable[[Settings], object], tmp_path: Path) -> None:
    with pytest.raises(ArmError, match=r"none\.gguf"):
        ask(replace(SETTINGS, model=str(tmp_path / "none.gguf")))
