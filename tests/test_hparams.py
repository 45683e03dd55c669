from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_bytes import F32, U32, U64, Raw, array, gguf_bytes, moe_metadata, number

from edgemoe.errors import ModelFileError, UnknownArchitectureError
from edgemoe.gguf_header import GGUFHeader, read_header
from edgemoe.hparams import _NEWER_ARCHITECTURES, HParams, read_architecture, read_hparams


def header(folder: Path, metadata: dict[str, object]) -> GGUFHeader:
    path = folder / "file-stem.gguf"
    path.write_bytes(gguf_bytes(metadata))
    return read_header(path)


def hparams(folder: Path, arch: str = "qwen3moe", names: Collection[str] = (), **changes: Any) -> HParams:
    return read_hparams(header(folder, moe_metadata(arch, **changes)), arch, set(names))


def test_what_every_moe_model_states(tmp_path: Path) -> None:
    assert hparams(tmp_path) == HParams(
        name="small", n_layer_all=3, n_layer=3, n_expert=4, n_expert_used=(2, 2, 2), n_expert_shared=0,
        n_expert_group=0, n_group_used=0, leading_dense=0, context_length=128, n_vocab=0, n_embd=64,
        has_chat_template=False,
    )  # fmt: skip


def test_what_some_models_state(tmp_path: Path) -> None:
    read = hparams(
        tmp_path,
        expert_shared_count=1,
        expert_group_count=2,
        expert_group_used_count=1,
        leading_dense_block_count=1,
        vocab_size=77,
        context_length=number(U64, 1 << 20),
    )
    assert (read.n_expert_shared, read.n_expert_group, read.n_group_used, read.leading_dense) == (1, 2, 1, 1)
    assert (read.n_vocab, read.context_length) == (77, 1 << 20)


def test_the_vocabulary_counts_before_the_stated_size(tmp_path: Path) -> None:
    metadata = moe_metadata(vocab_size=77) | {
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "tokenizer.chat_template": "{{ x }}",
    }
    read = read_hparams(header(tmp_path, metadata), "qwen3moe", set())
    assert read.n_vocab == 3 and read.has_chat_template


@pytest.mark.parametrize(
    ("name", "expected"),
    [("", "file-stem"), (7, "file-stem"), ("\x1b[31mred\n", "[31mred"), ("Größe", "Größe")],
)
def test_names_are_safe_to_print(name: object, expected: str, tmp_path: Path) -> None:
    metadata = moe_metadata() | {"general.name": name}
    assert read_hparams(header(tmp_path, metadata), "qwen3moe", set()).name == expected


def test_experts_used_may_differ_by_layer(tmp_path: Path) -> None:
    assert hparams(tmp_path, expert_used_count=[0, 1, 4]).n_expert_used == (0, 1, 4)
    assert hparams(tmp_path, expert_used_count=array(U32, [1, 2, 3])).n_expert_used == (1, 2, 3)


def test_trailing_prediction_layers_are_not_run(tmp_path: Path) -> None:
    read = hparams(tmp_path, nextn_predict_layers=1, expert_used_count=[0, 1, 4])
    assert (read.n_layer, read.n_layer_all, read.n_expert_used) == (2, 3, (0, 1))


def test_deepseek4_runs_them_when_their_head_was_left_out(tmp_path: Path) -> None:
    assert hparams(tmp_path, "deepseek4", nextn_predict_layers=1).n_layer == 3
    assert hparams(tmp_path, "deepseek4", ["blk.2.nextn.eh_proj.weight"], nextn_predict_layers=1).n_layer == 2
    assert hparams(tmp_path, "deepseek32", nextn_predict_layers=1).n_layer == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"block_count": None}, "has no qwen3moe.block_count"),
        ({"block_count": 0}, "block_count '0', expected an integer from 1 to 512"),
        ({"block_count": 513}, "block_count '513'"),
        ({"block_count": True}, "block_count 'True'"),
        ({"block_count": number(F32, 3)}, "block_count '3.0'"),
        ({"block_count": [3]}, "block_count '(3,)'"),
        ({"block_count": "3\x1b[2J"}, r"block_count '3\x1b[2J'"),
        ({"block_count": Raw(8, (9999).to_bytes(8, "little") + b"x" * 9999)}, "block_count 'xxx"),
        ({"nextn_predict_layers": 4}, "nextn_predict_layers '4', expected an integer from 0 to 3"),
        ({"expert_count": None}, "has no qwen3moe.expert_count"),
        ({"expert_count": 0}, "expert_count '0', expected an integer from 1 to 1024"),
        ({"expert_count": 1025}, "expert_count '1025'"),
        ({"expert_count": 2**32 - 1}, "expert_count"),
        ({"expert_used_count": None}, "has no qwen3moe.expert_used_count"),
        ({"expert_used_count": 0}, "expert_used_count '0', expected an integer from 1 to 4"),
        ({"expert_used_count": 5}, "expert_used_count '5'"),
        (
            {"expert_used_count": [2, 2]},
            "has 2 values of qwen3moe.expert_used_count, expected one for each of 3 layers",
        ),
        ({"expert_used_count": []}, "has 0 values"),
        ({"expert_used_count": [0, 0, 0]}, "0 in every layer"),
        ({"expert_used_count": [1, 2, 5]}, "expert_used_count '5'"),
        ({"expert_used_count": [1, 2, -1]}, "expert_used_count '-1'"),
        ({"expert_used_count": array(F32, [1, 2, 2])}, "expert_used_count '1.0'"),
        ({"expert_used_count": ["a", "b", "c"]}, "expert_used_count"),
        ({"expert_group_count": 4}, "expert_group_count '4', expected an integer from 0 to 3"),
        ({"expert_group_count": 3, "expert_group_used_count": 1}, "4 experts by 1 of 3 groups"),
        ({"expert_group_count": 2}, "4 experts by 0 of 2 groups"),
        ({"expert_group_count": 2, "expert_group_used_count": 2}, "4 experts by 2 of 2 groups"),
        ({"context_length": None}, "has no qwen3moe.context_length"),
        ({"context_length": 0}, "context_length '0'"),
        ({"context_length": number(U64, 1 << 32)}, "context_length"),
        ({"embedding_length": None}, "has no qwen3moe.embedding_length"),
    ],
)
def test_what_llama_cpp_would_abort_on_is_refused(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        hparams(tmp_path, **changes)
    message = str(caught.value)
    assert expected in message and message.isprintable() and "; " in message and "file-stem.gguf" in message
    assert len(message) < len(str(tmp_path)) + 250


def test_architectures(tmp_path: Path) -> None:
    for arch in ("qwen3moe", "deepseek4", "hy_v3", "gpt-oss", "llama"):
        assert read_architecture(header(tmp_path, {"general.architecture": arch})) == arch
    for arch in ("gpt5", "", "(unknown)", "Llama", "llama ", "x\x1b"):
        with pytest.raises(UnknownArchitectureError) as caught:
            read_architecture(header(tmp_path, {"general.architecture": arch}))
        assert ascii(arch) in str(caught.value)
    for metadata in ({}, {"general.architecture": 3}):
        with pytest.raises(ModelFileError, match=r"has no general\.architecture text"):
            read_architecture(header(tmp_path, dict(metadata)))


def test_architectures_beyond_gguf_are_beyond_gguf() -> None:
    assert not _NEWER_ARCHITECTURES & set(gguf.MODEL_ARCH_NAMES.values())
