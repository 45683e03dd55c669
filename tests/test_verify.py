"""Two models are the same, or it is said where they differ; nothing that changes an answer goes unseen."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGUFValueType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_llama import SHARED_MODELS, TINY_MOE
from test_align import pattern_of
from test_slice import cut
from tiny_models import EXPERT_TYPES, WIDE, write_tiny_model

from edgemoe.converters.align import align
from edgemoe.converters.copied_model import SOURCE_EXPERTS, copied_tensors, write_copy
from edgemoe.converters.gguf_layout import RawValue, Value
from edgemoe.converters.stock_model import StockModel
from edgemoe.converters.verify import Verification, error_limit, verify
from edgemoe.errors import ModelFileError
from edgemoe.gguf_header import read_header
from edgemoe.index import read_index


def tiny(folder: Path, name: str = "qwen3moe", **options: object) -> Path:
    path = folder / f"{name}-{len(list(folder.iterdir()))}.gguf"
    return write_tiny_model(path, name, **options)[0]  # type: ignore[arg-type]


def changed(source: Path, output: Path, changes: dict[str, Value | RawValue | None]) -> Path:
    """A copy with other metadata; None takes a key away."""
    with StockModel(source) as model:
        metadata = {key: value for key, value in {**model.metadata, **changes}.items() if value is not None}
        return write_copy(model, output, metadata, copied_tensors(model, read_index(source)))


def other(found: Verification) -> list[tuple[str, str]]:
    return [(tensor.name, tensor.found) for tensor in found.tensors if not tensor.same]


def test_the_same_file_twice(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    found = verify(path, path)
    assert found.same and not found.keys and found.kept is None
    assert {tensor.found for tensor in found.tensors} == {"equal"}
    assert len(found.tensors) == len(read_header(path).tensors)


@pytest.mark.parametrize("split", [1, 7])
def test_parts_and_one_file(split: int, tmp_path: Path) -> None:
    assert verify(tiny(tmp_path), tiny(tmp_path, split=split)).same


def test_dense_models_are_compared_too(tmp_path: Path) -> None:
    path = tmp_path / "dense.gguf"
    with StockModel(tiny(tmp_path)) as model:
        tensors = [copy for copy in copied_tensors(model, read_index(model.files[0])) if "exps" not in copy.source.name]
        write_copy(model, path, model.metadata, tensors)
    assert verify(path, path).same


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model"))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_is_found(data: st.DataObject, model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, source = tmp_path_factory.mktemp("flipped"), model
    tensors = read_header(source).tensors
    tensor = data.draw(st.sampled_from(tensors))
    at = tensor.offset + data.draw(st.integers(0, tensor.n_bytes - 1))
    content = bytearray(source.read_bytes())
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "b.gguf").write_bytes(content)
    assert other(verify(source, folder / "b.gguf")) == [(tensor.name, "other bytes")]


def test_other_weights(tmp_path: Path) -> None:
    found = verify(tiny(tmp_path), tiny(tmp_path, seed=1))
    assert not found.same
    differing = [tensor for tensor in found.tensors if not tensor.same]
    assert len(differing) == len(found.tensors)
    matrices = [tensor.error for tensor in differing if tensor.name.endswith(("_q.weight", "_exps.weight"))]
    assert all(error is not None and 1.3 < error < 1.5 for error in matrices)


def test_missing_tensors_and_other_shapes(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    with StockModel(source) as model:
        copies = copied_tensors(model, read_index(source))
        fewer = write_copy(model, tmp_path / "fewer.gguf", model.metadata, copies[1:])
    name = copies[0].source.name
    assert other(verify(source, fewer)) == [(name, "missing in the second")]
    assert other(verify(fewer, source)) == [(name, "missing in the first")]
    found = other(verify(source, tiny(tmp_path, ff_exp=48)))
    assert ("blk.0.ffn_up_exps.weight", "shape [64, 32, 16] and [64, 48, 16]") in found


# Quantizing to the smaller I-quants takes seconds.
@pytest.mark.parametrize(
    "expert_type", ["f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_k", "q4_0", "q4_k", "q3_k", "q2_k", "iq4_nl", "mxfp4"]
)
def test_quantized_experts_are_within_their_error(expert_type: str, tmp_path: Path) -> None:
    source = tiny(tmp_path, **WIDE)
    quantized = tiny(tmp_path, expert_type=expert_type, **WIDE)
    found = verify(source, quantized)
    assert found.same, other(found)
    errors = [tensor for tensor in found.tensors if tensor.error is not None]
    assert len(errors) == 9
    for tensor in errors:
        assert tensor.found == "within the quantization error"
        assert tensor.limit == pytest.approx(error_limit(0) + error_limit(EXPERT_TYPES[expert_type]))
    unrelated = verify(tiny(tmp_path, seed=1, **WIDE), quantized)
    assert sum(tensor.found == "beyond the quantization error" for tensor in unrelated.tensors) == 9


def test_experts_in_another_order_are_beyond_any_quantization_error(tmp_path: Path) -> None:
    source, ordered = tiny(tmp_path, expert_type="f16"), tmp_path / "ordered.gguf"
    align(source, ordered, pattern=pattern_of(source))
    plain = changed(ordered, tmp_path / "plain.gguf", {SOURCE_EXPERTS: None})
    found = verify(tiny(tmp_path), plain)
    assert {what for name, what in other(found) if name.endswith("exps.weight")} == {"beyond the quantization error"}


def test_types_that_nobody_can_compare(tmp_path: Path) -> None:
    wide = {**WIDE, "expert": 4}
    found = verify(tiny(tmp_path, **wide), tiny(tmp_path, expert_type="q2_0", **wide))
    assert {what for _, what in other(found)} == {"types or weights that cannot be compared"}
    same = tiny(tmp_path, expert_type="q2_0", **wide)
    assert verify(same, same).same


def test_ordered_and_sliced_models_are_compared_by_their_former_numbers(tmp_path: Path) -> None:
    source = tiny(tmp_path, "glm4moe")
    align(source, tmp_path / "ordered.gguf", pattern=pattern_of(source))
    cut(source, tmp_path / "sliced.gguf", "8")
    for path in (tmp_path / "ordered.gguf", tmp_path / "sliced.gguf"):
        found = verify(source, path)
        assert found.same and found.kept, other(found)
        unrelated = verify(tiny(tmp_path, "glm4moe", seed=1), path)
        assert not unrelated.same and unrelated.kept is None


def test_a_slice_of_an_ordered_model_is_compared_with_that(tmp_path: Path) -> None:
    source, ordered = tiny(tmp_path), tmp_path / "ordered.gguf"
    align(source, ordered, pattern=pattern_of(source))
    cut(ordered, tmp_path / "sliced.gguf", "8")
    assert verify(ordered, tmp_path / "sliced.gguf").kept == (8, 16)
    assert verify(ordered, tmp_path / "sliced.gguf").same
    assert not verify(source, tmp_path / "sliced.gguf").same
    with StockModel(ordered) as model:
        again = write_copy(model, tmp_path / "copy.gguf", model.metadata, copied_tensors(model, read_index(ordered)))
    found = verify(ordered, again)
    assert found.same and found.kept is None


def test_a_false_numbering_is_found(tmp_path: Path) -> None:
    source, sliced = tiny(tmp_path), tmp_path / "sliced.gguf"
    cut(source, sliced, "8")
    with StockModel(sliced) as model:
        numbers = model.integers(SOURCE_EXPERTS)
    assert numbers is not None
    false = Value([numbers[1], numbers[0], *numbers[2:]], Kind.ARRAY, Kind.INT32)
    found = verify(source, changed(sliced, tmp_path / "false.gguf", {SOURCE_EXPERTS: false}))
    names = {f"blk.0.ffn_{part}.weight" for part in ("gate_inp", "gate_exps", "up_exps", "down_exps")}
    assert {name for name, _ in other(found)} == names


@pytest.mark.parametrize(
    ("key", "value", "matters"),
    [
        ("qwen3moe.rope.dimension_count", Value(8, Kind.UINT32), True),
        ("qwen3moe.context_length", Value(512, Kind.UINT64), True),
        ("qwen3moe.context_length", None, True),
        ("qwen3moe.new_key", Value(1.5, Kind.FLOAT32), True),
        ("tokenizer.chat_template", Value("other", Kind.STRING), True),
        ("tokenizer.ggml.tokens", Value(["a"] * 288, Kind.ARRAY, Kind.STRING), True),
        ("general.architecture", Value("qwen3vlmoe", Kind.STRING), True),
        ("general.name", Value("other", Kind.STRING), False),
        ("general.file_type", Value(7, Kind.UINT32), False),
        ("edgemoe.anything", Value(True, Kind.BOOL), False),
    ],
)
def test_metadata(key: str, value: Value | None, matters: bool, tmp_path: Path) -> None:
    source = tiny(tmp_path)
    found = verify(source, changed(source, tmp_path / "b.gguf", {key: value}))
    assert [(difference.key, difference.matters) for difference in found.keys] == [(key, matters)]
    assert found.same == (not matters)
    assert not other(found)


def test_nan_is_never_the_same(tmp_path: Path) -> None:
    source = tiny(tmp_path)
    tensor = next(tensor for tensor in read_header(source).tensors if tensor.name == "blk.1.attn_q.weight")
    content = bytearray(source.read_bytes())
    content[tensor.offset : tensor.offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(content)
    found = verify(tiny(tmp_path, expert_type="f16"), tmp_path / "nan.gguf")
    assert other(found) == [("blk.1.attn_q.weight", "other bytes")]


@pytest.mark.skipif(not SHARED_MODELS.exists(), reason="needs the other quantizations of the embedded model")
def test_a_trained_model_in_two_quantizations() -> None:
    found = verify(TINY_MOE, SHARED_MODELS / "tiny-moe-q8_0.gguf")
    assert found.same
    assert sum(tensor.error is not None for tensor in found.tensors) == 57


def test_memory_is_bounded(tmp_path: Path) -> None:
    wide = {**WIDE, "ff_exp": 512}
    source, other_type = tiny(tmp_path, **wide), tiny(tmp_path, expert_type="q8_0", **wide)
    assert source.stat().st_size > 18 << 20
    tracemalloc.start()
    assert verify(source, other_type).same and verify(source, source).same
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 << 20


def test_bad_input(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    with pytest.raises(ModelFileError, match="does not exist"):
        verify(path, tmp_path / "gone.gguf")
    with pytest.raises(ModelFileError, match="does not exist"):
        verify(tmp_path / "gone.gguf", path)


def test_progress(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    path = tiny(tmp_path)
    verify(path, path, on_progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] and steps == sorted(steps)


def test_a_verdict_is_all_of_it(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    found = verify(path, path)
    tensors = (replace(found.tensors[0], same=False), *found.tensors[1:])
    assert found.same and not replace(found, tensors=tensors).same
