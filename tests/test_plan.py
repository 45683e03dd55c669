"""Plans add up, keep their promises at every budget, and say why."""

from __future__ import annotations

import os
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import TYPE_Q8_0, TensorBytes, gguf_bytes, moe_metadata, n_bytes
from hypothesis import given
from hypothesis import strategies as st
from plain_llama import TINY_MOE
from tiny_models import write_tiny_model

from edgemoe.allocation import ExpertBudget, uniform
from edgemoe.errors import BudgetError
from edgemoe.expert_set import ExpertLayers
from edgemoe.index import ExpertIndex, read_index
from edgemoe.memory import Budget, format_bytes, page_size
from edgemoe.plan import (
    LEAST_ROWS,
    SCATTERED_BYTES,
    ExpertPlan,
    Footprint,
    budget_holding,
    expert_pages,
    headroom_of,
    kernel_scratch,
    make_plan,
)
from edgemoe.slab_pages import SlabPages

MIB = 1 << 20
PROCESS = 60 * MIB
INDEX = read_index(TINY_MOE)


def footprint(n_ctx: int, n_ubatch: int) -> Footprint:
    """Grows as llama.cpp's: KV cache with the context, buffers with the batch."""
    return Footprint(n_ctx, n_ubatch, kv_bytes=4096 * n_ctx, compute_bytes=24576 * n_ubatch, scratch_bytes=MIB)


def plan(mebibytes: float, n_ctx: int | None = None, n_ubatch: int | None = None) -> ExpertPlan:
    budget = Budget(int(mebibytes * MIB), f"ram={mebibytes}MiB")
    return make_plan(INDEX, budget, footprint, PROCESS, n_ctx, n_ubatch)


@given(
    mebibytes=st.floats(60, 400),
    n_ctx=st.none() | st.integers(1, 512),
    n_ubatch=st.none() | st.integers(1, 2048),
)
def test_every_plan_adds_up_and_can_be_kept(mebibytes: float, n_ctx: int | None, n_ubatch: int | None) -> None:
    try:
        found = plan(mebibytes, n_ctx, n_ubatch)
    except BudgetError as error:
        assert error.needed is not None and error.needed > mebibytes * MIB
        return
    assert sum(line.bytes for line in found.lines) == found.budget.bytes
    assert all(line.bytes >= 0 and line.why for line in found.lines)
    assert found.bytes_of("headroom") == headroom_of(found.budget.bytes)
    assert found.arena_bytes == found.bytes_of("expert arena")
    assert found.arena_bytes % page_size() == 0
    assert found.floor_budget <= found.budget.bytes
    assert found.n_ctx == (n_ctx or found.n_ctx)
    assert 1 <= found.n_ubatch <= min(n_ubatch or 512, found.n_ctx)
    # The worst batch selects n_ubatch * 4 different experts of 32; one tensor of them must fit.
    selected = min(32, 4 * found.n_ubatch)
    largest = max(tensor.slab_bytes for tensor in INDEX.experts)
    assert found.arena_bytes >= min(selected * largest, 32 * largest)


@given(mebibytes=st.floats(72, 400))
def test_more_memory_never_means_fewer_experts_at_the_same_shape(mebibytes: float) -> None:
    less, more = plan(mebibytes, 512, 16), plan(mebibytes + 1, 512, 16)
    assert less.n_ubatch == more.n_ubatch == 16
    assert less.arena_bytes <= more.arena_bytes


def test_the_floor_is_exact() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(10)
    needed = caught.value.needed
    assert needed is not None
    assert make_plan(INDEX, Budget(needed, "floor"), footprint, PROCESS).arena_bytes > 0
    with pytest.raises(BudgetError):
        make_plan(INDEX, Budget(needed - 1, "below"), footprint, PROCESS)


def test_the_refusal_names_the_number_that_would_do() -> None:
    with pytest.raises(
        BudgetError, match=r"ram=10MiB is too small for tiny-moe-q4_k_m\.gguf: at least .* give ram=\d+MiB$"
    ):
        plan(10)
    with pytest.raises(BudgetError, match=r"or a smaller n_ctx$"):
        plan(10, n_ctx=512)


def test_when_everything_fits_the_rest_is_left_free() -> None:
    found = plan(1000)
    assert found.resident_share == 1.0
    assert found.prompt_mode == "whole"
    assert found.n_ubatch == 512
    assert found.bytes_of("left free") > 800 * MIB
    assert found.notes == ("All experts fit: each is read from disk once, on first use.",)


