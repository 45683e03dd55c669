from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import TYPE_F16, TYPE_F32, TYPE_Q8_0, TensorBytes, gguf_bytes, moe_metadata, moe_tensors
from tiny_models import write_tiny_model

from edgemoe.errors import ModelFileError, PatternError
from edgemoe.fingerprint import MAX_NAME, ModelFingerprint, fingerprint
from edgemoe.index import read_index

REPOSITORY = Path(__file__).parents[1]
TINY_MOE = REPOSITORY.parent / "shared" / "models" / "tiny-moe"
MODEL = ModelFingerprint("a" * 64, "b" * 64, "qwen3moe", "small", "Q8_0", (1, 2), 4, (2, 2))


def of(path: Path) -> ModelFingerprint:
    return fingerprint(read_index(path))


def write(path: Path, tensors: Sequence[TensorBytes], **metadata: Any) -> Path:
    path.write_bytes(gguf_bytes(moe_metadata() | metadata, tensors))
    return path


def with_router(tensors: Sequence[TensorBytes], layer: int, **changes: Any) -> list[TensorBytes]:
    name = f"blk.{layer}.ffn_gate_inp.weight"
    return [replace(t, **changes) if t.name == name else t for t in tensors]


def test_quantizations_of_the_same_weights_share_their_router(tmp_path: Path) -> None:
    plain, small, other = (
        of(write_tiny_model(tmp_path / f"{number}.gguf", "qwen3moe", expert_type=kind, seed=seed)[0])
        for number, (kind, seed) in enumerate([("f32", 0), ("q8_0", 0), ("q8_0", 1)])
    )
    assert plain.router == small.router and plain.quantization != small.quantization
    assert other.router != small.router and other.quantization == small.quantization


def test_the_tiny_moe_is_the_same_in_both_quantizations() -> None:
    if not TINY_MOE.is_dir():
        pytest.skip("needs the shared models")
    q8, q4 = of(TINY_MOE / "tiny-moe-q8_0.gguf"), of(TINY_MOE / "tiny-moe-q4_k_m.gguf")
    assert q8.router == q4.router and q8.quantization != q4.quantization
    assert of(REPOSITORY / "models" / "tiny-moe-q4_k_m.gguf") == q4
    assert (q4.layers, q4.n_expert, q4.n_expert_used) == (tuple(range(8)), 32, (4,) * 8)


def test_a_split_or_repacked_model_stays_the_same(tmp_path: Path) -> None:
    (single,) = write_tiny_model(tmp_path / "single.gguf", "qwen3moe")
    parts = write_tiny_model(tmp_path / "parts.gguf", "qwen3moe", split=10)
    assert of(single) == of(parts[0])
    tensors = moe_tensors()
    renamed = {"general.author": "somebody", "general.name": "other"}
    before, after = of(write(tmp_path / "a.gguf", tensors)), of(write(tmp_path / "b.gguf", tensors[::-1], **renamed))
    assert (before.router, before.quantization) == (after.router, after.quantization)


@pytest.mark.parametrize("layer", [1, 2])
def test_one_byte_of_a_router_makes_another_model(tmp_path: Path, layer: int) -> None:
    tensors = moe_tensors()
    changed = with_router(tensors, layer, data=bytes(64 * 4 * 4 - 1) + b"\1")
    assert of(write(tmp_path / "a.gguf", tensors)).router != of(write(tmp_path / "b.gguf", changed)).router


@pytest.mark.parametrize("name", ["blk.1.ffn_norm.weight", "blk.2.attn_q_norm.weight", "output_norm.weight"])
def test_norms_tell_models_apart(tmp_path: Path, name: str) -> None:
    one, two = (
        of(write(tmp_path / "a.gguf", [*moe_tensors(), TensorBytes(name, (64,), TYPE_F32, bytes([byte]) * 256)])).router
        for byte in (1, 2)
    )
    assert one != two


@pytest.mark.parametrize("name", ["blk.0.ffn_norm.weight", "blk.1.attn_q.weight"])
def test_other_tensors_are_not_read(tmp_path: Path, name: str) -> None:
    one, two = (
        of(
            write(tmp_path / "a.gguf", [*moe_tensors(), TensorBytes(name, (64, 2), TYPE_F32, bytes([byte]) * 512)])
        ).router
        for byte in (1, 2)
    )
    assert one == two


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_used_count": 1},
        {"expert_group_count": 2, "expert_group_used_count": 1},
        {"expert_gating_func": 2},
        {"expert_weights_norm": True},
    ],
)
def test_routing_facts_tell_models_apart(tmp_path: Path, changes: dict[str, Any]) -> None:
    keys = {f"qwen3moe.{key}": value for key, value in changes.items()}
    plain, other = write(tmp_path / "a.gguf", moe_tensors()), write(tmp_path / "b.gguf", moe_tensors(), **keys)
    assert of(plain).router != of(other).router


def test_types_and_shapes_make_the_quantization(tmp_path: Path) -> None:
    kinds = [of(write(tmp_path / "a.gguf", moe_tensors(kind=kind))) for kind in (TYPE_F16, TYPE_Q8_0)]
    assert kinds[0].router == kinds[1].router and kinds[0].quantization != kinds[1].quantization


def test_a_router_of_another_type_makes_another_model(tmp_path: Path) -> None:
    tensors = moe_tensors()
    half = with_router(tensors, 1, kind=TYPE_F16)
    assert of(write(tmp_path / "a.gguf", tensors)).router != of(write(tmp_path / "b.gguf", half)).router


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", moe_tensors())
    index = read_index(path)
    router = next(tensor for tensor in index.tensors if tensor.name == "blk.2.ffn_gate_inp.weight")
    os.truncate(path, router.offset + 10)
    with pytest.raises(ModelFileError, match=r"a\.gguf ends within tensor blk\.2\.ffn_gate_inp\.weight"):
        fingerprint(index)
    path.unlink()
    with pytest.raises(ModelFileError, match="cannot be read: No such file"):
        fingerprint(index)


def test_names_are_printable_and_short(tmp_path: Path) -> None:
    assert len(of(write(tmp_path / "a.gguf", moe_tensors(), **{"general.name": "x" * 500})).name) == MAX_NAME
    nameless = write(tmp_path / "\x1b[2J.gguf", moe_tensors(), **{"general.name": ""})
    assert of(nameless).name == "?[2J"
    assert str(MODEL) == "small (qwen3moe, 2 x 4 experts)"


@pytest.mark.parametrize(
    "change",
    [
        {"router": "a" * 63},
        {"quantization": "A" * 64},
        {"name": "x\n"},
        {"architecture": "\N{RIGHT-TO-LEFT OVERRIDE}"},
        {"quantization_name": "x" * (MAX_NAME + 1)},
        {"layers": ()},
        {"layers": (2, 1)},
        {"layers": (-1, 2)},
        {"layers": (1, 10**9)},
        {"n_expert": 0},
        {"n_expert": 1 << 20},
        {"n_expert_used": (2,)},
        {"n_expert_used": (2, 5)},
        {"n_expert_used": (0, 2)},
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PatternError):
        replace(MODEL, **change)
