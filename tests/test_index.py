from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import pytest
from gguf_bytes import (
    I32,
    TYPE_F16,
    TYPE_F32,
    TYPE_FUTURE,
    TYPE_Q2_0,
    TYPE_Q8_0,
    U16,
    TensorBytes,
    array,
    expert_byte,
    gguf_bytes,
    moe_metadata,
    moe_tensors,
    number,
)

from edgemoe.cli.inspect import summary
from edgemoe.errors import ModelFileError, NotMoEError, UnknownArchitectureError
from edgemoe.index import ExpertIndex, ExpertTensor, Tensor, read_index
from edgemoe.memory import page_size

TINY_MOE = Path(__file__).parents[2] / "shared" / "models" / "tiny-moe"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a model, by default the small one of `gguf_bytes`."""

    def write_file(
        metadata: Mapping[str, object] | None = None,
        tensors: Sequence[TensorBytes] | None = None,
        **layout: int,
    ) -> Path:
        path = tmp_path / "model.gguf"
        metadata = moe_metadata() if metadata is None else metadata
        path.write_bytes(gguf_bytes(metadata, moe_tensors() if tensors is None else tensors, **layout))
        return path

    return write_file


def refusal(path: Path, kind: type[ModelFileError] = ModelFileError) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_index(path)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert str(path) in message and message.isprintable() and len(message) < len(str(path)) + 300
    return message


def check_slabs(index: ExpertIndex, parts: Sequence[str]) -> None:
    """Every expert's slab holds the byte that `moe_tensors` put there, and nothing else."""
    contents = [path.read_bytes() for path in index.files]
    seen = set()
    for tensor in index.experts:
        for expert in range(tensor.n_expert):
            start = tensor.offset + expert * tensor.slab_bytes
            slab = contents[tensor.file][start : start + tensor.slab_bytes]
            expected = expert_byte(tensor.layer, parts.index(tensor.part), expert)
            assert slab == bytes([expected]) * tensor.slab_bytes
            seen.add(expected)
    assert len(seen) == sum(tensor.n_expert for tensor in index.experts)


@pytest.mark.parametrize(
    ("parts", "kind", "one_expert"),
    [
        (("gate", "up", "down"), TYPE_F32, 3 * 64 * 64 * 4),
        (("down", "gate_up"), TYPE_F16, 3 * 64 * 64 * 2),
        (("up", "down"), TYPE_Q8_0, 2 * 64 * 2 * 34),
    ],
)
@pytest.mark.parametrize("alignment", [32, 4096])
def test_every_expert_is_where_the_index_says(
    parts: Sequence[str], kind: int, one_expert: int, alignment: int, write: Write
) -> None:
    metadata = moe_metadata() | {"general.alignment": alignment}
    index = read_index(write(metadata, moe_tensors(parts=parts, kind=kind), alignment=alignment))
    check_slabs(index, parts)
    assert index.moe_layers == (1, 2)
    assert [index.expert_size(layer) for layer in index.moe_layers] == [one_expert, one_expert]
    assert index.token_cycle_bytes == 2 * 2 * one_expert
    assert index.expert_bytes == 2 * 4 * one_expert
    assert index.dense_bytes == 64 * 10 * 4 + 2 * 64 * 4 * 4
    assert index.file_bytes == index.path.stat().st_size
    assert {(t.layer, t.part, t.n_expert) for t in index.experts} == {(i, p, 4) for i in (1, 2) for p in parts}
    assert [t.name for t in index.tensors] == [
        "token_embd.weight", "blk.1.ffn_gate_inp.weight", "blk.2.ffn_gate_inp.weight",
    ]  # fmt: skip
    with pytest.raises(KeyError):
        index.expert_size(0)


