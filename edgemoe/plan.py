"""Where every byte of ``--ram`` goes, decided from the header before anything is loaded.

`make_plan` is pure: the same header, budget and footprint give the same plan. What llama.cpp itself will allocate
(KV cache, compute buffers) is not modelled here but asked of llama.cpp through the `footprint` function, because it
differs between more than a hundred architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from edgemoe.errors import BudgetError
from edgemoe.index import ExpertIndex, Tensor
from edgemoe.memory import Budget, format_bytes, page_size
from edgemoe.slab_pages import SlabPages, pages_of_one

MIB = 1 << 20

DEFAULT_UBATCH = 512
"""llama.cpp's own default for n_ubatch, the physical batch of a prompt."""

SMALLEST_CTX = 512
"""The context that a budget must at least hold when the user names none, tokens."""

CONTEXT_SHARE = 4
COMPUTE_SHARE = 4
"""KV cache and compute buffers may each take one part in four of what experts could use instead."""

TABLE_SHARE = 2
"""Rows of the token embedding are read as tokens need them where they may take one part in so many of the table."""

BYTES_PER_CELL = 64
"""llama.cpp's bookkeeping for each position of the KV cache (llama_kv_cells), and llama_cpp.Llama's array of tokens."""

MOST_ASKED_FOR = 16 * MIB
"""Memory that asking llama.cpp about a context may take, whatever the budget."""

LEAST_ROWS = 64
"""Rows of the token embedding for a batch, however narrow it is: a text comes back to its words."""

SCATTERED_BYTES = MIB
"""One token's results lie where a batch's do, each on pages of its own: more than they would take side by side."""

PROCESSES_DIFFER = MIB // 4
"""What Python takes differs by so much between two processes that do the same."""

NOMINAL_PROCESS_BYTES = 64 * MIB
"""What Python and libraries take, roughly; what they really take differs a little between two processes."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What llama.cpp allocates besides the weights, for one context size and physical batch.

    Attributes
    ----------
    n_ctx, n_ubatch : int
        Tokens.
    kv_bytes, compute_bytes : int
        KV cache (and recurrent state), and the graph's compute buffers, as llama.cpp's own simulation reports them.
    scratch_bytes : int
        Work memory of the CPU kernels and output logits, which that simulation leaves out.
    """

    n_ctx: int
    n_ubatch: int
    kv_bytes: int
    compute_bytes: int
    scratch_bytes: int

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return self.kv_bytes + self.compute_bytes + self.scratch_bytes


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One row of the plan: a name, its bytes, and why."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class ExpertPlan:
    """How a budget is spent.

    Attributes
    ----------
    budget : Budget
        What was asked for, bytes with its reason.
    lines : tuple of PlanLine
        Their bytes add up to ``budget.bytes``.
    n_ctx, n_ubatch : int
        Tokens of context, and of one physical batch.
    arena_bytes : int
        Memory for experts, whole pages.
    spared_bytes, lent_bytes : int
        Where experts are in slots, what they have besides: page tables that are not needed then, and, while tokens are
        decoded one by one, memory that only prompt batches need.
    rows_bytes : int
        Memory for rows of the token embedding, whole pages; 0 where all of it is held, with the dense weights.
    floor_budget : int
        The smallest budget that would work for this context, bytes.
    resident_share : float
        Part of the experts that fits the arena, 0 to 1.
    prompt_mode : str
        ``whole``: all experts that one batch may select fit at once. ``per-tensor``: one expert tensor's share at a
        time. ``small-batches``: n_ubatch was lowered, because a wider batch's compute buffers and experts would take
        too much of the budget.
    notes : tuple of str
        What the user should know, the two cliffs above all.
    """

    budget: Budget
    lines: tuple[PlanLine, ...]
    n_ctx: int
    n_ubatch: int
    arena_bytes: int
    spared_bytes: int
    lent_bytes: int
    rows_bytes: int
    floor_budget: int
    resident_share: float
    prompt_mode: str
    notes: tuple[str, ...]

    def bytes_of(self, name: str) -> int:
        """Bytes of the line with that name, 0 if there is none."""
        return sum(line.bytes for line in self.lines if line.name == name)

    @property
    def floor_mebibytes(self) -> int:
        """That smallest budget in whole MiB that are enough in every process."""
        return safe_mebibytes(self.floor_budget)

    @property
    def nominal_arena_bytes(self) -> int:
        """The arena if Python took `NOMINAL_PROCESS_BYTES`: the same in every process with the same settings."""
        measured = sum(map(self.bytes_of, ("Python and libraries", "expert arena", "left free")))
        return max(0, measured - NOMINAL_PROCESS_BYTES)


