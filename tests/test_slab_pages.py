"""Memory that experts take, and what llama.cpp's tables of a batch add where they are in slots."""

from __future__ import annotations

import pytest
from plain_llama import TINY_MOE
from tiny_models import write_tiny_model

from edgemoe import slab_pages
from edgemoe.index import ExpertIndex, read_index
from edgemoe.memory import page_size
from edgemoe.slab_pages import SlabPages, pages_of_one


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ExpertIndex:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_tiny_model(path, "qwen3moe")
    return read_index(path)


def test_pages_of_one() -> None:
    page = page_size()
    assert pages_of_one(page, 0) == page
    assert pages_of_one(page, 32) == 2 * page
    assert pages_of_one(page + 1, 0) == 3 * page


def test_total_covers_every_expert(index: ExpertIndex) -> None:
    pages = SlabPages(index)
    assert index.expert_bytes <= pages.total <= sum(pages.of_one_expert()) * max(t.n_expert for t in index.experts)


@pytest.mark.parametrize("unasked", [False, True])
def test_tables_of_a_batch_grow_with_the_slots(
    index: ExpertIndex, unasked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each slot's counter, cache line and rows of a batch, or what is written of these, less unused page tables."""
    monkeypatch.setattr(slab_pages, "huge_pages_unasked", lambda: unasked)
    pages = SlabPages(index)
    assert all(tensor.slab_bytes % page_size() == 0 for tensor in index.experts)
    arena = pages.total // 2
    n_slots = arena // min(pages.of_one_expert())
    assert n_slots > 1
    saved = (pages.total - arena) // 512
    n_used = max(index.n_expert_used)
    assert pages.spread(arena, 1) == n_slots * (72 + 8 * n_used) + page_size() - saved
    rows = 8 * 4 * n_used if unasked else 33  # pages: all, or what can be written of them
    assert pages.spread(arena, 4 * page_size()) == n_slots * (72 + rows * page_size()) + page_size() - saved


def test_no_tables_without_slots(index: ExpertIndex) -> None:
    assert SlabPages(index).spread(SlabPages(index).total, 512) == 0
    other = read_index(TINY_MOE)
    assert other.experts[0].slab_bytes % page_size() != 0
    assert SlabPages(other).spread(SlabPages(other).total // 2, 512) == 0