def test_a_model_with_everything_stated(write: Write) -> None:
    metadata = moe_metadata(expert_used_count=[0, 1, 4], leading_dense_block_count=1, vocab_size=10) | {
        "general.file_type": 7,
        "tokenizer.chat_template": "{{ messages }}",
    }
    path = write(metadata)
    index = read_index(str(path))
    assert (index.path, index.files, index.architecture, index.name) == (path, (path,), "qwen3moe", "small")
    assert (index.n_layer, index.n_expert, index.n_expert_used) == (3, 4, (0, 1, 4))
    assert (index.leading_dense, index.context_length, index.n_vocab, index.n_embd) == (1, 128, 10, 64)
    assert index.has_chat_template and index.skipped == ()
    assert index.token_cycle_bytes == (1 + 4) * index.expert_size(1)
    assert index.metadata["qwen3moe.expert_used_count"] == (0, 1, 4)


@pytest.mark.parametrize(
    ("file_type", "expected"),
    [
        (0, "F32"), (7, "Q8_0"), (15, "Q4_K - Medium"), (14, "Q4_K - Small"), (13, "Q3_K - Large"),
        (18, "Q6_K"), (10, "Q2_K"), (30, "IQ4_XS"), (27, "IQ3_M"), (1024 | 15, "Q4_K - Medium"), (38, "MXFP4_MOE"),
        (32, "BF16"), (999, "F16"), (None, "F16"), ("x", "F16"), (True, "F16"),
    ],
)  # fmt: skip
def test_quantization_is_the_stated_or_the_dominating_one(file_type: object, expected: str, write: Write) -> None:
    metadata = moe_metadata() | ({} if file_type is None else {"general.file_type": file_type})
    assert read_index(write(metadata, moe_tensors(kind=TYPE_F16))).quantization == expected


@pytest.mark.parametrize(("kind", "name"), [(TYPE_Q2_0, "Q2_0"), (TYPE_FUTURE, "type 99")])
def test_a_type_unknown_to_gguf_is_no_obstacle(kind: int, name: str, write: Write) -> None:
    parts = ("gate", "up", "down")
    index = read_index(write(None, moe_tensors(kind=kind)))
    check_slabs(index, parts)
    assert {t.type_name for t in index.experts} == {index.quantization} == {name}


def test_an_unknown_type_with_fewer_rows_than_the_alignment_has_no_certain_size(write: Write) -> None:
    tensors = moe_tensors(layers=(1,))
    tensors[-1] = TensorBytes("blk.1.ffn_down_exps.weight", (32, 4, 4), 99, bytes(4 * 4 * 11))
    assert "cannot be divided among 4 experts" in refusal(write(None, tensors))


def test_names_that_only_look_like_expert_tensors_are_dense(write: Write) -> None:
    lookalikes = [
        "blk.1.ffn_gate_exps.bias", "blk.1.ffn_down_exps.scale", "blk.1.ffn_up_exps.input_scale",
        "blk.1.ffn_up_chexps.weight", "blk.1.ffn_norm_exps.weight", "v.blk.1.ffn_up_exps.weight",
        "blk.01.ffn_up_exps.weight", "blk.1.ffn_up_exps.weight.x", "blk.1.ffn_up_shexp.weight",
    ]  # fmt: skip
    tensors = moe_tensors() + [TensorBytes(name, (8, 2, 3)) for name in lookalikes]
    index = read_index(write(None, tensors))
    assert {t.name for t in index.tensors} >= set(lookalikes)
    assert len(index.experts) == 6