def test_the_cliff_of_one_token_cycle_is_announced() -> None:
    assert INDEX.token_cycle_bytes == sum(4 * INDEX.expert_size(layer) for layer in range(8))
    for mebibytes in (72, 76, 84, 120):
        found = plan(mebibytes)
        below = found.arena_bytes < INDEX.token_cycle_bytes
        assert any("smaller than one token cycle" in note for note in found.notes) is below


def test_three_ways_to_serve_a_prompt() -> None:
    assert plan(90, n_ubatch=32).prompt_mode == "whole"
    modes = {(found := plan(quarters / 4, n_ubatch=32)).prompt_mode: found for quarters in range(282, 360)}
    assert set(modes) == {"small-batches", "per-tensor", "whole"}
    assert modes["per-tensor"].n_ubatch == 32
    assert modes["small-batches"].n_ubatch < 32


def test_the_context_is_the_longest_that_leaves_most_memory_to_experts() -> None:
    def long_context(n_ctx: int, n_ubatch: int) -> Footprint:
        return Footprint(n_ctx, n_ubatch, kv_bytes=65536 * n_ctx, compute_bytes=1024 * n_ubatch, scratch_bytes=0)

    index = read_index(TINY_MOE)
    object.__setattr__(index, "context_length", 4096)
    sizes = [
        make_plan(index, Budget(n * MIB, "x"), long_context, PROCESS).n_ctx for n in (110, 140, 200, 400, 1000, 2000)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] == 512 and sizes[-1] == 4096
    for n in (200, 400, 1000):
        found = make_plan(index, Budget(n * MIB, "x"), long_context, PROCESS)
        assert found.n_ctx == 512 or found.bytes_of("KV cache") <= n * MIB // 4


