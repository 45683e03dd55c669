"""Plans add up, keep their promises at every budget, and say why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_llama import TINY_MOE

from edgemoe.errors import BudgetError
from edgemoe.index import ExpertIndex, read_index
from edgemoe.memory import Budget, page_size
from edgemoe.plan import ExpertPlan, Footprint, headroom_of, kernel_scratch, make_plan

MIB = 1 << 20
PROCESS = 60 * MIB
INDEX = read_index(TINY_MOE)


def footprint(n_ctx: int, n_ubatch: int) -> Footprint:
    """Grows as llama.cpp's: KV cache with the context, buffers with the batch."""
    return Footprint(n_ctx, n_ubatch, kv_bytes=4096 * n_ctx, compute_bytes=24576 * n_ubatch, scratch_bytes=MIB)


def plan(mebibytes: float, n_ctx: int | None = None, n_ubatch: int | None = None) -> ExpertPlan:
    budget = Budget(int(mebibytes * MIB), f"--ram {mebibytes}MiB")
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
        BudgetError, match=r"--ram 10MiB is too small for tiny-moe-q4_k_m\.gguf: at least .* give --ram \d+MiB$"
    ):
        plan(10)
    with pytest.raises(BudgetError, match=r"or a smaller --ctx$"):
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


def test_kernel_scratch_follows_ggml() -> None:
    index: ExpertIndex = INDEX
    # 512 tokens x 4 experts x 256 wide at 2 bytes, and 8 bytes for each of 32 experts and slot, and a mebibyte.
    assert kernel_scratch(index, 512, 512, flash_attn=True) == 512 * 4 * 256 * 2 + 32 * 512 * 4 * 8 + MIB
    # Without flash attention: 8 heads x 512 positions x 512 tokens at 2 bytes are more.
    assert kernel_scratch(index, 512, 512, flash_attn=False) == 8 * 512 * 512 * 2 + MIB


def test_plans_are_deterministic() -> None:
    assert plan(84) == plan(84)
