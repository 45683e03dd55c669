"""Other tests build on the generated models: plain llama.cpp has to load them and decode with sense."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from tiny_architectures import TINY_ARCHITECTURES
from tiny_models import EXPERT_TENSOR, EXPERT_TYPES, WIDE, write_tiny_model

llama_cpp = pytest.importorskip("llama_cpp")

PROMPTS = (b"The cat sat on the mat.", b"0123456789 + 42 = ?")


def decode(path: Path) -> list[npt.NDArray[np.float32]]:
    """Logits (n_tokens, n_vocab) of each prompt, evaluated with plain llama-cpp-python."""
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False)
    try:
        return [evaluate(model, prompt) for prompt in PROMPTS]
    finally:
        model.close()


def evaluate(model: llama_cpp.Llama, prompt: bytes) -> npt.NDArray[np.float32]:
    model.reset()
    model.eval(model.tokenize(prompt))
    return model.scores[: model.n_tokens].copy()


def check_logits(path: Path) -> None:
    cat, digits = decode(path)
    assert np.isfinite(cat).all() and np.isfinite(digits).all()
    assert cat[-1].std() > 0.5, "flat logits: every token is as likely as any other"
    assert np.abs(cat[-1] - digits[-1]).max() > 0.5, "the prompt does not matter"
    assert len(set(np.concatenate([cat, digits]).argmax(axis=1))) > 5, "the same token whatever comes before it"


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_llama_cpp_decodes_every_architecture(name: str, tmp_path: Path) -> None:
    (path,) = write_tiny_model(tmp_path / "model.gguf", name)
    assert path.stat().st_size < 4_000_000
    check_logits(path)
    reader = gguf.GGUFReader(path)
    experts = [tensor for tensor in reader.tensors if EXPERT_TENSOR.search(tensor.name)]
    assert len(experts) >= 4
    n_expert = reader.fields[f"{name}.expert_count"].contents()
    assert {int(tensor.shape[2]) for tensor in experts} == {n_expert}


@pytest.mark.parametrize("expert_type", EXPERT_TYPES)
def test_experts_of_every_ggml_type(expert_type: str, tmp_path: Path) -> None:
    # Two experts: the search for the best codes of the I-quants takes seconds.
    dimensions = {**WIDE, "expert": 2, "used": 1}
    (path,) = write_tiny_model(tmp_path / "model.gguf", "qwen3moe", expert_type=expert_type, **dimensions)
    check_logits(path)


def test_a_split_set_decodes_like_a_single_file(tmp_path: Path) -> None:
    (single,) = write_tiny_model(tmp_path / "single.gguf", "qwen3moe")
    parts = write_tiny_model(tmp_path / "parts.gguf", "qwen3moe", split=10)
    assert [part.name for part in parts] == [f"parts-{i:05}-of-{len(parts):05}.gguf" for i in range(1, len(parts) + 1)]
    assert len(parts) > 2
    for ours, theirs in zip(decode(single), decode(parts[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (
        write_tiny_model(tmp_path / f"{i}.gguf", "olmoe", seed=seed)[0].read_bytes() for i, seed in enumerate((0, 0, 1))
    )
    assert first == again
    assert first != other


def test_rows_that_do_not_fit_a_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit q4_k blocks of 256"):
        write_tiny_model(tmp_path / "model.gguf", "qwen3moe", expert_type="q4_k")