@given(
    mebibytes=st.integers(75, 110),
    share=st.floats(0.01, 1),
    n_ctx=st.sampled_from([None, 512]),
    n_ubatch=st.sampled_from([None, 8, 512]),
)
def test_the_budget_for_more_experts_holds_them(
    mebibytes: int, share: float, n_ctx: int | None, n_ubatch: int | None
) -> None:
    """Although it may be given a longer context and a wider batch, and Python take a little more there."""
    wanted = int(share * INDEX.expert_bytes)
    index = replace(INDEX, context_length=1 << 20)

    def within(n_bytes: int, process: int = PROCESS) -> ExpertPlan:
        return make_plan(index, Budget(n_bytes, "x"), footprint, process, n_ctx, n_ubatch)

    here = within(mebibytes * MIB)
    named = budget_holding(here, wanted, within)
    assert within(named).arena_bytes >= wanted
    if named == here.budget.bytes:
        assert here.arena_bytes >= wanted
    else:
        assert here.arena_bytes < wanted and within(named, PROCESS + MIB // 5).arena_bytes >= wanted


def test_a_context_beyond_the_budget_is_not_even_asked_about() -> None:
    def ask(n_ctx: int, n_ubatch: int) -> Footprint:
        raise AssertionError

    with pytest.raises(BudgetError, match=r"too small for a context of 2,000,000 tokens, .* give a smaller n_ctx$"):
        make_plan(INDEX, Budget(100 * MIB, "ram=100MiB"), ask, PROCESS, 2_000_000)


def test_kernel_scratch_follows_ggml() -> None:
    index: ExpertIndex = INDEX
    # 512 tokens x 4 experts x 256 wide at 2 bytes, and 8 bytes for each of 32 experts and slot, and a mebibyte.
    assert kernel_scratch(index, 512, 512, flash_attn=True) == 512 * 4 * 256 * 2 + 32 * 512 * 4 * 8 + MIB
    # Without flash attention: 8 heads x 512 positions x 512 tokens at 2 bytes are more.
    assert kernel_scratch(index, 512, 512, flash_attn=False) == 8 * 512 * 512 * 2 + MIB


def test_plans_are_deterministic() -> None:
    assert plan(84) == plan(84)


QWEN3_30B_A3B = {"n_embd": 2048, "n_ff_exp": 768, "n_vocab": 151936, "n_q": 4096, "n_kv": 512}
"""48 layers, 128 experts of three matrices 2048 x 768, 8 of them active."""


def qwen3_30b_a3b(path: Path) -> ExpertIndex:
    """Its header, over a file of the right size with nothing in it; experts take 34 bytes for 32 weights."""
    s = QWEN3_30B_A3B
    tensors = [
        TensorBytes(name, (s["n_embd"], s["n_vocab"]), TYPE_Q8_0) for name in ("token_embd.weight", "output.weight")
    ]
    for layer in range(48):
        block = f"blk.{layer}."
        tensors += [
            TensorBytes(f"{block}ffn_gate_inp.weight", (s["n_embd"], 128)),
            *(TensorBytes(f"{block}attn_{name}.weight", (s["n_embd"], s["n_kv"]), TYPE_Q8_0) for name in "kv"),
            TensorBytes(f"{block}attn_q.weight", (s["n_embd"], s["n_q"]), TYPE_Q8_0),
            TensorBytes(f"{block}attn_output.weight", (s["n_q"], s["n_embd"]), TYPE_Q8_0),
            *(
                TensorBytes(f"{block}ffn_{part}_exps.weight", (s["n_embd"], s["n_ff_exp"], 128), TYPE_Q8_0)
                for part in ("gate", "up")
            ),
            TensorBytes(f"{block}ffn_down_exps.weight", (s["n_ff_exp"], s["n_embd"], 128), TYPE_Q8_0),
        ]
    end = 0
    placed = []
    for tensor in tensors:
        placed.append(replace(tensor, data=b"", offset=end))
        end += -(-n_bytes(tensor) // 32) * 32
    keys = moe_metadata(block_count=48, expert_count=128, expert_used_count=8, embedding_length=s["n_embd"])
    path.write_bytes(gguf_bytes(keys, placed))
    os.truncate(path, path.stat().st_size + end)
    return read_index(path)


@pytest.mark.parametrize(
    ("kept", "billions", "gigabytes"),
    [(128, 30.5, 18.5), (96, 23.3, 14.1), (64, 16.0, 9.7), (48, 12.4, 7.5), (32, 8.8, 5.3)],
)
def test_what_is_kept_of_qwen3_30b_a3b(kept: int, billions: float, gigabytes: float, tmp_path: Path) -> None:
    """What M experts of each layer take, worked out from the shapes of the model; and the solver finds its M."""
    index = qwen3_30b_a3b(tmp_path / "qwen.gguf")
    layers = ExpertLayers.of(index)
    scores = np.random.default_rng(0).random((48, 128))
    chosen = uniform(scores, layers, ExpertBudget(per_layer=kept))
    weights = sum(prod(tensor.shape) for tensor in index.tensors) + chosen.n_kept * 3 * 2048 * 768
    assert weights / 1e9 == pytest.approx(billions, abs=0.05)
    assert weights * 4.85 / 8 / 1e9 == pytest.approx(gigabytes, abs=0.05)
    n_expert_bytes = chosen.n_bytes(layers.expert_bytes)
    assert n_expert_bytes == chosen.n_kept * 3 * 2048 * 768 * 34 // 32
    # A budget that leaves the arena room for so many, page by page, and not for one more of each layer.
    pages = replace(layers, expert_bytes=expert_pages(index))
    budget = Budget(PROCESS + index.dense_bytes + n_expert_bytes + (1 << 30), "ram")
    arena = make_plan(index, budget, footprint, PROCESS, 512, 16).arena_bytes
    solved = uniform(scores, pages, ExpertBudget(n_bytes=arena))
    # Counted one by one, all experts together take more pages than they do: neighbours share theirs.
    assert min(kept, 127) <= solved.mean_kept <= min(128, kept + (1 << 30) // sum(pages.expert_bytes))
    assert solved.n_bytes(pages.expert_bytes) <= arena < (solved.mean_kept + 1) * sum(pages.expert_bytes)
    # What the arena is counted with exceeds the bytes themselves by a page for each part.
    assert n_expert_bytes <= chosen.n_bytes(pages.expert_bytes) <= 1.01 * n_expert_bytes


def test_token_embedding_is_read_by_rows_until_all_experts_fit(tmp_path: Path) -> None:
    index = qwen3_30b_a3b(tmp_path / "qwen.gguf")
    table = index.token_table
    assert table is not None
    assert table.row_bytes * table.shape[1] == table.n_bytes

    def at(n_bytes: int, n_ubatch: int | None = None) -> ExpertPlan:
        return make_plan(index, Budget(n_bytes, "ram"), footprint, PROCESS, 512, n_ubatch)

    small = at(4 << 30)
    # Two batches of rows that each straddle a page.
    pages = -(-table.row_bytes // page_size()) + 1
    assert small.rows_bytes == small.bytes_of("token embedding") == 2 * small.n_ubatch * pages * page_size()
    assert small.bytes_of("dense weights") == index.dense_bytes - table.n_bytes
    assert at(4 << 30, 16).rows_bytes == 2 * LEAST_ROWS * pages * page_size()

    low, high = 4 << 30, 1 << 36
    while high - low > page_size():
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).rows_bytes == 0 else (middle, high)
    held, by_rows = at(high), at(low)
    assert held.resident_share == by_rows.resident_share == 1
    assert held.bytes_of("dense weights") == index.dense_bytes
    assert held.bytes_of("token embedding") == 0
    assert held.floor_budget == by_rows.floor_budget
    assert sum(line.bytes for line in held.lines) == high


def test_small_and_tied_embeddings_are_held(tmp_path: Path) -> None:
    assert INDEX.token_table is None, "the model multiplies by it for every token"
    assert plan(100).rows_bytes == 0
    path = tmp_path / "model.gguf"
    write_tiny_model(path, "qwen3moe")
    index = read_index(path)
    assert index.token_table is not None
    everything = make_plan(index, Budget(1 << 30, "ram"), footprint, PROCESS, 64, 8)
    small = make_plan(index, Budget(everything.floor_budget, "ram"), footprint, PROCESS, 64, 8)
    assert small.resident_share < 1
    assert small.rows_bytes == 0


def test_what_slots_take_of_llama_cpp_is_planned_for_exactly_where_experts_are_in_them(tmp_path: Path) -> None:
    """Not where all experts fit, and everywhere below, however close."""
    path = tmp_path / "model.gguf"
    write_tiny_model(path, "qwen3moe")
    index, pages = read_index(path), SlabPages(read_index(path))
    everything = make_plan(index, Budget(1 << 30, "ram"), footprint, PROCESS, 64, 8)
    assert everything.resident_share == 1
    held = everything.bytes_of("page tables")
    smallest = everything.floor_budget
    enough = (1 << 30) - everything.bytes_of("left free") + MIB
    seen = set()
    for budget in np.linspace(smallest, enough, 200).astype(int).tolist():
        found = make_plan(index, Budget(budget, "ram"), footprint, PROCESS, 64, 8)
        assert sum(line.bytes for line in found.lines) == budget
        assert found.arena_bytes >= pages.floor
        spread = found.bytes_of("page tables") - held
        room = found.arena_bytes + spread
        seen.add(found.resident_share < 1)
        if found.resident_share < 1:
            # Of a room that was not yet cut down to whole pages: one slot more or less.
            expected = min(pages.spread(room, found.n_ubatch), room - pages.floor)
            assert spread == pytest.approx(expected, abs=3 * page_size())
        else:
            assert spread == 0
    assert seen == {True, False}


def test_experts_in_slots_have_what_batches_and_unused_page_tables_leave(tmp_path: Path) -> None:
    index = qwen3_30b_a3b(tmp_path / "qwen.gguf")
    found = make_plan(index, Budget(8 << 30, "ram"), footprint, PROCESS, 512, 512)
    assert found.lent_bytes == 24576 * 512 - 2 * 24576 - SCATTERED_BYTES
    assert f"experts in slots have {format_bytes(found.lent_bytes)} of it" in next(
        line.why for line in found.lines if line.name == "compute buffers"
    )
    # The tables of all experts' places are planned for; of these, what experts in slots need is less by far.
    beyond = index.expert_bytes - found.arena_bytes
    assert 0.2 * beyond / 512 < found.spared_bytes < beyond / 512 < found.bytes_of("page tables")


@pytest.mark.parametrize("mebibytes", [120, 400], ids=["in places", "all fit"])
def test_nothing_is_lent_without_slots(mebibytes: int) -> None:
    found = plan(mebibytes, 512, 512)
    assert (found.lent_bytes, found.spared_bytes) == (0, 0)


def test_no_more_is_lent_than_a_batch_takes(tmp_path: Path) -> None:
    index = qwen3_30b_a3b(tmp_path / "qwen.gguf")
    assert make_plan(index, Budget(8 << 30, "ram"), footprint, PROCESS, 512, 1).lent_bytes == 0
