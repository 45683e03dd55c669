"""Routing limited to some experts is, in numbers, the model whose other experts were cut out of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
from gating import GATINGS, Gating
from plain_llama import TINY_MOE, arena_share, greedy, logits, plain_llama
from sliced_model import slice_model
from tiny_architectures import GROUPS, Keys
from tiny_models import TINY_ARCHITECTURES, write_tiny_model

from edgemoe.backend import Llama
from edgemoe.errors import StoreError

SETTINGS = {"n_ctx": 128, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "seed": 1}
TRAINED = "tiny-moe"
N_DECODED = 12

# Their routers cannot be limited in every layer: a table chooses, or two sets of experts are behind one router.
UNLIMITED = ("deepseek4", "grovemoe")

# Relative to the largest logit; 1e-6 was seen. A softmax over all experts adds zeros for those that are not kept, in
# another order. What becomes of a different last bit is bounded only where nothing behind it is rounded to 16 bits.
TOLERANCE = 5e-6

# llama.cpp's GELU is a table that is asked with 16 bits: where a last bit falls on the other side of a rounding, as for
# a quarter of the prompts tried, 2e-5 was seen.
GELU = ("grok",)
GELU_TOLERANCE = 1e-4
F32_CACHE = {"type_k": 0, "type_v": 0}

# Whole vectors of any processor: with such sets a softmax adds the same numbers in the same order, and then zeros.
BLOCK = 16

Kept = Mapping[int, list[int]]


def tolerance(name: str) -> float:
    return GELU_TOLERANCE if name in GELU else TOLERANCE


def model_file(name: str, tmp_path: Path, **dimensions: int) -> Path:
    if name == TRAINED:
        return TINY_MOE
    path = tmp_path / f"{name}.gguf"
    write_tiny_model(path, name, **dimensions)
    return path


@contextmanager
def opened(path: Path, share: float = 1.0, **changes: object) -> Iterator[Llama]:
    with arena_share(share), Llama(str(path), **{**SETTINGS, **changes}) as llama:
        yield llama


def random_sets(llama: Llama, n_kept: int, seed: int = 0) -> Kept:
    """Other experts in each layer; with groups of experts, equally many of each."""
    random, index = np.random.default_rng(seed), llama.index
    n_group = max(1, index.n_expert_group)
    per_group = index.n_expert // n_group
    return {
        layer: sorted(
            int(expert)
            for group in range(n_group)
            for expert in group * per_group + random.choice(per_group, n_kept // n_group, replace=False)
        )
        for layer in index.moe_layers
    }


def blocks(llama: Llama) -> Kept:
    """A block of consecutive experts, another one in the next layer; with groups of experts, random ones of each."""
    if llama.index.n_expert_group > 1:
        return random_sets(llama, BLOCK)
    n_blocks = llama.index.n_expert // BLOCK
    return {
        layer: list(range(BLOCK * (i % n_blocks), BLOCK * (i % n_blocks + 1)))
        for i, layer in enumerate(llama.index.moe_layers)
    }


def keep(llama: Llama, kept: Kept) -> None:
    for layer, experts in kept.items():
        llama.store.session.keep(layer, experts)


def unlimit(llama: Llama) -> None:
    keep(llama, {layer: [] for layer in llama.index.moe_layers})


def prompt_for(llama: Llama) -> list[int]:
    tokens: list[int] = np.random.default_rng(3).integers(4, llama.n_vocab(), 40).tolist()
    return tokens


def difference(
    path: Path, choose: Callable[[Llama], Kept], tmp_path: Path, share: float = 1.0, **settings: object
) -> float:
    """The largest difference between logits of masked and sliced model, as a part of the largest logit."""
    with opened(path, share, **settings) as llama:
        kept, prompt = choose(llama), prompt_for(llama)
        slice_model(path, tmp_path / "sliced.gguf", kept)
        sliced = plain_llama(tmp_path / "sliced.gguf", **{**SETTINGS, **settings, "n_ubatch": llama.plan.n_ubatch})
        answer = greedy(sliced, prompt, N_DECODED)
        expected = logits(sliced, prompt, answer)
        sliced.close()
        full = logits(llama, prompt, answer)
        keep(llama, kept)
        found = logits(llama, prompt, answer)
    assert np.isfinite(expected).all()
    assert np.abs(full - expected).max() > 1e-3, "a mask that changes nothing proves nothing"
    return float(np.abs(found - expected).max() / np.abs(expected).max())


LIMITED = [name for name in TINY_ARCHITECTURES if name not in UNLIMITED]


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["everything", "floor"])
@pytest.mark.parametrize("name", [TRAINED, *LIMITED])
def test_masked_is_sliced_bit_for_bit(name: str, share: float, tmp_path: Path) -> None:
    path = model_file(name, tmp_path, expert=2 * BLOCK)
    assert difference(path, blocks, tmp_path, share) == 0.0


@pytest.mark.parametrize("name", LIMITED)
def test_any_set_is_sliced(name: str, tmp_path: Path) -> None:
    path = model_file(name, tmp_path)
    found = difference(path, lambda llama: random_sets(llama, llama.index.n_expert // 2), tmp_path, **F32_CACHE)
    assert found <= tolerance(name)
    if name in GATINGS and GATINGS[name].score != "softmax":
        assert found == 0.0


@pytest.mark.parametrize("name", ["qwen3moe", "olmoe", "gpt-oss", "minimax-m2", "llama4", "ernie4_5-moe"])
def test_exactly_as_many_as_are_used(name: str, tmp_path: Path) -> None:
    path = model_file(name, tmp_path)
    n_used = 1 if name == "llama4" else 4
    assert difference(path, lambda llama: random_sets(llama, n_used), tmp_path, **F32_CACHE) <= TOLERANCE


SOFTMAX, SIGMOID = 1, 2


@pytest.mark.parametrize("grouped", [False, True], ids=["all", "groups"])
@pytest.mark.parametrize("normalised", [False, True], ids=["as-they-are", "normalised"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "selection-bias"])
@pytest.mark.parametrize("function", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_gating_functions(function: int, biased: bool, normalised: bool, grouped: bool, tmp_path: Path) -> None:
    """DeepSeek's architecture has keys for all of it: as NumPy says, and as the sliced model does."""
    tiny = TINY_ARCHITECTURES["deepseek2"]
    keys: Keys = {**tiny.keys, "expert_gating_func": function, "expert_weights_norm": normalised}
    if not grouped:
        keys = {key: value for key, value in keys.items() if key not in GROUPS}
    layers = [layer if biased else layer.replace("selection-bias ", "") for layer in tiny.layers]
    path = tmp_path / "deepseek2.gguf"
    with mock.patch.dict(TINY_ARCHITECTURES, deepseek2=replace(tiny, keys=keys, layers=layers)):
        write_tiny_model(path, "deepseek2")
    gating = Gating("softmax" if function == SOFTMAX else "sigmoid", normalised, 2.5, *((4, 2) if grouped else ()))
    assert_routed_as(gating, path, 8)
    found = difference(path, lambda llama: random_sets(llama, 8), tmp_path, **F32_CACHE)
    assert found <= TOLERANCE if function == SOFTMAX else found == 0.0


