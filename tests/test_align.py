"""An aligned model is the same model: same bytes, same logits; experts in another order are the same up to rounding."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import TYPE_FUTURE, gguf_bytes, moe_metadata, moe_tensors
from plain_llama import TINY_MOE, greedy, logits, plain_llama
from test_masked_routing import F32_CACHE, LIMITED, SETTINGS, TRAINED, UNLIMITED, model_file, opened, tolerance
from tiny_models import TINY_ARCHITECTURES, write_tiny_model
from tiny_patterns import tiny_pattern

from edgemoe.converters.align import ALIGNMENT, align, hot_first, renumbered_pattern
from edgemoe.converters.verify import verify
from edgemoe.errors import ConvertError, EdgemoeError, ModelFileError
from edgemoe.expert_offsets import OFFSETS, STRIDES
from edgemoe.expert_set import ExpertLayers
from edgemoe.fingerprint import fingerprint
from edgemoe.gguf_header import read_header
from edgemoe.index import ExpertIndex, read_index
from edgemoe.pattern import Pattern
from edgemoe.patterns import PatternStore

PROMPT = [7, 60, 5, 40, 33, 128, 90, 12, 200, 17]
N_DECODED = 8


def pattern_of(path: Path, seed: int = 0) -> Pattern:
    """A random task of a model."""
    return tiny_pattern("code", fingerprint(read_index(path)), seed=seed, measured=False)


def refusal(source: Path, output: Path, **options: object) -> str:
    with pytest.raises(EdgemoeError) as caught:
        align(source, output, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


def expert_bytes(index: ExpertIndex) -> dict[tuple[int, str, int], bytes]:
    """Bytes of every expert's part, from where the index says they are: (layer, part, expert)."""
    contents = [path.read_bytes() for path in index.files]
    return {
        (tensor.layer, tensor.part, i): contents[tensor.file][start : start + tensor.slab_bytes]
        for tensor in index.experts
        for i in range(tensor.n_expert)
        for start in [tensor.offset + i * tensor.slab_bytes]
    }


@pytest.mark.parametrize(
    ("name", "split"), [*((name, None) for name in TINY_ARCHITECTURES), ("qwen3moe", 4), ("gpt-oss", 1)]
)
def test_aligned_file_holds_the_same_model(name: str, split: int | None, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "m.gguf", name, split=split)[0]
    before, output = read_index(source), tmp_path / "aligned.gguf"
    after = align(source, output)
    assert verify(source, output).same
    header = read_header(output)
    assert header.alignment == ALIGNMENT and all(t.offset % ALIGNMENT == 0 for t in header.tensors)
    assert "split.count" not in header.metadata
    assert expert_bytes(after) == expert_bytes(before)
    in_file = [tensor.layer for tensor in after.experts]
    assert in_file == sorted(in_file), "tensors of a layer lie together"
    reader = gguf.GGUFReader(output)
    assert reader.alignment == ALIGNMENT and len(reader.tensors) == len(header.tensors)


def test_the_stored_index_finds_every_expert(tmp_path: Path) -> None:
    """As another program would use it: with the documented keys and nothing else that is ours."""
    source = write_tiny_model(tmp_path / "m.gguf", "gpt-oss")[0]
    align(source, tmp_path / "aligned.gguf")
    reader = gguf.GGUFReader(tmp_path / "aligned.gguf")
    offsets, strides = (reader.fields[key].contents() for key in (OFFSETS, STRIDES))
    names = [tensor.name for tensor in reader.tensors if tensor.name.endswith("_exps.weight")]
    assert len(names) == len(offsets) == len(strides) == 9
    content = (tmp_path / "aligned.gguf").read_bytes()
    stacks = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    for name, offset, stride in zip(names, offsets, strides, strict=True):
        for i, expert in enumerate(stacks[name]):
            start = reader.data_offset + offset + i * stride
            assert content[start : start + stride] == expert.tobytes()


@pytest.mark.parametrize("name", [TRAINED, "gpt-oss", "deepseek2", "nemotron_h_moe", "glm4moe", "qwen35moe"])
def test_logits_are_identical(name: str, tmp_path: Path) -> None:
    source, output = model_file(name, tmp_path), tmp_path / "aligned.gguf"
    align(source, output)
    found = []
    for path in (source, output):
        plain = plain_llama(path, **SETTINGS)
        answer = greedy(plain, PROMPT, N_DECODED)
        found.append([logits(plain, PROMPT, answer)])
        plain.close()
        for share in (1.0, 0.0):
            with opened(path, share) as llama:
                found[-1].append(logits(llama, PROMPT, answer))
    np.testing.assert_array_equal(*found)