def make_plan(
    index: ExpertIndex,
    budget: Budget,
    footprint: Callable[[int, int], Footprint],
    process_bytes: int,
    n_ctx: int | None = None,
    n_ubatch: int | None = None,
    reserved: Sequence[PlanLine] = (),
) -> ExpertPlan:
    """Divide a RAM budget.

    Parameters
    ----------
    index : ExpertIndex
        The model's header.
    budget : Budget
        Total for the process, bytes.
    footprint : callable
        ``footprint(n_ctx, n_ubatch)`` gives llama.cpp's own needs.
    process_bytes : int
        Python, libraries and vocabulary, measured.
    n_ctx : int, optional
        Context in tokens; None takes the largest that leaves most of the memory to experts.
    n_ubatch : int, optional
        Largest physical batch; None means 512. It is lowered when the experts of such a batch cannot fit.
    reserved : sequence of PlanLine
        What the caller itself will hold besides.

    Raises
    ------
    BudgetError
        When the budget cannot hold the floor: dense weights, KV cache, compute buffers and twice the experts of one
        token of one layer. ``needed`` is the budget that would do.
    """
    divide = partial(_divide, index, budget, footprint, process_bytes, n_ctx, n_ubatch, reserved)
    table = index.token_table
    if table is None or TABLE_SHARE * _rows_bytes(table, n_ubatch or DEFAULT_UBATCH) > table.n_bytes:
        return divide(None)
    plan = divide(table)
    if plan.resident_share < 1:
        return plan
    # With room to spare, no token waits for its row.
    try:
        held = divide(None)
    except BudgetError:
        return plan
    return replace(held, floor_budget=plan.floor_budget) if held.resident_share == 1 else plan


