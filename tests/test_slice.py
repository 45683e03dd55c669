"""A sliced file is, logit for logit, the model whose routing is limited to the same experts."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from plain_llama import greedy, logits, plain_llama
from sliced_model import slice_model
from test_align import PROMPT, pattern_of
from test_masked_routing import (
    F32_CACHE,
    LIMITED,
    SETTINGS,
    TRAINED,
    UNLIMITED,
    keep,
    model_file,
    opened,
    tolerance,
)
from tiny_models import write_tiny_model

from edgemoe.converters.align import align
from edgemoe.converters.copied_model import SOURCE_CRITERION, SOURCE_EXPERTS, SOURCE_ROUTER, SOURCE_TASK
from edgemoe.converters.slice import plan_slice
from edgemoe.converters.stock_model import StockModel
from edgemoe.errors import EdgemoeError
from edgemoe.expert_set import ExpertSet
from edgemoe.fingerprint import fingerprint
from edgemoe.index import read_index
from edgemoe.keep import Keep

N_DECODED = 8


def cut(source: Path, output: Path, kept: str, **options: object) -> ExpertSet:
    """Slice a model to a random task's experts; the file is as large as was said before."""
    with StockModel(source) as model:
        planned = plan_slice(model, read_index(source), pattern_of(source), Keep.parse(kept))
        planned.write(output, **options)  # type: ignore[arg-type]
    assert output.stat().st_size == planned.file_size
    return planned.chosen


def half(path: Path) -> int:
    return read_index(path).n_expert // 2


def refusal(source: Path, output: Path, kept: str, **options: object) -> str:
    with pytest.raises(EdgemoeError) as caught:
        cut(source, output, kept, **options)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


def masked_logits(source: Path, chosen: ExpertSet, answer: list[int], **settings: object) -> np.ndarray:
    with opened(source, **F32_CACHE, **settings) as llama:
        keep(llama, {layer: list(ids) for layer, ids in zip(chosen.layers, chosen.kept, strict=True)})
        return logits(llama, PROMPT, answer)


@pytest.mark.parametrize("name", [TRAINED, *LIMITED])
def test_sliced_is_masked(name: str, tmp_path: Path) -> None:
    source, output = model_file(name, tmp_path), tmp_path / "sliced.gguf"
    chosen = cut(source, output, str(half(source)))
    assert set(chosen.sizes) == {half(source)}
    sliced = plain_llama(output, **SETTINGS, **F32_CACHE)
    answer = greedy(sliced, PROMPT, N_DECODED)
    expected = logits(sliced, PROMPT, answer)
    sliced.close()
    assert np.isfinite(expected).all()
    found = masked_logits(source, chosen, answer)
    assert np.abs(found - expected).max() <= tolerance(name) * np.abs(expected).max()
    index = read_index(output)
    assert index.n_expert == half(source) and index.moe_layers == chosen.layers


