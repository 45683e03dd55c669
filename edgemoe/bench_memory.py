"""Memory that is kept from a virtual machine's host until a run takes it.

A guest hands memory that is free back to its host within seconds (Linux: free page reporting of virtio_balloon), and
the host takes its time to give it again: on the machine that this was written on 2.2 s for each GB that is touched
then, where touching what was free a moment ago takes 0.1. Which arm pays for that, and when, would say nothing of it.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable

import numpy as np

from edgemoe.disk import huge_memory

__all__ = ["HeldMemory"]

_STEP = 64 << 20
_AHEAD = 256 << 20
_EVERY = 0.02
"""Bytes let go at once; bytes that are free for the run to take next; seconds between two looks at what it took."""


class HeldMemory:
    """Memory of this process that is let go as a run takes as much.

    Parameters
    ----------
    n_bytes : int
        How much the run will take at most.
    taken : callable
        Bytes that it has taken so far.
    """

    def __init__(self, n_bytes: int, taken: Callable[[], int]) -> None:
        self._n_bytes = n_bytes
        self._taken = taken
        self._held = max(0, n_bytes - _AHEAD) // _STEP * _STEP
        self._memory = huge_memory(max(self._held, mmap.PAGESIZE))
        for start in range(0, self._held, _STEP):
            np.frombuffer(self._memory, np.uint8, _STEP, start)[:: mmap.PAGESIZE] = 1
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._let_go, daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """Bytes that are held still."""
        return self._held

    def _let_go(self) -> None:
        while self._held and not self._done.wait(_EVERY):
            keep = max(0, self._n_bytes - self._taken() - _AHEAD) // _STEP * _STEP
            if keep < self._held:
                self._memory.madvise(mmap.MADV_DONTNEED, keep, self._held - keep)
                self._held = keep

    def close(self) -> None:
        """Let all of it go; may be called again."""
        self._done.set()
        self._thread.join()
        self._held = 0
        self._memory.close()

    def __enter__(self) -> HeldMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
