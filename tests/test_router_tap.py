"""Traces of a running model: whole batches, all that was asked for, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plain_llama import arena_share, logits
from tiny_models import write_tiny_model

from edgemoe.backend import Llama
from edgemoe.errors import TraceError
from edgemoe.router_tap import RouterTap, trace_memory
from edgemoe.trace import ExpertOutputs, RouterTrace

# A prompt of 100 tokens is two decodes of up to 64, each in graphs of up to 16.
SETTINGS = {"n_ctx": 128, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "seed": 1}
PROMPT = np.random.default_rng(3).integers(4, 250, 100).tolist()


def model_file(name: str, folder: Path) -> Path:
    (path,) = write_tiny_model(folder / f"{name}.gguf", name)
    return path


@contextmanager
def opened(path: Path, share: float = 1.0, **changes: object) -> Iterator[Llama]:
    with arena_share(share), Llama(str(path), **{**SETTINGS, "logits_all": True, **changes}) as llama:
        yield llama


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_file("qwen3moe", tmp_path_factory.mktemp("tap"))


def watched(llama: Llama, tokens: list[int] = PROMPT, **options: Any) -> list[RouterTrace]:
    """Traces of these tokens, evaluated in an empty context."""
    traces: list[RouterTrace] = []
    llama.reset()
    with llama.tap.watch(traces.append, **options):
        llama.eval(tokens)
    return traces


def arrays(trace: RouterTrace) -> list[np.ndarray]:
    outputs = trace.outputs
    return [trace.logits, *(getattr(outputs, field.name) for field in fields(ExpertOutputs) if outputs)]


def test_each_decode_hands_on_one_trace(qwen: Path) -> None:
    with opened(qwen) as llama:
        first, second = watched(llama, outputs=True)
        assert first.layers == second.layers == llama.index.moe_layers
        assert (first.logits.shape, second.logits.shape) == ((3, 64, 16), (3, 36, 16))
        assert first.outputs is not None and first.outputs.ids.shape == (3, 64, 4)
        session = llama.store.session
        session.watch_routers(list(llama.index.moe_layers), True)
        llama.reset()
        llama.eval(PROMPT)
        for row, layer in enumerate(llama.index.moe_layers):
            logits, ids, weights, norms, change = session.take_trace(layer)
            for name, native in {"ids": ids, "weights": weights, "norms": norms, "change": change[:, 0]}.items():
                joined = np.concatenate([getattr(trace.outputs, name)[row] for trace in (first, second)])
                np.testing.assert_array_equal(joined, native)
            np.testing.assert_array_equal(np.concatenate([first.logits[row], second.logits[row]]), logits)


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2", "gpt-oss", "granitehybrid", "nemotron_h_moe", "gemma4"])
def test_cut_and_uncut_traces_are_equal(name: str, tmp_path: Path) -> None:
    with opened(model_file(name, tmp_path)) as llama:
        for outputs in (False, True):
            whole, cut = watched(llama, outputs=outputs), watched(llama, outputs=outputs, cut=True)
            assert len(whole) == len(cut) == 2
            for a, b in zip(whole, cut, strict=True):
                assert a.layers == b.layers == llama.index.moe_layers
                for one, other in zip(arrays(a), arrays(b), strict=True):
                    np.testing.assert_array_equal(one, other)


def test_traces_do_not_depend_on_the_arena(qwen: Path) -> None:
    found = []
    for share in (1.0, 0.0):
        with opened(qwen, share, n_ubatch=1) as llama:
            found.append(watched(llama, outputs=True))
            assert (llama.store.stats().evictions > 0) is (share == 0.0)
    for a, b in zip(*found, strict=True):
        for one, other in zip(arrays(a), arrays(b), strict=True):
            np.testing.assert_array_equal(one, other)


def test_layers_that_choose_fewer_experts_are_padded(tmp_path: Path) -> None:
    with opened(model_file("nemotron_h_moe", tmp_path)) as llama:
        assert [llama.index.n_expert_used[layer] for layer in llama.index.moe_layers] == [4, 2]
        (outputs, _) = (trace.outputs for trace in watched(llama, outputs=True))
        assert outputs is not None and outputs.ids.shape == (2, 64, 4)
        assert (outputs.ids[0] >= 0).all() and (outputs.ids[1, :, :2] >= 0).all()
        assert (outputs.ids[1, :, 2:] == -1).all()
        assert (outputs.weights[1, :, 2:] == 0).all() and (outputs.norms[1, :, 2:] == 0).all()


def test_the_first_router_alone_needs_no_expert(qwen: Path) -> None:
    with opened(qwen, logits_all=False) as llama:
        (first, *_) = watched(llama, layers=llama.index.moe_layers[:1], cut=True)
        assert first.layers == (0,) and first.logits.shape == (1, 64, 16)
        assert llama.store.stats().bytes_read == 0


def test_running_layers_see_every_token_without_logits_of_all(tmp_path: Path) -> None:
    for name, running in (("qwen3moe", (0, 1)), ("deepseek2", (1,)), ("jamba", (1,)), ("llama4", (1,))):
        with opened(model_file(name, tmp_path), logits_all=False) as llama:
            assert llama.index.running_layers == running
            assert [trace.logits.shape[1] for trace in watched(llama, layers=running)] == [64, 36]


def test_layers_that_saw_fewer_tokens_are_named(qwen: Path) -> None:
    """llama.cpp computes the last layer for the tokens whose logits are wanted only."""
    with opened(qwen, logits_all=False) as llama, pytest.raises(TraceError, match=r"layer 2 of .* routed \d+ of 64"):
        watched(llama)


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2"])
def test_nothing_is_watched_or_cut_afterwards(name: str, tmp_path: Path) -> None:
    def fail(_: RouterTrace) -> None:
        raise ZeroDivisionError

    with opened(model_file(name, tmp_path)) as llama:
        expected = logits(llama, PROMPT, [5, 6])
        seen: list[RouterTrace] = []
        with llama.tap.watch(seen.append, llama.index.moe_layers[:1], cut=True):
            llama.reset()
            llama.eval(PROMPT)
        assert len(seen) == 2
        np.testing.assert_array_equal(logits(llama, PROMPT, [5, 6]), expected)
        with pytest.raises(ZeroDivisionError), llama.tap.watch(fail, llama.index.moe_layers[:1], cut=True):
            llama.reset()
            llama.eval(PROMPT)
        np.testing.assert_array_equal(logits(llama, PROMPT, [5, 6]), expected)
        assert len(seen) == 2
        assert all(not len(llama.store.session.take_trace(layer)[0]) for layer in llama.index.moe_layers)


def test_experts_that_show_no_outputs_are_named(qwen: Path) -> None:
    """No architecture is known to hide them; a session that does stands in."""

    class Session:
        def watch_routers(self, layers: list[int], outputs: bool) -> None: ...

        def cut_after(self, layer: int) -> None: ...

        def take_trace(self, layer: int) -> list[np.ndarray]:
            return [np.zeros((3, 16), np.float32), *(np.zeros((0, 0), np.float32) for _ in range(3)), np.zeros((0, 1))]

    with opened(qwen) as llama:
        store: Any = SimpleNamespace(session=Session())
        tap = RouterTap(store, llama.index)
    with (
        pytest.raises(TraceError, match=r"layer 0 of .*\(qwen3moe\) does not show what its experts give"),
        tap.watch(lambda _: None, outputs=True),
    ):
        tap.drain()


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("name", ["qwen3moe", "nemotron_h_moe"])
def test_the_plan_counts_what_a_batch_takes(name: str, outputs: bool, tmp_path: Path) -> None:
    """Twice while it is handed over: natively, and in numpy."""
    with opened(model_file(name, tmp_path)) as llama:
        trace, _ = watched(llama, outputs=outputs)
        line = trace_memory(llama.index, 64, outputs=outputs)
    held = sum(array.nbytes for array in arrays(trace))
    assert 2 * held <= line.bytes <= 6 * held