@pytest.mark.parametrize("name", [TRAINED, *LIMITED])
def test_as_the_reference_slicer(name: str, tmp_path: Path) -> None:
    """The tests' own slicer, made with the gguf package, gives the same tensors."""
    source = model_file(name, tmp_path)
    chosen = cut(source, tmp_path / "sliced.gguf", str(half(source)))
    slice_model(source, tmp_path / "expected.gguf", dict(zip(chosen.layers, chosen.kept, strict=True)))
    found, expected = gguf.GGUFReader(tmp_path / "sliced.gguf"), gguf.GGUFReader(tmp_path / "expected.gguf")
    assert [t.name for t in found.tensors] == [t.name for t in expected.tensors]
    for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
        assert ours.tensor_type == theirs.tensor_type
        np.testing.assert_array_equal(ours.data, theirs.data)
    ours = {key: field.contents() for key, field in found.fields.items() if not key.startswith(("GGUF.", "edgemoe."))}
    theirs = {key: field.contents() for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    name = ours.pop("general.name")
    assert name.startswith(theirs.pop("general.name", "")) and name.endswith(f" (code {chosen})")
    assert ours == theirs


@pytest.mark.parametrize(("name", "kept"), [("qwen3moe", "4"), ("gpt-oss", "1/2"), ("deepseek2", "8"), ("llama4", "1")])
def test_sliced_model_in_the_runtime(name: str, kept: str, tmp_path: Path) -> None:
    """Down to as many experts as a token uses: where all experts are used, the top-k is a plain tensor."""
    output = tmp_path / "sliced.gguf"
    cut(model_file(name, tmp_path), output, kept)
    with opened(output) as llama:
        answer = greedy(llama, PROMPT, N_DECODED)
        found, n_ubatch = logits(llama, PROMPT, answer), llama.plan.n_ubatch
    plain = plain_llama(output, **{**SETTINGS, "n_ubatch": n_ubatch})
    np.testing.assert_array_equal(found, logits(plain, PROMPT, answer))
    plain.close()


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2", "gpt-oss"])
def test_fewer_active_experts(name: str, tmp_path: Path) -> None:
    source, output = model_file(name, tmp_path), tmp_path / "sliced.gguf"
    chosen = cut(source, output, "3/8")
    before, index = read_index(source), read_index(output)
    assert index.n_expert == 8
    assert index.n_expert_used == tuple(min(3, k) for k in before.n_expert_used)
    sliced = plain_llama(output, **SETTINGS, **F32_CACHE)
    answer = greedy(sliced, PROMPT, N_DECODED)
    expected = logits(sliced, PROMPT, answer)
    sliced.close()
    found = masked_logits(source, chosen, answer, kv_overrides={f"{before.architecture}.expert_used_count": 3})
    assert np.abs(found - expected).max() <= tolerance(name) * np.abs(expected).max()


def test_active_experts_of_each_layer(tmp_path: Path) -> None:
    source, output = model_file("nemotron_h_moe", tmp_path), tmp_path / "sliced.gguf"
    cut(source, output, "3/8")
    assert read_index(source).n_expert_used == (0, 0, 4, 2)
    assert read_index(output).n_expert_used == (0, 0, 3, 2)


def test_groups_are_cut_alike(tmp_path: Path) -> None:
    source, output = write_tiny_model(tmp_path / "m.gguf", "deepseek2")[0], tmp_path / "sliced.gguf"
    chosen = cut(source, output, "8")
    for ids in chosen.kept:
        assert np.bincount(np.array(ids) // 4, minlength=4).tolist() == [2, 2, 2, 2]
    index = read_index(output)
    assert (index.n_expert_group, index.n_group_used) == (4, 2)
    assert "in 4 equal groups; give a multiple of 4" in refusal(source, tmp_path / "o.gguf", "10")


@pytest.mark.parametrize("split", [None, 3])
def test_provenance(split: int | None, tmp_path: Path) -> None:
    source, output = write_tiny_model(tmp_path / "m.gguf", "qwen3moe", split=split)[0], tmp_path / "sliced.gguf"
    chosen, model = cut(source, output, "4/8"), fingerprint(read_index(source))
    stated = read_index(output).metadata
    assert (stated[SOURCE_ROUTER], stated[SOURCE_TASK], stated[SOURCE_CRITERION]) == (model.router, "code", "peu")
    with StockModel(output) as sliced:
        assert sliced.integers(SOURCE_EXPERTS) == tuple(expert for ids in chosen.kept for expert in ids)
        assert not [key for key in sliced.metadata if key.startswith("split.")]


def test_an_aligned_source_stays_aligned(tmp_path: Path) -> None:
    source, output = write_tiny_model(tmp_path / "m.gguf", "qwen3moe")[0], tmp_path / "sliced.gguf"
    align(source, tmp_path / "aligned.gguf")
    cut(tmp_path / "aligned.gguf", output, "8")
    index = read_index(output)  # which refuses an index of experts that does not hold
    assert "edgemoe.experts.offsets" in index.metadata
    assert all(tensor.offset % 16384 == 0 for tensor in index.experts)


def test_bad_input(tmp_path: Path) -> None:
    source, output = write_tiny_model(tmp_path / "m.gguf", "qwen3moe")[0], tmp_path / "sliced.gguf"
    assert "has 16 experts in a layer; give at most that many" in refusal(source, output, "17")
    assert "a token activates 4 experts; give at least 4" in refusal(source, output, "3")
    assert "5 active experts were asked of a model that uses 4" in refusal(source, output, "5/8")
    assert "activates more experts than it keeps" in refusal(source, output, "4/3")
    assert "is what is to be converted" in refusal(source, source, "8", force=True)
    assert not output.exists()
    output.write_bytes(b"mine")
    assert "exists already" in refusal(source, output, "8")
    assert output.read_bytes() == b"mine"


@pytest.mark.parametrize("name", UNLIMITED)
def test_experts_that_are_tied_to_their_numbers(name: str, tmp_path: Path) -> None:
    assert "ties experts to their numbers" in refusal(model_file(name, tmp_path), tmp_path / "s.gguf", "8")
