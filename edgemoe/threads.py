"""How many threads compute, unless somebody says otherwise."""

from __future__ import annotations

import os

__all__ = ["default_threads"]


def default_threads() -> int:
    """Physical cores that this process may use: two busy threads on one core only wait for each other."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return min(cores, allowed)
