"""The fastest that a budget allows: computing with every expert in memory, or reading what a cache misses.

Seconds per token cannot fall below max(compute, bytes missed / disk bandwidth) (Williams et al., "Roofline", CACM
2009, with the disk in place of memory); which bytes are missed is replayed for LRU and for Belady's optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgemoe import cache_replay
from edgemoe.routes import Ids, Routes

__all__ = ["BOUNDS", "Roofline", "prompt_bytes", "roofline", "with_last_layer"]


BOUNDS = ("lru_s", "belady_s", "bound", "prompt_pass_s", "prompt_s")
"""What a `Roofline` says beyond its fields."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Lower bounds of the mean seconds per decoded token, and of a prompt's.

    Attributes
    ----------
    compute_s : float
        A token with every expert in memory.
    lru_bytes, belady_bytes : float
        Bytes missed per token.
    lru_hit_rate, belady_hit_rate : float
        0 to 1.
    prompt_compute_s : float
        The prompt with every expert in memory.
    prompt_bytes : int
        Experts that the prompt touches, each read once for every physical batch.
    bytes_per_s : float
        Bandwidth of the disk.
    """

    compute_s: float
    lru_bytes: float
    belady_bytes: float
    lru_hit_rate: float
    belady_hit_rate: float
    prompt_compute_s: float
    prompt_bytes: int
    bytes_per_s: float

    @property
    def lru_s(self) -> float:
        """Seconds per token at LRU's misses."""
        return max(self.compute_s, self.lru_bytes / self.bytes_per_s)

    @property
    def belady_s(self) -> float:
        """Seconds per token at the fewest misses possible."""
        return max(self.compute_s, self.belady_bytes / self.bytes_per_s)

    @property
    def bound(self) -> str:
        """Which term is the larger at Belady's misses: ``compute`` or ``disk``."""
        return "disk" if self.belady_bytes / self.bytes_per_s > self.compute_s else "compute"

    @property
    def prompt_pass_s(self) -> float:
        """Seconds that the disk takes for one pass over the experts that the prompt touches."""
        return self.prompt_bytes / self.bytes_per_s

    @property
    def prompt_s(self) -> float:
        """Seconds of the prompt: that pass, or its computation."""
        return max(self.prompt_pass_s, self.prompt_compute_s)


def roofline(
    routes: Routes,
    expert_bytes: Sequence[int],
    arena_bytes: int,
    n_ubatch: int,
    bytes_per_s: float,
    compute_s: float,
    prompt_compute_s: float,
) -> Roofline:
    """Replay the routes, prompt first, and bound the decoded tokens' time.

    Parameters
    ----------
    routes : Routes
        What every arm was routed to; see `with_last_layer`.
    expert_bytes : sequence of int
        Bytes of one expert of each layer, all its parts.
    arena_bytes, n_ubatch : int
        Memory for experts; tokens of a physical batch.
    bytes_per_s, compute_s, prompt_compute_s : float
        As in `Roofline`.

    Raises
    ------
    TraceError
        If the routes do not fit the sizes.
    """
    lru = cache_replay.lru(routes.decode, expert_bytes, arena_bytes, routes.prompt)
    best = cache_replay.belady(routes.decode, expert_bytes, arena_bytes, routes.prompt)
    return Roofline(
        compute_s=compute_s,
        lru_bytes=float(lru.bytes_missed.mean()),
        belady_bytes=float(best.bytes_missed.mean()),
        lru_hit_rate=lru.hit_rate,
        belady_hit_rate=best.hit_rate,
        prompt_compute_s=prompt_compute_s,
        prompt_bytes=prompt_bytes(routes.prompt, expert_bytes, n_ubatch),
        bytes_per_s=bytes_per_s,
    )


def prompt_bytes(prompt: Ids, expert_bytes: Sequence[int], n_ubatch: int) -> int:
    """Bytes of the experts that a prompt touches, each once for every physical batch.

    Parameters
    ----------
    prompt : int32 array [tokens, layers, k]
        Experts of its tokens.
    expert_bytes : sequence of int
        Bytes of one expert of each layer.
    n_ubatch : int
        Tokens of a physical batch.
    """
    batches = [prompt[start : start + n_ubatch] for start in range(0, len(prompt), n_ubatch)]
    return sum(len(np.unique(batch[:, layer])) * size for batch in batches for layer, size in enumerate(expert_bytes))


def with_last_layer(prompt: Ids) -> Ids:
    """Give every token the last one's experts in the last layer, where llama.cpp computes only that token."""
    seen = prompt.copy()
    seen[:, -1] = prompt[-1, -1]
    return seen
