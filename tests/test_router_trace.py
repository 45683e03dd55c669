"""What the hook records of routers and experts is what plain llama.cpp computes, and NumPy from the file's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gating import GATINGS, Gating
from graph_tap import GraphTap
from plain_llama import TINY_MOE, arena_share, greedy, logits, plain_llama
from tiny_models import TINY_ARCHITECTURES, write_tiny_model

from edgemoe.backend import Llama
from edgemoe.errors import StoreError

# Three graphs for a prompt of 40 tokens.
SETTINGS = {"n_ctx": 128, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "seed": 1}
OUTPUTS = ("ffn_moe_down_biased", "ffn_moe_down_scaled", "ffn_moe_down")
TAPPED = ("ffn_inp", "ffn_moe_logits", "ffn_moe_topk", "ffn_moe_weighted", *OUTPUTS)
TRAINED = "tiny-moe"

Floats = npt.NDArray[np.float32]


def model_file(name: str, tmp_path: Path) -> Path:
    if name == TRAINED:
        return TINY_MOE
    path = tmp_path / f"{name}.gguf"
    write_tiny_model(path, name)
    return path


def prompt_for(llama: Llama, length: int = 40) -> list[int]:
    tokens: list[int] = np.random.default_rng(3).integers(4, llama.n_vocab(), length).tolist()
    return tokens


@contextmanager
def opened(path: Path, share: float = 1.0, **changes: object) -> Iterator[Llama]:
    with arena_share(share), Llama(str(path), **{**SETTINGS, "logits_all": True, **changes}) as llama:
        yield llama


class Weights:
    """Router weights of a file, as float32."""

    def __init__(self, path: Path) -> None:
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def get(self, layer: int, name: str) -> Floats | None:
        tensor = self._tensors.get(f"blk.{layer}.{name}")
        if tensor is None:
            return None
        return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)

    def has(self, layer: int, name: str) -> bool:
        return f"blk.{layer}.{name}" in self._tensors

    def selection_bias(self, layer: int) -> Floats | None:
        with_suffix = self.get(layer, "exp_probs_b.bias")
        return self.get(layer, "exp_probs_b") if with_suffix is None else with_suffix


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["everything", "floor"])
@pytest.mark.parametrize("name", [TRAINED, *TINY_ARCHITECTURES])
def test_trace_is_what_plain_llama_computes(name: str, share: float, tmp_path: Path) -> None:
    path = model_file(name, tmp_path)
    weights = Weights(path)
    with opened(path, share) as llama:
        prompt = prompt_for(llama)
        tap = GraphTap(path, TAPPED, logits_all=True, **{**SETTINGS, "n_ubatch": llama.plan.n_ubatch})
        session = llama.store.session
        session.watch_routers(list(llama.index.moe_layers), outputs=True)
        # A prompt, and a token that is decoded.
        for tokens in (prompt, [5]):
            tap.llama.eval(tokens)
            llama.eval(tokens)
        for layer in llama.index.moe_layers:
            found, ids, g, norms, change = session.take_trace(layer)
            assert len(found) == len(prompt) + 1
            router = weights.get(layer, "ffn_gate_inp.weight")
            assert router is not None
            expected = tap.rows("ffn_moe_logits.src1", layer) @ router.T
            bias = weights.get(layer, "ffn_gate_inp.bias")
            if bias is not None:
                expected += bias
            assert np.abs(found - expected).max() < 1e-4
            assert found.std() > 0.1, "logits that are all alike prove nothing"
            n_tokens, n_used = ids.shape
            # grovemoe has a second set of experts behind the same router, whose nodes have the same names.
            every = 2 if name == "grovemoe" else 1
            np.testing.assert_array_equal(ids, tap.rows("ffn_moe_topk", layer, every))
            np.testing.assert_array_equal(g, tap.slots("ffn_moe_weighted.src1", layer, every)[:, :, 0])
            outputs = tap.slots(next(name for name in OUTPUTS if tap.has(name, layer)), layer, every)
            lengths = np.linalg.norm(outputs, axis=2)
            # llama4 weights what its experts are given; the norms are such that g times norm is what is added.
            np.testing.assert_allclose(norms, lengths / g if name == "llama4" else lengths, rtol=1e-5)
            assert g.shape == norms.shape == (n_tokens, n_used)
            assert change.shape == (n_tokens, 1)
            # arctic's experts work beside the attention: the stream that they add to is not there yet.
            unknown = name == "arctic" or not tap.has("ffn_inp", layer)
            if unknown or tap.rows("ffn_inp", layer).shape[1] != outputs.shape[2]:
                assert np.isnan(change).all()
                continue
            before = tap.rows("ffn_inp", layer).astype(np.float64)
            after = before + (outputs * (1 if name == "llama4" else g[:, :, None])).sum(axis=1)
            cosine = (before * after).sum(axis=1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
            np.testing.assert_allclose(change[:, 0], 1 - cosine, atol=1e-6)
        tap.close()


@pytest.mark.parametrize("name", [TRAINED, *GATINGS])
def test_ids_and_weights_follow_from_the_logits(name: str, tmp_path: Path) -> None:
    path = model_file(name, tmp_path)
    weights = Weights(path)
    gating = GATINGS.get(name, Gating("softmax", normalised=True))
    with opened(path) as llama:
        session = llama.store.session
        session.watch_routers(list(llama.index.moe_layers), outputs=True)
        llama.eval(prompt_for(llama))
        for layer in llama.index.moe_layers:
            if weights.has(layer, "ffn_gate_tid2eid.weight"):
                continue  # chosen by a table
            found, ids, g, _, _ = session.take_trace(layer)
            expected_ids, expected = gating.route(found, ids.shape[1], selection_bias=weights.selection_bias(layer))
            np.testing.assert_array_equal(ids, expected_ids)
            np.testing.assert_allclose(g, expected, atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["everything", "floor"])
@pytest.mark.parametrize("name", [TRAINED, *TINY_ARCHITECTURES])
def test_watching_changes_nothing(name: str, share: float, tmp_path: Path) -> None:
    path = model_file(name, tmp_path)
    with opened(path, share, logits_all=False) as llama:
        prompt = prompt_for(llama)
        answer = greedy(llama, prompt, 8)
        expected = logits(llama, prompt, answer)
        for outputs in (False, True):
            llama.store.session.watch_routers(list(llama.index.moe_layers), outputs=outputs)
            np.testing.assert_array_equal(logits(llama, prompt, answer), expected)
        llama.store.session.watch_routers([])
        np.testing.assert_array_equal(logits(llama, prompt, answer), expected)
        plain = plain_llama(path, **{**SETTINGS, "n_ubatch": llama.plan.n_ubatch})
        np.testing.assert_array_equal(logits(plain, prompt, answer), expected)
        plain.close()


@pytest.mark.parametrize("outputs", [False, True], ids=["logits", "outputs"])
@pytest.mark.parametrize("name", [TRAINED, *TINY_ARCHITECTURES])
def test_cut_stops_early_and_leaves_the_model_as_it_was(name: str, outputs: bool, tmp_path: Path) -> None:
    path = model_file(name, tmp_path)
    with opened(path) as llama:
        prompt, session = prompt_for(llama), llama.store.session
        first, *others = llama.index.moe_layers
        session.watch_routers(list(llama.index.moe_layers), outputs)
        llama.eval(prompt)
        expected = session.take_trace(first)
        llama.reset()

        before = llama.store.stats()
        session.watch_routers(list(llama.index.moe_layers), outputs)
        session.cut_after(first)
        llama.eval(prompt)
        for found, complete in zip(session.take_trace(first), expected, strict=True):
            np.testing.assert_array_equal(found, complete)
        assert all(not len(session.take_trace(layer)[0]) for layer in others)
        after = llama.store.stats()
        if not outputs:
            assert (after.hits, after.misses) == (before.hits, before.misses)

        session.cut_after(-1)
        session.watch_routers([])
        answer = [5, 6, 7]
        found_logits = logits(llama, prompt, answer)
        plain = plain_llama(path, logits_all=True, **SETTINGS)
        np.testing.assert_array_equal(found_logits, logits(plain, prompt, answer))
        plain.close()


def test_cut_at_a_cold_start_reads_no_expert_of_the_cut_layer(tmp_path: Path) -> None:
    with opened(model_file("qwen3moe", tmp_path)) as llama:
        session = llama.store.session
        session.watch_routers([1])
        session.cut_after(1)
        llama.eval(prompt_for(llama))
        assert len(session.take_trace(1)[0]) == 40
        n_parts, n_expert = 3, 16
        assert llama.store.stats().misses <= n_parts * n_expert  # those of layer 0


def test_only_watched_layers_have_rows_and_taking_empties(tmp_path: Path) -> None:
    with opened(model_file("qwen3moe", tmp_path)) as llama:
        session = llama.store.session
        session.watch_routers([0, 2])
        llama.eval(prompt_for(llama))
        assert [session.take_trace(layer)[0].shape for layer in range(3)] == [(40, 16), (0, 0), (40, 16)]
        assert [array.shape for array in session.take_trace(0)] == [(0, 0), (0, 0), (0, 0), (0, 0), (0, 1)]
        llama.eval([5])
        assert session.take_trace(0)[0].shape == (1, 16)
        session.watch_routers([0])  # what layer 2 said is forgotten
        assert not len(session.take_trace(2)[0])


def test_last_layer_answers_only_for_tokens_whose_logits_are_asked_for(tmp_path: Path) -> None:
    with opened(model_file("qwen3moe", tmp_path), logits_all=False) as llama:
        session = llama.store.session
        session.watch_routers([0, 1, 2], outputs=True)
        llama.eval(prompt_for(llama))
        shapes = [[array.shape for array in session.take_trace(layer)] for layer in range(3)]
        assert shapes[0] == shapes[1] == [(40, 16), (40, 4), (40, 4), (40, 4), (40, 1)]
        assert shapes[2] == [(1, 16), (1, 4), (1, 4), (1, 4), (1, 1)]


def test_layers_without_experts_are_refused(tmp_path: Path) -> None:
    with opened(model_file("deepseek2", tmp_path)) as llama:
        session = llama.store.session
        for layer in (-1, 0, 3, 2**31 - 1):
            for refused in (
                lambda layer=layer: session.watch_routers([1, layer]),
                lambda layer=layer: session.keep(layer, [1]),
                lambda layer=layer: session.prefer(layer, [1]),
                lambda layer=layer: session.warm(layer, [1]),
            ):
                with pytest.raises(OSError, match=f"layer {layer} was asked for experts, but the model has none"):
                    refused()
            assert not len(session.take_trace(layer)[0])


def test_warm_experts_are_there_and_are_not_counted(tmp_path: Path) -> None:
    path = model_file("qwen3moe", tmp_path)
    with opened(path) as llama:
        prompt, store = prompt_for(llama), llama.store
        cold = logits(llama, prompt, [5])
    with opened(path) as llama:
        store = llama.store
        for layer in llama.index.moe_layers:
            store.session.prefer(layer, [0, 1])
            store.session.warm(layer, list(range(16)))
        warmed = store.stats()
        assert warmed.hits == warmed.misses == 0
        assert warmed.bytes_read > 0
        np.testing.assert_array_equal(logits(llama, prompt, [5]), cold)
        assert store.stats().misses == 0
        assert store.stats().bytes_read == warmed.bytes_read


def test_warming_more_than_the_arena_holds_says_so(tmp_path: Path) -> None:
    with opened(model_file("qwen3moe", tmp_path), 0.0) as llama:
        with pytest.raises(OSError, match="need more than the arena"):
            llama.store.session.warm(0, list(range(16)))
        llama.eval(prompt_for(llama))


def test_a_refused_mask_names_the_layer(tmp_path: Path) -> None:
    with opened(model_file("qwen3moe", tmp_path)) as llama:
        with pytest.raises(OSError, match="layer 1 has no expert 16: it has 16"):
            llama.store.session.keep(1, [0, 16])
        with pytest.raises(OSError, match="layer 1 has no expert -1: it has 16"):
            llama.store.session.keep(1, [-1])
        llama.store.session.keep(1, [3])
        with pytest.raises(StoreError, match="layer 1 uses 4 experts for each token, but fewer are kept"):
            llama.eval(prompt_for(llama))
        llama.store.session.keep(1, [])
        llama.eval(prompt_for(llama))