def difference(first: Path, second: Path) -> float:
    """The largest difference between the logits of two models, as a part of the largest logit."""
    found = []
    for path in (first, second):
        plain = plain_llama(path, **SETTINGS, **F32_CACHE)
        found.append(logits(plain, PROMPT, [9, 8, 7, 200]))
        plain.close()
    return float(np.abs(found[0] - found[1]).max() / np.abs(found[0]).max())


@pytest.mark.parametrize("name", [TRAINED, *LIMITED])
def test_ordered_experts_are_the_same_model(name: str, tmp_path: Path) -> None:
    """Up to the last bits of a softmax, and what becomes of them in the layers behind: `tolerance`."""
    source, output = model_file(name, tmp_path), tmp_path / "ordered.gguf"
    pattern = pattern_of(source)
    align(source, output, pattern=pattern)
    assert difference(source, output) <= tolerance(name)
    found = verify(source, output)
    assert found.same and found.kept == (read_index(source).n_expert,) * 2


def test_the_best_experts_lie_side_by_side(tmp_path: Path) -> None:
    source, output = write_tiny_model(tmp_path / "m.gguf", "qwen3moe")[0], tmp_path / "ordered.gguf"
    pattern = pattern_of(source)
    after = expert_bytes(align(source, output, pattern=pattern))
    before = expert_bytes(read_index(source))
    for (layer, part, rank), found in after.items():
        assert found == before[layer, part, int(pattern.rankings[pattern.layers.index(layer), rank])]