def _divide(
    index: ExpertIndex,
    budget: Budget,
    footprint: Callable[[int, int], Footprint],
    process_bytes: int,
    n_ctx: int | None,
    n_ubatch: int | None,
    reserved: Sequence[PlanLine],
    table: Tensor | None,
) -> ExpertPlan:
    """Divide a budget, with this table read by rows, or every dense weight held."""
    pages = SlabPages(index)
    set_aside = sum(line.bytes for line in reserved)
    dense = index.dense_bytes - (table.n_bytes if table else 0)
    routers = _router_copies(index)
    fixed = process_bytes + dense + routers + set_aside
    headroom = headroom_of(budget.bytes)
    # 8 bytes for each page that was ever used: evicting an expert frees its pages, not the tables that map them.
    tables = -(-(pages.total + index.dense_bytes) // 512)
    space = budget.bytes - headroom - fixed - tables
    widest = n_ubatch or DEFAULT_UBATCH

    def rows_of(shape: Footprint) -> int:
        return _rows_bytes(table, shape.n_ubatch) if table else 0

    smallest_ctx = n_ctx or min(SMALLEST_CTX, max(index.context_length, 1))
    if BYTES_PER_CELL * smallest_ctx > max(budget.bytes, MOST_ASKED_FOR):  # to ask llama.cpp would take as much
        raise BudgetError(
            f"{budget.reason} is too small for a context of {smallest_ctx:,} tokens, whose places in the cache take"
            f" {format_bytes(BYTES_PER_CELL * smallest_ctx)}; give a smaller n_ctx"
        )
    least = footprint(smallest_ctx, 1)
    floor_budget = _with_headroom(fixed + tables + least.total + rows_of(least) + pages.floor)
    if budget.bytes < floor_budget:
        raise BudgetError(
            f"{budget.reason} is too small for {index.path.name}: at least {format_bytes(floor_budget)} is needed"
            f" with a context of {smallest_ctx} tokens (dense weights {format_bytes(dense + rows_of(least))},"
            f" Python and llama.cpp {format_bytes(process_bytes + set_aside)},"
            f" KV cache and buffers {format_bytes(least.total)}, experts {format_bytes(pages.floor)});"
            f" give ram={safe_mebibytes(floor_budget)}MiB" + (" or a smaller n_ctx" if n_ctx else ""),
            needed=floor_budget,
        )

    def room_for(shape: Footprint) -> int:
        return min(space - shape.total - rows_of(shape), pages.total)

    def spread_of(shape: Footprint) -> int:
        room = room_for(shape)
        return max(0, min(pages.spread(room, shape.n_ubatch), room - pages.floor))

    def arena_for(shape: Footprint) -> int:
        return (room_for(shape) - spread_of(shape)) // page_size() * page_size()

    def fits(shape: Footprint) -> bool:
        """Whether the worst batch of that shape finds room in what it leaves to the arena."""
        return arena_for(shape) >= max(pages.floor, pages.one_tensor(shape.n_ubatch))

    # Upwards, and no further than needed: a dry run of a million tokens takes memory itself.
    for ctx in () if n_ctx else _context_sizes(smallest_ctx, index.context_length):
        longer = footprint(ctx, 1)
        if longer.kv_bytes > space // CONTEXT_SHARE or not fits(longer):
            break
        least = longer

    chosen = least
    for width in _halves(min(widest, least.n_ctx)):
        wider = footprint(least.n_ctx, width)
        modest = wider.compute_bytes + wider.scratch_bytes <= space // COMPUTE_SHARE
        if fits(wider) and (modest or n_ubatch):
            chosen = wider
            break

    arena, rows, spread = arena_for(chosen), rows_of(chosen), spread_of(chosen)
    spared = max(0, -pages.spread(arena, chosen.n_ubatch))
    lent = 0
    if pages.in_slots(arena):
        lent = max(0, chosen.compute_bytes - 2 * footprint(chosen.n_ctx, 1).compute_bytes - SCATTERED_BYTES)
    if chosen.n_ubatch < min(widest, chosen.n_ctx):
        mode = "small-batches"
    else:
        mode = "whole" if arena >= pages.whole(chosen.n_ubatch) else "per-tensor"
    free = space - chosen.total - rows - spread - arena
    share = min(1.0, arena / pages.total)
    needed = f"every token needs them: attention, norms, router, {'output' if table else 'embeddings'}"
    embedding = (
        [PlanLine("token embedding", rows, f"rows of {format_bytes(table.n_bytes)}, read as tokens need them")]
        if table
        else []
    )
    lines = (
        PlanLine("Python and libraries", process_bytes, "measured in this process, vocabulary included"),
        PlanLine("dense weights", dense, needed),
        *embedding,
        PlanLine("router copies", routers, "in 8 bits, to guess the next layers' experts"),
        PlanLine("KV cache", chosen.kv_bytes, f"{chosen.n_ctx} tokens of context"),
        PlanLine(
            "compute buffers",
            chosen.compute_bytes,
            f"llama.cpp's graph at n_ubatch {chosen.n_ubatch}"
            + (f"; experts in slots have {format_bytes(lent)} of it while decoding" if lent else ""),
        ),
        PlanLine("kernel scratch", chosen.scratch_bytes, "work memory of the CPU kernels, output logits"),
        *reserved,
        PlanLine("expert arena", arena, f"{share:.0%} of {format_bytes(index.expert_bytes)} of experts"),
        PlanLine("page tables", tables + spread, "the kernel's map of all experts and weights, llama.cpp's of a batch"),
        PlanLine("headroom", headroom, "never planned for: allocator and Python growth"),
        PlanLine(
            "left free",
            free,
            "all experts fit; more would not help" if share == 1.0 else "less than one page",
        ),
    )
    return ExpertPlan(
        budget=budget,
        lines=lines,
        n_ctx=chosen.n_ctx,
        n_ubatch=chosen.n_ubatch,
        arena_bytes=arena,
        spared_bytes=spared,
        lent_bytes=lent,
        rows_bytes=rows,
        floor_budget=floor_budget,
        resident_share=share,
        prompt_mode=mode,
        notes=tuple(_notes(index, arena, share, chosen, mode, n_ubatch)),
    )


def _rows_bytes(table: Tensor, n_ubatch: int) -> int:
    """Pages for the rows of two batches at worst: this one's, and what those before it left."""
    return 2 * max(n_ubatch, LEAST_ROWS) * pages_of_one(table.row_bytes, table.offset)


def _router_copies(index: ExpertIndex) -> int:
    """Look-ahead's routers: a byte for each weight and four for each row."""
    routers = (tensor.shape for tensor in index.tensors if tensor.name.endswith(".ffn_gate_inp.weight"))
    return sum(prod(shape) + 4 * shape[-1] for shape in routers)


def safe_mebibytes(floor_budget: int) -> int:
    """Round up to what is enough in every process."""
    return -(-(floor_budget + PROCESSES_DIFFER) // MIB)


def budget_holding(plan: ExpertPlan, arena_bytes: int, plan_within: Callable[[int], ExpertPlan]) -> int:
    """Find a budget whose arena has so many bytes in every process: the plan's own, or whole MiB.

    Each is planned before it is named: it may be given a longer context or a wider batch as well.

    Parameters
    ----------
    plan : ExpertPlan
        For the budget that there is.
    arena_bytes : int
        Of experts.
    plan_within : callable
        ``plan_within(bytes)`` plans a larger one.
    """
    if plan.arena_bytes >= arena_bytes:
        return plan.budget.bytes
    wanted = arena_bytes + PROCESSES_DIFFER
    while plan.arena_bytes < wanted and plan.resident_share < 1:
        more = (wanted - plan.arena_bytes) * 64 // 63  # headroom grows, too
        plan = plan_within(-(-(plan.budget.bytes + more) // MIB) * MIB)
    return plan.budget.bytes


def headroom_of(budget_bytes: int) -> int:
    """Memory that is never planned for, bytes: 4 MiB or a 64th of the budget, whichever is more."""
    return max(4 * MIB, budget_bytes // 64)


def expert_pages(index: ExpertIndex) -> tuple[int, ...]:
    """Memory that one expert of each MoE layer takes in the arena, at most, bytes."""
    return SlabPages(index).of_one_expert()


def kernel_scratch(index: ExpertIndex, n_ctx: int, n_ubatch: int, flash_attn: bool) -> int:
    """Upper bound of ggml's CPU work buffer, bytes: activations converted to the weights' dot-product type.

    ggml-cpu.c, ggml_graph_plan: a MUL_MAT converts its second operand (at most 2 bytes an element); MUL_MAT_ID adds
    a table of 8 bytes for each expert, token and slot.
    """
    tokens = min(n_ubatch, n_ctx)
    widest = max((t.shape[0] for t in index.tensors if len(t.shape) == 2 and t.shape[1] > 1), default=0)
    scratch = 2 * widest * tokens
    for expert in index.experts:
        slots = index.n_expert_used[expert.layer] * tokens
        scratch = max(scratch, 2 * expert.shape[0] * slots + 8 * expert.n_expert * slots)
    if not flash_attn:
        n_head = index.metadata.get(f"{index.architecture}.attention.head_count", 0)
        heads = max(n_head) if isinstance(n_head, tuple) else n_head
        if isinstance(heads, int):
            scratch = max(scratch, 2 * heads * n_ctx * tokens)
    return scratch + (1 << 20)


def _with_headroom(n_bytes: int) -> int:
    return max(n_bytes + 4 * MIB, -(-n_bytes * 64 // 63)) + page_size()


def _halves(n: int) -> Iterator[int]:
    while n >= 1:
        yield n
        n //= 2


def _context_sizes(shortest: int, longest: int) -> list[int]:
    """Give the model's own context and those of its halves that are longer than the shortest, upwards."""
    return [size for size in _halves(longest) if size > shortest][::-1]


def _notes(
    index: ExpertIndex, arena: int, share: float, shape: Footprint, mode: str, n_ubatch: int | None
) -> Iterator[str]:
    if share == 1.0:
        yield "All experts fit: each is read from disk once, on first use."
    elif arena < index.token_cycle_bytes:
        yield (
            f"The arena is smaller than one token cycle ({format_bytes(index.token_cycle_bytes)}, the experts that one"
            " token uses in all layers): most experts are read again for every token. More memory helps a lot."
        )
    elif arena < 2 * index.token_cycle_bytes:
        yield (
            f"The arena holds less than two token cycles (one is {format_bytes(index.token_cycle_bytes)}): expect many"
            " misses. A little more memory helps a lot."
        )
    if mode == "per-tensor":
        yield "A full prompt batch may select more experts than fit: they are then served one expert tensor at a time."
    if mode == "small-batches":
        yield (
            f"n_ubatch is {shape.n_ubatch} instead of {n_ubatch or DEFAULT_UBATCH}: the compute buffers and experts of"
            " a wider prompt batch would take too much of this budget."
        )
