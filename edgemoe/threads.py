"""How many threads compute, unless somebody says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from edgemoe.own_cgroup import MEMBERSHIP, ROOT, own_cgroups, read_number, read_text

__all__ = ["default_threads", "processor_quota"]


def default_threads() -> int:
    """Physical cores that this process may use: two busy threads on one core only wait for each other.

    A container's share of them, rounded up, counts as well.
    """
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return min(filter(None, (cores, allowed, processor_quota())))


def processor_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Processors that the tightest of the cgroups around this process grants, rounded up; None without a limit.

    Arguments as `own_cgroups`.
    """
    version, directories = own_cgroups("cpu", root, membership)
    quotas = []
    for directory in directories:
        if version == 1:
            limits = [read_text(directory / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        else:
            limits = read_text(directory / "cpu.max").split()
        # No limit is "-1" in version 1, "max" in version 2.
        time, period = (read_number(limit) for limit in limits) if len(limits) == 2 else (None, None)
        if time and period:
            quotas.append(-(-time // period))
    return min(quotas, default=None)
