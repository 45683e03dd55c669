"""Traces keep the largest logits of each token, in order, and survive the disk."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgemoe.errors import TraceError
from edgemoe.trace import ExpertOutputs, RoutedTokens, RouterTrace, top_k

BOTH = pytest.mark.parametrize("compiled", [True, False])


def trace(n_layer: int, n_token: int, n_expert: int, seed: int = 0) -> RouterTrace:
    logits = np.random.default_rng(seed).standard_normal((n_layer, n_token, n_expert), dtype=np.float32)
    return RouterTrace(tuple(range(1, n_layer + 1)), logits)


def outputs(n_layer: int, n_token: int, n_expert: int, k: int, seed: int = 0) -> ExpertOutputs:
    rng = np.random.default_rng(seed)
    shape = (n_layer, n_token, k)
    return ExpertOutputs(
        rng.random((n_layer, n_token, n_expert)).argsort(axis=2)[:, :, :k].astype(np.int32),
        rng.random(shape, dtype=np.float32),
        rng.random(shape, dtype=np.float32) * 5,
        rng.random(shape[:2], dtype=np.float32),
    )


def assert_same(a: RoutedTokens, b: RoutedTokens) -> None:
    assert (a.layers, a.n_expert, a.ids.dtype) == (b.layers, b.n_expert, b.ids.dtype)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.logits, b.logits)
    assert (a.outputs is None) == (b.outputs is None)
    if a.outputs:
        for field in fields(ExpertOutputs):
            np.testing.assert_array_equal(getattr(a.outputs, field.name), getattr(b.outputs, field.name))


# Few different values, so that ties are common; both zeros, which are equal; extremes.
LOGITS = st.sampled_from([-3.5e38, -20.0, -1.0, -0.0, 0.0, 1e-45, 0.5, 2.0, 3.5e38]).map(
    lambda x: float(np.clip(np.float64(x), -3.4e38, 3.4e38))
)


@BOTH
@settings(deadline=None)  # the first call compiles
@given(data=st.data(), n_expert=st.integers(1, 20))
def test_top_k_is_a_stable_sort(compiled: bool, data: st.DataObject, n_expert: int) -> None:
    logits = data.draw(arrays(np.float32, (2, 3, n_expert), elements=LOGITS.map(np.float32)))
    k = data.draw(st.integers(1, n_expert))
    kept = top_k(RouterTrace((0, 5), logits), k, compiled=compiled)
    for layer, token in np.ndindex(2, 3):
        row = logits[layer, token].tolist()
        assert kept.ids[layer, token].tolist() == sorted(range(n_expert), key=lambda i: -row[i])[:k]
    np.testing.assert_array_equal(kept.logits, np.take_along_axis(logits, kept.ids.astype(np.int64), axis=2))
    assert (kept.layers, kept.n_expert, kept.n_token, kept.k_a) == ((0, 5), n_expert, 3, k)


@pytest.mark.parametrize(("n_expert", "kind"), [(128, np.uint8), (256, np.uint8), (257, np.uint16), (512, np.uint16)])
def test_both_ways_agree_on_real_shapes(n_expert: int, kind: type) -> None:
    seen = trace(5, 33, n_expert)
    compiled, plain = top_k(seen, 10), top_k(seen, 10, compiled=False)
    assert compiled.ids.dtype == kind
    assert_same(compiled, plain)


@BOTH
def test_a_trace_that_is_no_contiguous_array(compiled: bool) -> None:
    whole = trace(4, 6, 16).logits
    part = RouterTrace((0, 1), whole[::2, 1:4])
    assert_same(top_k(part, 3, compiled=compiled), top_k(RouterTrace((0, 1), part.logits.copy()), 3, compiled=False))


@BOTH
def test_no_tokens_are_kept_as_none(compiled: bool) -> None:
    kept = top_k(trace(2, 0, 8), 4, compiled=compiled)
    assert kept.n_token == 0 and kept.ids.shape == (2, 0, 4)


@BOTH
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_a_broken_model_is_refused(compiled: bool, value: float) -> None:
    seen = trace(3, 5, 16)
    seen.logits[1, 3, 7] = value
    with pytest.raises(TraceError, match="router of layer 2 gave token 3 a logit that is no finite number"):
        top_k(seen, 2, compiled=compiled)


@pytest.mark.parametrize("k", [0, 17])
def test_k_beyond_the_experts(k: int) -> None:
    with pytest.raises(TraceError, match="choose 1 to 16"):
        top_k(trace(1, 1, 16), k)


def test_joining_and_the_disk_keep_everything(tmp_path: Path) -> None:
    whole = RouterTrace((0, 1, 7), trace(3, 9, 300).logits, outputs(3, 9, 300, 4))
    kept = top_k(whole, 6)
    assert kept.outputs is whole.outputs
    pieces = []
    for a, b in ((0, 2), (2, 2), (2, 9)):
        assert whole.outputs
        part = ExpertOutputs(*(getattr(whole.outputs, f.name)[:, a:b] for f in fields(ExpertOutputs)))
        piece = top_k(RouterTrace(whole.layers, whole.logits[:, a:b], part), 6)
        piece.save(tmp_path / f"{a}-{b}.npz")
        pieces.append(RoutedTokens.load(tmp_path / f"{a}-{b}.npz"))
    assert_same(RoutedTokens.concatenate(pieces), kept)
    assert_same(RoutedTokens.concatenate([kept]), kept)
    assert len(list(tmp_path.iterdir())) == 3, "no unfinished file stays"


def test_joining_what_does_not_fit() -> None:
    a = top_k(trace(2, 3, 8), 4)
    for other in (top_k(trace(3, 3, 8), 4), top_k(trace(2, 3, 9), 4), top_k(trace(2, 3, 8), 3)):
        with pytest.raises(TraceError, match="cannot be joined"):
            RoutedTokens.concatenate([a, other])
    recorded = RoutedTokens(a.layers, a.n_expert, a.ids, a.logits, outputs(2, 3, 8, 2))
    with pytest.raises(TraceError, match="cannot be joined"):
        RoutedTokens.concatenate([a, recorded])
    with pytest.raises(TraceError, match="record some text"):
        RoutedTokens.concatenate([])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    with pytest.raises(TraceError, match="cannot be read"):
        RoutedTokens.load(path)
    for content in (b"", b"PK\3\4", b"no zip file", b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=r"tokens\.npz"):
            RoutedTokens.load(path)
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(TraceError, match="is not a file of routed tokens"):
        RoutedTokens.load(tmp_path / "one.npy")
    np.savez(path, format=np.array(2), layers=np.arange(1), n_expert=np.array(1), ids=np.arange(1), logits=np.arange(1))
    with pytest.raises(TraceError, match="format 2, expected 1"):
        RoutedTokens.load(path)
    np.savez(path, format=np.array(1), layers=np.array([{}], dtype=object))
    with pytest.raises(TraceError, match="is not a file of routed tokens"):
        RoutedTokens.load(path)


def test_every_damaged_byte_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    kept = top_k(RouterTrace((0,), trace(1, 2, 8).logits, outputs(1, 2, 8, 2)), 2)
    good, path = tmp_path / "good.npz", tmp_path / "bad.npz"
    kept.save(good)
    content = good.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(content), 300):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.integers(8)]) + content[at + 1 :])
        with suppress(TraceError):
            assert_same(RoutedTokens.load(path), kept)
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(TraceError):
            RoutedTokens.load(path)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    kept = top_k(trace(1, 2, 8), 2)
    with pytest.raises(TraceError, match="cannot be written"):
        kept.save(tmp_path / "nowhere" / "tokens.npz")
    kept.save(tmp_path / "tokens.npz")
    kept.save(tmp_path / "tokens.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.npz"]
    with ZipFile(tmp_path / "tokens.npz") as file:
        assert set(file.namelist()) == {f"{n}.npy" for n in ("format", "layers", "n_expert", "ids", "logits")}


def test_arrays_that_do_not_fit() -> None:
    floats = np.zeros((2, 3, 8), np.float32)
    with pytest.raises(TraceError, match="expected float32"):
        RouterTrace((0, 1), floats.astype(np.float64))  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="of 1 layers"):
        RouterTrace((0,), floats)
    with pytest.raises(TraceError, match="expert outputs are of"):
        RouterTrace((0, 1), floats, outputs(2, 4, 8, 2))
    with pytest.raises(TraceError, match="expected int32 and float32 arrays"):
        ExpertOutputs(np.zeros((2, 3, 2), np.int32), floats[:, :, :2], floats[:, :, :2], floats[0])
    with pytest.raises(TraceError, match="beyond the 8"):
        RoutedTokens((0, 1), 8, np.full((2, 3, 8), 8, np.uint8), floats)
    with pytest.raises(TraceError, match="expected uint8"):
        RoutedTokens((0, 1), 8, np.zeros((2, 3, 8), np.uint16), floats)
    for name in ("weights", "norms"):
        bad = outputs(2, 3, 8, 2)
        getattr(bad, name)[1, 1, 1] = np.nan
        with pytest.raises(TraceError, match=name):
            ExpertOutputs(*(getattr(bad, f.name) for f in fields(ExpertOutputs)))
        bad.ids[1, 1, 1] = -1  # padding may hold anything
        ExpertOutputs(*(getattr(bad, f.name) for f in fields(ExpertOutputs)))
