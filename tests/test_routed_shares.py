"""Shares of experts: the same figures for a stored text and for one that is heard batch by batch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_llama import TINY_MOE

from edgemoe.backend import Llama
from edgemoe.documents import Document
from edgemoe.profiling import Spool, pieces_of, record, shares_of
from edgemoe.routed_shares import RoutedShares, place_of, routed_shares
from edgemoe.trace import RouterTrace, top_k

LAYERS = (1, 2, 5)
N_EXPERT, K_A = 12, 3


def logits(n_token: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return 2 * np.random.default_rng(seed).standard_normal((len(LAYERS), n_token, N_EXPERT), dtype=np.float32)


def by_loop(said: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Mean over tokens of the softmax over the K_A largest logits."""
    found = np.zeros((len(said), N_EXPERT))
    for layer, token in np.ndindex(said.shape[:2]):
        row = said[layer, token].astype(float)
        chosen = sorted(range(N_EXPERT), key=lambda i, row=row: (-row[i], i))[:K_A]  # type: ignore[misc]
        weights = np.exp(row[chosen] - row[chosen].max())
        found[layer, chosen] += weights / weights.sum()
    return found / said.shape[1]


def heard(said: npt.NDArray[np.float32], edges: list[int], counted: slice | None = None) -> RoutedShares:
    """The text in batches that end at these tokens."""
    shares = RoutedShares(LAYERS, N_EXPERT, K_A, counted)
    for start, end in pairwise(edges):
        shares.add(RouterTrace(LAYERS, said[:, start:end]))
    return shares


def test_shares_are_the_mean_of_the_routers_weights() -> None:
    said = logits(50)
    expected = by_loop(said)
    found = heard(said, [0, 50])
    assert found.n_token == 50 and found.shares().dtype == np.float32
    np.testing.assert_allclose(found.shares(), expected, atol=1e-6)
    np.testing.assert_allclose(found.shares().sum(axis=1), 1, atol=1e-6)
    stored = top_k(RouterTrace(LAYERS, said), K_A, compiled=False)
    np.testing.assert_allclose(routed_shares(stored, slice(0, 50)), expected, atol=1e-6)


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(0, 45), st.integers(0, 45))
def test_batches_and_the_part_that_counts_make_no_difference(cuts: list[int], a: int, b: int) -> None:
    said, (start, end) = logits(40, seed=1), sorted((a, b))
    found = heard(said, sorted([0, *cuts, 40]), slice(start, end))
    part = said[:, start:end]
    assert found.n_token == part.shape[1]
    if part.shape[1]:
        np.testing.assert_allclose(found.shares(), by_loop(part), atol=1e-6)
    else:
        assert not found.shares().any()


@given(st.integers(1, 40))
def test_a_beginning_has_the_shares_of_a_text_that_ends_there(n_token: int) -> None:
    """What is stored of a document's beginning is what a prompt of those words would be matched by."""
    said = logits(40, seed=2)
    stored = top_k(RouterTrace(LAYERS, said), K_A, compiled=False)
    np.testing.assert_allclose(
        routed_shares(stored, slice(0, n_token)), heard(said[:, :n_token], [0, n_token]).shares(), atol=1e-6
    )


@pytest.mark.parametrize(
    ("said", "tokens", "place"),
    [
        ([1, 2, 3, 4], [9, 1, 2, 3, 4, 9], slice(2, 4)),
        ([1, 2, 3, 4], [9, 81, 2, 3, 49, 9], slice(2, 4)),  # its ends grew together with the template's words
        ([1, 2, 3], [2, 9, 1, 2, 3, 9, 9], slice(3, 4)),  # the last one of several
        ([1, 2, 3], [7, 2], slice(1, 2)),
        ([1, 2, 3, 4], [9, 1, 3, 2, 4, 9], slice(0, 6)),  # said in other tokens
        ([1, 2], [9, 1, 2, 9], slice(0, 4)),  # too short to tell
        ([], [9, 8], slice(0, 2)),
    ],
)
def test_what_was_said_is_found_in_its_prompt(said: list[int], tokens: list[int], place: slice) -> None:
    assert place_of(said, tokens) == place


def test_a_profiled_text_and_the_same_text_heard_agree(tmp_path: Path) -> None:
    """What tasks are stored by and what prompts are matched by, on the trained model."""
    document = Document("a", "import os\n\n\ndef parent(path):\n    return os.path.dirname(path)\n" * 4)
    settings = {"ram": "4GiB", "n_ctx": 128, "n_batch": 32, "n_threads": 1, "n_threads_batch": 1}
    with Llama(str(TINY_MOE), logits_all=True, **settings) as llama:
        (piece,) = pieces_of(llama, [document], 0)
        spool = Spool(tmp_path)
        spool.add(piece, record(llama, piece))
        assert spool.take(piece)
        stored = shares_of(spool, [piece])
    assert stored.tokens.tolist() == [32, len(piece.tokens)]
    with Llama(str(TINY_MOE), **settings) as llama:
        layers = llama.index.running_layers
        now = RoutedShares(layers, llama.index.n_expert, max(llama.index.n_expert_used))
        with llama.tap.watch(now.add, layers):
            llama.eval(piece.tokens)
    assert now.n_token == len(piece.tokens) > 2 * 32
    np.testing.assert_allclose(now.shares(), stored.shares[-1, : len(layers)].astype(np.float32), atol=2e-3)