def test_groups_keep_their_experts(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "m.gguf", "deepseek2")[0]
    pattern, layers = pattern_of(source), ExpertLayers.of(read_index(source))
    assert layers.n_group == 4
    for layer, order in hot_first(pattern, layers).items():
        rank = {int(expert): i for i, expert in enumerate(pattern.rankings[pattern.layers.index(layer)])}
        for group in range(4):
            mine = order[4 * group : 4 * group + 4]
            assert {expert // 4 for expert in mine} == {group}
            assert [rank[expert] for expert in mine] == sorted(rank[expert] for expert in mine)


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2"])
def test_pattern_with_the_new_numbers(name: str, tmp_path: Path) -> None:
    source, output = write_tiny_model(tmp_path / "m.gguf", name)[0], tmp_path / "ordered.gguf"
    pattern, before = pattern_of(source), read_index(source)
    after = align(source, output, pattern=pattern)
    found = renumbered_pattern(pattern, before, after)
    order = np.array(list(hot_first(pattern, ExpertLayers.of(before)).values()))
    np.testing.assert_array_equal(np.take_along_axis(order, found.rankings.astype(int), 1), pattern.rankings)
    for criterion, scores in pattern.scores.items():
        np.testing.assert_array_equal(found.scores[criterion], np.take_along_axis(scores, order, 1))
    np.testing.assert_array_equal(found.documents.shares[3, 1], pattern.documents.shares[3, 1][order[1]])
    with pytest.raises(EdgemoeError, match="not those of"):
        PatternStore(fingerprint(after), tmp_path).save(pattern)
    store = PatternStore(fingerprint(after), tmp_path)
    store.save(found)
    np.testing.assert_array_equal(store.load("code").rankings, found.rankings)


@pytest.mark.parametrize("name", UNLIMITED)
def test_experts_that_are_tied_to_their_numbers(name: str, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "m.gguf", name)[0]
    assert "ties experts to their numbers" in refusal(source, tmp_path / "o.gguf", pattern=pattern_of(source))
    assert not list(tmp_path.glob("o.gguf*"))


def test_nothing_to_gain(tmp_path: Path) -> None:
    align(TINY_MOE, tmp_path / "aligned.gguf")
    assert "already" in refusal(tmp_path / "aligned.gguf", tmp_path / "again.gguf")
    align(tmp_path / "aligned.gguf", tmp_path / "ordered.gguf", pattern=pattern_of(TINY_MOE))
    assert verify(tmp_path / "aligned.gguf", tmp_path / "ordered.gguf").same


def test_bad_input(tmp_path: Path) -> None:
    source, output = write_tiny_model(tmp_path / "m.gguf", "qwen3moe")[0], tmp_path / "o.gguf"
    assert "does not exist" in refusal(tmp_path / "gone.gguf", output)
    assert "is what is to be converted" in refusal(source, source, force=True)
    (tmp_path / "text").write_text("no model")
    assert "is not a GGUF file" in refusal(tmp_path / "text", output)
    dense = tmp_path / "dense.gguf"
    dense.write_bytes(gguf_bytes(moe_metadata(), moe_tensors()[:1]))
    assert "dense model" in refusal(dense, output)
    future = tmp_path / "future.gguf"
    future.write_bytes(gguf_bytes(moe_metadata(), moe_tensors(kind=TYPE_FUTURE)))
    assert "type 99, which this edgemoe does not know" in refusal(future, output)
    assert not list(tmp_path.glob("o.gguf*"))
    output.write_bytes(b"mine")
    assert "exists already" in refusal(source, output)
    assert output.read_bytes() == b"mine"
    align(source, output, force=True)
    assert verify(source, output).same


def damaged(path: Path, key: str, number: int) -> Path:
    """The file with another number in a stored array of uint64."""
    start, _ = read_header(path).value_ranges[key]
    content = bytearray(path.read_bytes())
    at = start + 16 + 8 * number
    content[at : at + 8] = (int.from_bytes(content[at : at + 8], "little") + 32).to_bytes(8, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("key", "number"), [(OFFSETS, 0), (OFFSETS, 5), (STRIDES, 8)])
def test_an_index_that_disagrees_is_refused(key: str, number: int, tmp_path: Path) -> None:
    align(write_tiny_model(tmp_path / "m.gguf", "qwen3moe")[0], tmp_path / "a.gguf")
    with pytest.raises(
        ModelFileError, match=rf"disagrees with its 9 expert tensors: {key} says \d+ for .* {number + 1}"
    ):
        read_index(damaged(tmp_path / "a.gguf", key, number))


def test_progress_goes_up_to_the_whole(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    align(TINY_MOE, tmp_path / "a.gguf", on_progress=lambda done, total: steps.append((done, total)))
    done = [step for step, _ in steps]
    assert done == sorted(done) and len({total for _, total in steps}) == 1 and steps[-1][0] == steps[-1][1]


def test_memory_is_bounded(tmp_path: Path) -> None:
    tracemalloc.start()
    align(TINY_MOE, tmp_path / "a.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20, "of a file of 31 MiB"


def test_a_source_that_becomes_shorter(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "m.gguf", "qwen3moe")[0]

    def cut(_: int, __: int) -> None:
        with source.open("r+b") as file:
            file.truncate(20000)

    assert "became shorter" in refusal(source, tmp_path / "o.gguf", on_progress=cut)
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("numbers", [[0, 1, 2], [3, 2, 1], [5], [0, 1, 5, 6, 7, 2]])
def test_pieces_are_the_experts_asked_for(numbers: Sequence[int], tmp_path: Path) -> None:
    from edgemoe.converters.copied_model import CopiedTensor
    from edgemoe.converters.stock_model import StockModel

    path = write_tiny_model(tmp_path / "m.gguf", "qwen3moe")[0]
    name = "blk.1.ffn_down_exps.weight"
    stack = next(tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    with StockModel(path) as model:
        copy = CopiedTensor(model.tensors[name], tuple(numbers))
        for most in (1, 1000, 1 << 20):
            parts = [model.read(name, start, size) for start, size in copy.pieces(most)]
            assert b"".join(parts) == stack[numbers].tobytes()
            assert all(len(part) % 128 == 0 for part in parts), "whole rows of 32 float32"
        assert copy.info.shape == (32, 64, len(numbers))
        assert copy.info.n_bytes == sum(map(len, parts))


def test_converting_again_after_an_interruption(tmp_path: Path) -> None:
    source, output = TINY_MOE, tmp_path / "a.gguf"

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align(source, output, on_progress=stop)
    assert not output.exists() and (tmp_path / "a.gguf.partial").exists()
    steps: list[int] = []
    align(source, output, on_progress=lambda done, _: steps.append(done))
    assert steps[0] > 10 << 20, "what was complete is not copied again"
    assert verify(source, output).same


def test_convert_error_is_one_of_ours() -> None:
    assert issubclass(ConvertError, EdgemoeError)
