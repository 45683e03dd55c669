"""Parity of every family: a checkpoint of transformers, converted, gives transformers' logits in plain llama.cpp.

With float32 weights both compute the same up to the order of additions, so the tolerance is 1e-4 of the largest logit
(found: 2.5e-5 for Qwen3-Next, at most 5e-6 for the others). llama.cpp multiplies float16 weights by activations rounded
to float16, after which a router may fall to the other of two nearly equal experts: there the tolerance, 3e-3, is for
the median token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_llama import Logits, greedy, logits, plain_llama
from tiny_checkpoints import CONFIGS, config_of, random_model, save_checkpoint, torch_logits

from edgemoe.converters.checkpoint import Checkpoint
from edgemoe.converters.families import family_of
from edgemoe.converters.hf_to_gguf import convert_checkpoint
from edgemoe.index import read_index

pytest.importorskip("transformers", reason="the other implementation, for comparison")

PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, 256, 24)]
N_TOKENS = 64


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make the checkpoint of a family once: its folder and its model."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str) -> tuple[Path, Any]:
        if family not in made:
            model = random_model(config_of(family))
            made[family] = save_checkpoint(model, tmp_path_factory.mktemp(family)), model
        return made[family]

    return make


def answers(path: Path, model: Any) -> tuple[Logits, Logits]:
    """Logits of llama.cpp and of transformers along llama.cpp's greedy answer, [1 + N_TOKENS, n_vocab] each."""
    llama = plain_llama(path, n_ctx=256, n_batch=64, n_threads=2, type_k=0, type_v=0)
    answer = greedy(llama, PROMPT, N_TOKENS)
    ours = logits(llama, PROMPT, answer)
    llama.close()
    return ours, torch_logits(model, PROMPT + answer)[len(PROMPT) - 1 :]


@pytest.mark.parametrize("family", CONFIGS)
def test_parity_in_float32(family: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, model = checkpoints(family)
    convert_checkpoint(folder, tmp_path / "model.gguf", "f32")
    ours, theirs = answers(tmp_path / "model.gguf", model)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    # Each token is the likeliest to both, so both would have answered the same.
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).all()
    with Checkpoint(folder) as checkpoint:
        assert read_index(tmp_path / "model.gguf").n_expert == family_of(checkpoint).n_expert


@pytest.mark.parametrize("family", ["mixtral", "deepseek3", "gpt-oss", "lfm2moe"])
def test_parity_in_float16(family: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, model = checkpoints(family)
    convert_checkpoint(folder, tmp_path / "model.gguf", "f16")
    ours, theirs = answers(tmp_path / "model.gguf", model)
    each = np.abs(ours - theirs).max(axis=1) / np.abs(theirs).max()
    assert np.median(each) < 3e-3
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.95
