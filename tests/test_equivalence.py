"""The promise of the project: at every budget the logits are those of plain llama.cpp, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from plain_llama import TINY_MOE, arena_share, greedy, logits, plain_llama
from tiny_models import EXPERT_TYPES, TINY_ARCHITECTURES, WIDE, write_tiny_model

from edgemoe import plan
from edgemoe.backend import Llama
from edgemoe.memory import page_size

SHARES = {"everything": 1.0, "most": 0.75, "half": 0.5, "quarter": 0.25, "floor": 0.0}
N_DECODED = 200
# One thread: two of them wait for each other at every node, which on a busy machine costs more than it gains.
SETTINGS = {"n_ctx": 320, "n_threads": 1, "n_threads_batch": 1, "seed": 1}


def assert_same_logits(path: Path, share: float, n_decoded: int, io: str = "auto", prompt_length: int = 96) -> None:
    with arena_share(share), Llama(str(path), io=io, **SETTINGS) as ours:
        n_ubatch = ours.plan.n_ubatch
        generator = np.random.default_rng(3)
        prompt = generator.integers(4, ours.n_vocab(), prompt_length).tolist()
        plain = plain_llama(path, n_ubatch=n_ubatch, **SETTINGS)
        answer = greedy(plain, prompt, n_decoded)
        expected = logits(plain, prompt, answer)
        plain.close()
        found = logits(ours, prompt, answer)
        stats = ours.store.stats()
        if share == SHARES["most"]:
            sizes = {tensor.slab_bytes for tensor in ours.index.experts}
            if len(sizes) == 1:
                assert ours.store.session.in_slots() == (sizes.pop() % page_size() == 0)
        if plan.TABLE_SHARE == 0 and ours.index.token_table is not None:
            assert ours.plan.rows_bytes > 0
    assert np.isfinite(expected).all()
    assert float(np.abs(found - expected).max()) == 0.0
    assert expected.std() > 1e-3, "a model whose logits are all alike proves nothing"
    assert stats.peak_bytes <= stats.arena_bytes
    if share < 1.0:
        assert stats.evictions > 0


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_every_architecture_at_every_budget(architecture: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"{architecture}.gguf"
    write_tiny_model(path, architecture)
    assert_same_logits(path, share, N_DECODED)


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())
def test_trained_model_at_every_budget(share: float) -> None:
    assert_same_logits(TINY_MOE, share, N_DECODED)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_every_architecture_looks_its_tokens_up(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table is read by rows, however small it is."""
    monkeypatch.setattr(plan, "TABLE_SHARE", 0)
    path = tmp_path / f"{architecture}.gguf"
    write_tiny_model(path, architecture)
    assert_same_logits(path, 0.25, 24)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_every_architecture_lends_what_batches_are_computed_in(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and answer twice: memory of the first prompt goes to experts, and back for the second."""
    monkeypatch.setattr(plan, "SCATTERED_BYTES", 0)
    path = tmp_path / f"{architecture}.gguf"
    write_tiny_model(path, architecture)
    prompt = np.random.default_rng(4).integers(4, 200, 64).tolist()
    with arena_share(0.75), Llama(str(path), n_ubatch=16, **SETTINGS) as ours:
        plain = plain_llama(path, n_ubatch=ours.plan.n_ubatch, **SETTINGS)
        answer = greedy(plain, prompt, 24)
        expected = logits(plain, prompt, answer)
        plain.close()
        for _ in range(2):
            np.testing.assert_array_equal(logits(ours, prompt, answer), expected)
        stats = ours.store.stats()
        if ours.store.session.in_slots():
            assert ours.plan.lent_bytes > 0
            assert stats.peak_bytes > ours.plan.arena_bytes + ours.plan.spared_bytes
        assert stats.peak_bytes <= stats.arena_bytes


@pytest.mark.parametrize("io", ["direct", "mmap", "pread"])
def test_rows_of_tokens_come_and_go(io: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LEAST_ROWS", 4)
    path = tmp_path / "model.gguf"
    write_tiny_model(path, "qwen3moe", **WIDE)
    tokens = np.random.default_rng(1).integers(4, 288, 300).tolist()
    with arena_share(0.25), Llama(str(path), io=io, n_ubatch=4, **SETTINGS) as ours:
        table = ours.index.token_table
        assert table is not None
        assert 0 < ours.plan.rows_bytes < table.n_bytes / 2
        found = logits(ours, tokens[:100], tokens[100:])
        looked_up = ours.store.stats().dense_bytes - ours.store.load_bytes
        assert looked_up > ours.plan.rows_bytes, "no row had to leave"
        n_ubatch = ours.plan.n_ubatch  # narrowed to fit
    with Llama(str(path), io=io, ram="4GiB", n_ubatch=n_ubatch, **SETTINGS) as held:
        assert held.plan.rows_bytes == 0
        assert np.array_equal(found, logits(held, tokens[:100], tokens[100:]))
        assert held.store.stats().dense_bytes == held.store.load_bytes == held.index.dense_bytes


@pytest.mark.parametrize("io", ["direct", "mmap", "pread"])
def test_every_io_mode(io: str) -> None:
    assert_same_logits(TINY_MOE, 0.25, 64, io=io)


@pytest.mark.parametrize("expert_type", EXPERT_TYPES)
def test_every_quantization_type(expert_type: str, tmp_path: Path) -> None:
    path = tmp_path / f"{expert_type}.gguf"
    write_tiny_model(path, "qwen3moe", expert_type=expert_type, **WIDE)
    assert_same_logits(path, 0.5, 16, prompt_length=24)