def test_aligned_slabs_is_the_share_on_page_boundaries(write: Write) -> None:
    page = page_size()
    metadata = moe_metadata() | {"general.alignment": page}
    one_and_a_half, two = (page // 8, 3, 4), (page // 8, 4, 4)
    tensors = [
        TensorBytes("blk.1.ffn_up_exps.weight", one_and_a_half),  # experts 0 and 2 start on a page
        TensorBytes("blk.1.ffn_down_exps.weight", two),
    ]
    assert read_index(write(metadata, tensors, alignment=page)).aligned_slabs == 6 / 8
    tensors.insert(0, TensorBytes("dense", (8,)))
    assert read_index(write(moe_metadata(), tensors, alignment=32)).aligned_slabs == 0.0


# What is not loaded


def test_trailing_prediction_layers_are_skipped(write: Write) -> None:
    metadata = moe_metadata("glm4moe", nextn_predict_layers=1)
    head = TensorBytes("blk.2.nextn.embed_tokens.weight", (64, 10))
    index = read_index(write(metadata, [*moe_tensors(), head]))
    assert (index.n_layer, index.moe_layers, index.n_expert_used) == (2, (1,), (2, 2))
    assert set(index.skipped) == {
        "blk.2.ffn_gate_inp.weight", "blk.2.ffn_gate_exps.weight", "blk.2.ffn_up_exps.weight",
        "blk.2.ffn_down_exps.weight", "blk.2.nextn.embed_tokens.weight",
    }  # fmt: skip
    assert index.dense_bytes == 64 * 10 * 4 + 64 * 4 * 4


@pytest.mark.parametrize("arch", ["step35", "hy_v3", "cohere2moe"])
def test_some_architectures_load_the_prediction_head_anyway(arch: str, write: Write) -> None:
    heads = [TensorBytes(f"blk.2.nextn.{n}.weight", (64, 10)) for n in ("embed_tokens", "shared_head_head", "eh_proj")]
    index = read_index(write(moe_metadata(arch, nextn_predict_layers=1), [*moe_tensors(), *heads]))
    assert {t.name for t in index.tensors if "nextn" in t.name} == {heads[0].name, heads[1].name}
    assert heads[2].name in index.skipped and index.moe_layers == (1,)


def test_deepseek4_without_its_prediction_head_runs_all_layers(write: Write) -> None:
    metadata = moe_metadata("deepseek4", nextn_predict_layers=1)
    assert read_index(write(metadata)).moe_layers == (1, 2)
    head = TensorBytes("blk.2.nextn.eh_proj.weight", (64, 10))
    assert read_index(write(metadata, [*moe_tensors(), head])).moe_layers == (1,)


def test_a_file_of_prediction_layers_alone(write: Write) -> None:
    metadata = moe_metadata("glm4moe", nextn_predict_layers=1)
    message = refusal(write(metadata, moe_tensors(layers=(2,))), NotMoEError)
    assert "next-token-prediction" in message and "main model" in message


# What is refused


@pytest.mark.parametrize("arch", ["llama", "qwen3", "clip", "granitemoe"])
@pytest.mark.parametrize("metadata", [{}, {"expert_count": 0}])
def test_a_dense_model(arch: str, metadata: dict[str, object], write: Write) -> None:
    keys = {"general.architecture": arch} | {f"{arch}.{key}": item for key, item in metadata.items()}
    message = refusal(write(keys, [TensorBytes("blk.0.ffn_gate.weight", (8, 8))]), NotMoEError)
    assert message.endswith(
        f"is a dense model (architecture {arch}, no expert tensors); edgemoe is for Mixture-of-Experts models,"
        " run it with plain llama.cpp"
    )


def test_one_tensor_per_expert_is_a_layout_of_the_past(write: Write) -> None:
    tensors = [TensorBytes(f"blk.0.ffn_{part}.{i}.weight", (8, 8)) for part in ("gate", "up", "down") for i in range(4)]
    message = refusal(write(moe_metadata("llama"), tensors))
    assert "llama.cpp itself no longer reads" in message and "convert the model again" in message


def test_an_unknown_architecture(write: Write) -> None:
    assert "'gpt5moe'" in refusal(write(moe_metadata("gpt5moe")), UnknownArchitectureError)


def replaced(name: str, shape: Sequence[int], kind: int = TYPE_F32) -> list[TensorBytes]:
    """The small model's tensors with one of another shape."""
    return [TensorBytes(name, shape, kind) if t.name == name else t for t in moe_tensors()]


def without(*names: str) -> list[TensorBytes]:
    return [t for t in moe_tensors() if t.name not in names]


@pytest.mark.parametrize(
    ("metadata", "tensors", "expected"),
    [
        (moe_metadata(expert_count=None), None, "has no qwen3moe.expert_count"),
        (moe_metadata(expert_count=0, expert_used_count=0), None, "expert_count '0'"),
        (moe_metadata(expert_count=8), None, "shape (64, 64, 4), expected three dimensions, the last of 8"),
        (moe_metadata(expert_count=3), None, "the last of 3 experts"),
        (None, replaced("blk.2.ffn_up_exps.weight", (64, 64, 3)), "ffn_up_exps.weight of shape (64, 64, 3)"),
        (None, replaced("blk.2.ffn_up_exps.weight", (64, 256)), "three dimensions"),
        (None, replaced("blk.2.ffn_up_exps.weight", (64, 32, 4, 2)), "three dimensions"),
        (None, without("blk.2.ffn_down_exps.weight"), "no tensor blk.2.ffn_down_exps.weight"),
        (None, without("blk.1.ffn_up_exps.weight"), "no tensor blk.1.ffn_up_exps.weight"),
        (moe_metadata(block_count=2), None, "blk.2.ffn_gate_exps.weight but says it has 2 layers"),
        (moe_metadata(expert_used_count=[2, 2, 0]), None, "a layer said to use 0 experts"),
        ({}, None, "has no general.architecture"),
        (None, [], "no expert tensors"),
    ],
)  # fmt: skip
def test_models_that_contradict_themselves(
    metadata: dict[str, object] | None, tensors: list[TensorBytes] | None, expected: str, write: Write
) -> None:
    path = write(metadata, tensors)
    assert expected in refusal(path, NotMoEError if tensors == [] else ModelFileError)


def test_a_damaged_file_is_refused_by_its_header(write: Write) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut short" in refusal(path)
    assert "does not exist" in refusal(path.with_name("gone.gguf"))


# Split models


@pytest.mark.parametrize("per_part", [1, 2, 3, 5])
def test_a_split_model_has_the_experts_of_the_whole(per_part: int, write: Write, tmp_path: Path) -> None:
    whole, tensors = read_index(write()), moe_tensors()
    pieces = [tensors[i : i + per_part] for i in range(0, len(tensors), per_part)]
    paths = [tmp_path / f"m-{i + 1:05}-of-{len(pieces):05}.gguf" for i in range(len(pieces))]
    for i, (path, piece) in enumerate(zip(paths, pieces, strict=True)):
        keys: dict[str, object] = {
            "split.no": number(U16, i),
            "split.count": number(U16, len(pieces)),
            "split.tensors.count": number(I32, len(tensors)),
        }
        path.write_bytes(gguf_bytes(keys | (moe_metadata() if i == 0 else {}), piece))
    split = read_index(paths[0])
    check_slabs(split, ("gate", "up", "down"))
    assert split.files == tuple(paths)
    assert [(t.name, t.n_bytes) for t in split.experts] == [(t.name, t.n_bytes) for t in whole.experts]
    assert [t.name for t in split.tensors] == [t.name for t in whole.tensors]
    assert split.file_bytes == sum(path.stat().st_size for path in paths)
    assert (split.expert_bytes, split.dense_bytes) == (whole.expert_bytes, whole.dense_bytes)
    paths[-1].unlink()
    assert f"{paths[-1]} is missing" in refusal(paths[0])


# Against other readers and writers


def check_against_gguf(index: ExpertIndex) -> None:
    """Same tensors, places and sizes as the gguf package finds."""
    tensors: list[Tensor | ExpertTensor] = [*index.tensors, *index.experts]
    found = {t.name: (t.offset, t.n_bytes, t.shape, t.ggml_type) for t in tensors}
    expected = {
        t.name: (int(t.data_offset), int(t.n_bytes), tuple(map(int, t.shape)), int(t.tensor_type))
        for t in gguf.GGUFReader(index.path).tensors
    }
    assert found.keys() | set(index.skipped) == expected.keys()
    assert not found.keys() & set(index.skipped)
    assert found == {name: expected[name] for name in found}
    pattern = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight")
    assert {t.name for t in index.experts} == {name for name in found if pattern.fullmatch(name)}
    for tensor in index.experts:
        assert tensor.slab_bytes * tensor.n_expert == tensor.n_bytes
        assert tensor.shape[2] == tensor.n_expert == index.n_expert


@pytest.mark.parametrize("name", ["tiny-moe-q4_k_m.gguf", "tiny-moe-q8_0.gguf"])
def test_a_real_model(name: str) -> None:
    if not (TINY_MOE / name).exists():
        pytest.skip(f"{TINY_MOE / name} is not here")
    index = read_index(TINY_MOE / name)
    check_against_gguf(index)
    assert (index.architecture, index.n_layer, index.n_expert, index.n_expert_used) == (
        "qwen3moe",
        8,
        32,
        (4,) * 8,
    )
    assert index.quantization == ("Q8_0" if "q8" in name else "Q4_K - Medium")
    assert (index.n_vocab, index.n_embd, index.context_length, index.has_chat_template) == (
        4096,
        256,
        512,
        True,
    )
    if "q8" in name:
        assert index.expert_size(0) == 3 * 256 * 256 * 34 // 32
        assert index.token_cycle_bytes == 8 * 4 * index.expert_size(0)


def test_every_architecture_of_the_tiny_models(tmp_path: Path) -> None:
    architectures = pytest.importorskip("tiny_architectures").TINY_ARCHITECTURES
    write_tiny_model = pytest.importorskip("tiny_models").write_tiny_model
    for name in architectures:
        (path,) = write_tiny_model(tmp_path / f"{name}.gguf", name)
        index = read_index(path)
        check_against_gguf(index)
        assert index.architecture == name and index.experts and json.dumps(summary(index))
        path.unlink()


def test_summary_is_json_and_adds_up(write: Write) -> None:
    index = read_index(write(moe_metadata() | {"general.file_type": 1}, moe_tensors(kind=TYPE_F16)))
    document = summary(index)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["types"] == {"dense": {"F32": 3}, "experts": {"F16": 6}}
    assert document["one_expert_bytes"] == {"min": 24576, "max": 24576}
    assert document["n_expert_used"] == 2 and document["moe_layers"] == [1, 2]
    assert document["token_cycle_bytes"] == 2 * 2 * 24576
    assert document["files"] == [str(index.path)] and document["quantization"] == "F16"
    per_layer = read_index(write(moe_metadata(expert_used_count=array(I32, [0, 1, 3]))))
    assert summary(per_layer)["n_expert_used"] == [1, 3]


def test_importing_the_index_is_cheap() -> None:
    code = (
        "import sys, edgemoe.index; sys.exit(any(m in sys.modules for m in ('numpy', 'gguf', 'psutil', 'llama_cpp')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_random_damage_is_refused_or_leaves_every_slab_in_its_file(tmp_path: Path) -> None:
    sound = gguf_bytes(moe_metadata(), [TensorBytes(t.name, (2, 2, 4)) for t in moe_tensors() if "exps" in str(t.name)])
    rng = random.Random(3)
    path = tmp_path / "m-00001-of-00002.gguf"
    fates = set()
    for _ in range(3000):
        damaged = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(4, 900)
            damaged[at : at + rng.choice((0, 1, 1, 4, 8))] = rng.choice(
                (b"\0", b"\xff", b"\x02", rng.randbytes(4), bytes(8))
            )
        path.write_bytes(damaged)
        try:
            index = read_index(path)
        except ModelFileError as error:
            assert str(error).isprintable()
            fates.add("refused")
            continue
        fates.add("read")
        assert index.token_cycle_bytes > 0 and json.dumps(summary(index))
        for tensor in index.experts:
            assert tensor.slab_bytes * index.n_expert == tensor.n_bytes > 0
            assert 0 < tensor.offset <= len(damaged) - tensor.n_bytes
    assert fates == {"read", "refused"}
