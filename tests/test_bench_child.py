"""The child's evaluator on a model in this process, and what opening plain llama.cpp leaves as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plain_llama import TINY_MOE, arena_share

from edgemoe.bench_arm import Settings
from edgemoe.bench_child import Evaluator, open_edgemoe, open_plain
from edgemoe.llama_library import C, internals

SETTINGS = Settings(str(TINY_MOE), n_ctx=64, n_ubatch=32, n_threads=1, ram=1 << 30)


def test_greedy_tokens_are_those_that_are_given() -> None:
    with open_edgemoe(SETTINGS) as llama:
        evaluator = Evaluator(llama)
        evaluator.prompt([1, 2, 3])
        greedy = evaluator.decode(6)
        tokens = llama.input_ids[3:9].tolist()
        evaluator.prompt([1, 2, 3])
        assert evaluator.decode(6, tokens)["checksums"] == greedy["checksums"]
        evaluator.prompt([1, 2, 3])
        assert evaluator.decode(6, [*tokens[:3], 7, 7, 7])["checksums"][:4] == greedy["checksums"][:4]


def test_experts_are_held_and_routes_restricted() -> None:
    with open_edgemoe(SETTINGS) as llama:
        evaluator = Evaluator(llama)
        layers = list(llama.index.moe_layers)
        few = [list(range(8)) for _ in layers]
        evaluator.hold(layers, few, only=False)
        assert llama.store.stats().bytes_read > 0
        evaluator.prompt([1, 2, 3])
        free = evaluator.decode(3, [4, 5, 6])
        evaluator.hold(layers, few, only=True)
        before = evaluator.prompt([1, 2, 3])
        within = evaluator.decode(3, [4, 5, 6])
        assert within["checksums"] != free["checksums"]
        assert within["misses"] == before["misses"]


@pytest.mark.parametrize("mode", ["MMAP", "NONE", "DIRECT_IO"])
def test_plain_llama_is_opened_as_asked(mode: str) -> None:
    model, context = internals.LlamaModel, internals.LlamaContext
    llama = open_plain(replace(SETTINGS, load_mode=mode, n_expert_used=1, n_batch=48, n_threads_batch=2))
    try:
        assert llama.model_params.load_mode == getattr(C, f"LLAMA_LOAD_MODE_{mode}")
        assert llama.model_params.use_extra_bufts is False
        assert (llama.n_batch, llama.context_params.n_ubatch) == (48, 32)
        assert (llama.n_threads, llama.n_threads_batch) == (1, 2)
    finally:
        llama.close()
    assert (internals.LlamaModel, internals.LlamaContext) == (model, context)


def test_the_lru_arm_has_another_order_of_leaving_and_no_more() -> None:
    found = {}
    for tuning in ("lru", "all"):
        with arena_share(0.4), open_edgemoe(replace(SETTINGS, tuning=tuning)) as llama:
            evaluator = Evaluator(llama)
            evaluator.prompt(list(range(32)))
            found[tuning] = evaluator.decode(24, list(range(100, 124)))
    assert found["lru"]["checksums"] == found["all"]["checksums"]
    assert all(state["prefetched_bytes"] > 0 for state in found.values())
    assert found["lru"]["misses"] != found["all"]["misses"]


def test_the_control_arm_has_no_tricks() -> None:
    with open_edgemoe(replace(SETTINGS, tuning="plain", forced_bytes=12345)) as llama:
        evaluator = Evaluator(llama)
        evaluator.prompt(list(range(32)))
        assert evaluator.decode(8)["prefetched_bytes"] == 0
        assert llama.plan.bytes_of("forced routes") == 12345
