"""What a cache of experts would do on given routes: least recently used, and Belady's optimum that knows the future.

All layers share one cache, whose entries are whole experts (all parts). As in the store, a token's experts of a layer
are all in use before any is evicted for one of them, and experts leave until the next one fits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from edgemoe.errors import TraceError

__all__ = ["Replay", "belady", "lru"]

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

Request = list[int]
"""Entries that one layer uses at once; entry = layer * n_expert + expert."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What a cache did, token by token, once it was warm.

    Attributes
    ----------
    hits, misses : int64 array [tokens]
        Experts that were and were not there; their sum is layers * experts per token.
    bytes_missed : int64 array [tokens]
        Bytes read for them.
    """

    hits: Counts
    misses: Counts
    bytes_missed: Counts

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were there, 0 to 1 (1 when none was asked for)."""
        asked = int(self.hits.sum() + self.misses.sum())
        return int(self.hits.sum()) / asked if asked else 1.0


def lru(rows: Ids, slab_bytes_per_layer: Sequence[int], arena_bytes: int, prompt: Ids | None = None) -> Replay:
    """Replay with the least recently used expert leaving.

    Parameters
    ----------
    rows : int32 array [tokens, layers, k]
        Experts of the tokens that are counted.
    slab_bytes_per_layer : sequence of int
        Bytes of one expert of each layer, all its parts.
    arena_bytes : int
        Size of the cache.
    prompt : int32 array [tokens, layers, k] or None
        Served before, as one batch: the union of its experts, ascending, layer by layer. Not counted. What does not
        fit at once passes through.

    Raises
    ------
    TraceError
        If the sizes do not fit the rows, or one layer's experts of one token do not fit the cache.
    """
    requests, size_of = _requests(rows, slab_bytes_per_layer, arena_bytes, prompt)
    resident: OrderedDict[int, None] = OrderedDict()
    free = arena_bytes

    def serve(request: Request) -> list[int]:
        nonlocal free
        missed = [entry for entry in request if entry not in resident]
        # Used now in the order of the request, all of them before any leaves for another.
        for entry in request:
            resident[entry] = None
            resident.move_to_end(entry)
        free -= sum(size_of[entry] for entry in missed)
        while free < 0:
            free += size_of[resident.popitem(last=False)[0]]
        return missed

    return _counted(rows, requests, size_of, serve)


def belady(rows: Ids, slab_bytes_per_layer: Sequence[int], arena_bytes: int, prompt: Ids | None = None) -> Replay:
    """Replay with the expert leaving that is used again last; parameters and errors as `lru`.

    Optimal in the number of misses where all experts have one size; where sizes differ, as near to it as this rule
    comes. First uses are misses too.
    """
    requests, size_of = _requests(rows, slab_bytes_per_layer, arena_bytes, prompt)
    # A prompt's experts need not fit at once, so they are served one by one.
    n_prompt = len(requests) - rows.shape[0] * rows.shape[1]
    requests[:n_prompt] = [[entry] for request in requests[:n_prompt] for entry in request]
    never = len(requests)
    next_use: dict[int, int] = {}
    following: list[list[int]] = [[]] * never
    for at in range(never - 1, -1, -1):
        following[at] = [next_use.get(entry, never) for entry in requests[at]]
        next_use.update(dict.fromkeys(requests[at], at))

    resident: dict[int, int] = {}  # next use of each
    latest: list[tuple[int, int]] = []  # (-next use, entry), some of them outdated
    free = arena_bytes
    uses = iter(following)

    def serve(request: Request) -> list[int]:
        nonlocal free
        missed = [entry for entry in request if entry not in resident]
        for entry in missed:
            free -= size_of[entry]
            while free < 0:
                # What this request uses is the nearest next use of all, and what it brings is not in the heap yet.
                use, victim = heappop(latest)
                if resident.get(victim) == -use:
                    del resident[victim]
                    free += size_of[victim]
        for entry, use in zip(request, next(uses), strict=True):
            resident[entry] = use
            heappush(latest, (-use, entry))
        return missed

    return _counted(rows, requests, size_of, serve)


def _requests(
    rows: Ids, slab_bytes_per_layer: Sequence[int], arena_bytes: int, prompt: Ids | None
) -> tuple[list[Request], list[int]]:
    """All requests in order, those of the prompt first, and the bytes of each entry."""
    n_layer, n_used = rows.shape[1:]
    sizes = [int(size) for size in slab_bytes_per_layer]
    if len(sizes) != n_layer or min(sizes, default=0) < 1 or (prompt is not None and prompt.shape[1] != n_layer):
        raise TraceError(f"rows of {n_layer} layers need as many expert sizes, and a prompt of as many; give these")
    if max(sizes) * n_used > arena_bytes:
        raise TraceError(
            f"{n_used} experts of {max(sizes)} bytes do not fit a cache of {arena_bytes} bytes; give a larger one"
        )
    n_expert = 1 + max(int(ids.max(initial=-1)) for ids in (rows, prompt) if ids is not None)
    first = np.arange(n_layer) * n_expert
    requests: list[Request] = []
    if prompt is not None and len(prompt):
        requests += [(first[layer] + np.unique(prompt[:, layer])).tolist() for layer in range(n_layer)]
    requests += (rows + first[:, None]).reshape(-1, n_used).tolist()
    return requests, np.repeat(sizes, n_expert).tolist()


def _counted(rows: Ids, requests: list[Request], size_of: list[int], serve: Callable[[Request], list[int]]) -> Replay:
    """Serve all requests and count those of the rows."""
    missed = [serve(request) for request in requests][len(requests) - rows.shape[0] * rows.shape[1] :]
    misses = np.array([len(entries) for entries in missed], np.int64).reshape(rows.shape[:2]).sum(1)
    n_bytes = np.array([sum(size_of[entry] for entry in entries) for entries in missed], np.int64)
    return Replay(rows.shape[1] * rows.shape[2] - misses, misses, n_bytes.reshape(rows.shape[:2]).sum(1))