@pytest.mark.parametrize("name", [name for name in GATINGS if name not in UNLIMITED])
def test_masked_routing_as_numpy(name: str, tmp_path: Path) -> None:
    path = model_file(name, tmp_path)
    assert_routed_as(GATINGS[name], path, 8 if name != "llama" else 4)


def assert_routed_as(gating: Gating, path: Path, n_kept: int) -> None:
    """Ids and weights follow from the recorded logits and the mask; the logits are those of the whole router."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    with opened(path, logits_all=True) as llama:
        session, kept, prompt = llama.store.session, random_sets(llama, n_kept), prompt_for(llama)
        keep(llama, kept)
        session.watch_routers(list(kept), outputs=True)
        llama.eval(prompt)
        for layer, experts in kept.items():
            found, ids, weights, _, _ = session.take_trace(layer)
            assert np.isfinite(found).all(), "the mask is no part of what the router says"
            assert set(ids.ravel()) <= set(experts)
            bias = tensors.get(f"blk.{layer}.exp_probs_b.bias")
            expected_ids, expected = gating.route(found, ids.shape[1], kept=experts, selection_bias=bias)
            np.testing.assert_array_equal(ids, expected_ids)
            np.testing.assert_allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("name", [TRAINED, *TINY_ARCHITECTURES])
def test_first_router_says_the_same_with_and_without_a_mask(name: str, tmp_path: Path) -> None:
    """A task is recognised by the first router's answer, and that must not depend on the last task's set."""
    with opened(model_file(name, tmp_path), logits_all=True) as llama:
        session, first = llama.store.session, llama.index.moe_layers[0]
        session.watch_routers([first])
        session.cut_after(first)
        answers = []
        for masked in (False, True):
            keep(llama, random_sets(llama, llama.index.n_expert // 2) if masked and name not in UNLIMITED else {})
            llama.reset()
            llama.eval(prompt_for(llama))
            answers.append(session.take_trace(first)[0])
        np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("name", [TRAINED, *TINY_ARCHITECTURES])
def test_keeping_all_and_no_mask_are_the_same(name: str, tmp_path: Path) -> None:
    with opened(model_file(name, tmp_path)) as llama:
        prompt = prompt_for(llama)
        answer = greedy(llama, prompt, N_DECODED)
        expected = logits(llama, prompt, answer)
        everything = {layer: list(range(llama.index.n_expert)) for layer in llama.index.moe_layers}
        keep(llama, everything)
        np.testing.assert_array_equal(logits(llama, prompt, answer), expected)
        if name not in UNLIMITED:
            keep(llama, random_sets(llama, llama.index.n_expert // 2))
            assert np.abs(logits(llama, prompt, answer) - expected).max() > 1e-3
        unlimit(llama)
        np.testing.assert_array_equal(logits(llama, prompt, answer), expected)


@pytest.mark.parametrize("name", [TRAINED, "qwen3moe", "gpt-oss", "glm4moe", "granitehybrid"])
def test_sizes_may_differ_and_the_arena_does_not_matter(name: str, tmp_path: Path) -> None:
    path = model_file(name, tmp_path)
    found = []
    answer = [7, 8, 9, 10, 11, 12, 13, 14]
    for share in (1.0, 0.5, 0.0):
        with opened(path, share, n_ubatch=1) as llama:
            random = np.random.default_rng(5)
            kept = {
                layer: sorted(random.choice(llama.index.n_expert, n_kept, replace=False).tolist())
                for layer, n_kept in zip(llama.index.moe_layers, [4, 15, 9, 5, 6, 12, 4, 11], strict=False)
            }
            keep(llama, kept)
            session = llama.store.session
            session.watch_routers(list(kept), outputs=True)
            found.append(logits(llama, prompt_for(llama), answer))
            for layer, experts in kept.items():
                assert set(session.take_trace(layer)[1].ravel()) <= set(experts)
            if share == 0:
                assert llama.store.stats().evictions > 0
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_experts_that_are_not_kept_are_never_read(tmp_path: Path) -> None:
    with opened(model_file("qwen3moe", tmp_path)) as llama:
        kept = random_sets(llama, 5)
        keep(llama, kept)
        logits(llama, prompt_for(llama), list(range(20, 60)))
        assert llama.store.stats().misses <= 3 * 3 * 5


@pytest.mark.parametrize("name", UNLIMITED)
def test_routing_that_cannot_be_limited_says_so(name: str, tmp_path: Path) -> None:
    with opened(model_file(name, tmp_path)) as llama:
        prompt = prompt_for(llama)
        expected = logits(llama, prompt, [5])
        keep(llama, random_sets(llama, 8))
        with pytest.raises(StoreError, match=r"layer 0 does not select its experts in one step .* keep every expert"):
            logits(llama, prompt, [5])
        unlimit(llama)
        np.testing.assert_array_equal(logits(llama, prompt, [5]), expected)


def test_layers_beside_a_table_of_experts_can_be_limited(tmp_path: Path) -> None:
    """DeepSeek V4 chooses by a table in its first layers only."""
    gating = GATINGS["deepseek4"]
    path = model_file("deepseek4", tmp_path)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    with opened(path, logits_all=True) as llama:
        kept = {layer: experts for layer, experts in random_sets(llama, 8).items() if layer > 0}
        keep(llama, kept)
        llama.store.session.watch_routers(list(kept), outputs=True)
        llama.eval(prompt_for(llama))
        for layer, experts in kept.items():
            found, ids, weights, _, _ = llama.store.session.take_trace(layer)
            bias = tensors[f"blk.{layer}.exp_probs_b.bias"]
            expected_ids, expected = gating.route(found, 4, kept=experts, selection_bias=bias)
            np.testing.assert_array_equal(ids, expected_ids)
            np.testing.assert_allclose(weights, expected, atol=1e-6)
