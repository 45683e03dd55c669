"""What a result depends on besides the code: processor, memory, disk, kernel, versions, page cache."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import mmap
import os
import platform
import re
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.disk import bandwidth, disk_of, probe
from edgemoe.errors import StoreError
from edgemoe.index import read_index
from edgemoe.memory import machine

__all__ = ["REPOSITORY", "describe", "disk_bandwidth", "make_cold"]

REPOSITORY = Path(__file__).resolve().parent.parent
"""Where the package lies; its commit is a result's, if it is a clone."""

_TRIES = 10
_MEASURED_SECONDS = 2.0


def describe(model: Path) -> dict[str, Any]:
    """Describe the machine, the versions and the model, for the head of a result."""
    index = read_index(model)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "ram": machine().total,
        "kernel": f"{platform.system()} {_version(platform.release())} {platform.machine()}",
        # Told from others, but results are published: no serial number.
        "disk": hashlib.sha256(disk_of(index.largest_file).encode()).hexdigest()[:8],
        "disk_bytes_per_s": disk_bandwidth(index.largest_file),
        "python": platform.python_version(),
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "model": {
            "name": index.name,
            "architecture": index.architecture,
            "quantization": index.quantization,
            "n_layer": index.n_layer,
            "n_expert": index.n_expert,
            "file_bytes": index.file_bytes,
            "dense_bytes": index.dense_bytes,
            "expert_bytes": index.expert_bytes,
            "token_cycle_bytes": index.token_cycle_bytes,
        },
    }


def _version(release: str) -> str:
    """Give the numbers alone: what follows them is a name of somebody's own."""
    found = re.match(r"[\d.]+", release)
    return found[0] if found else release


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Give the commit of this clone, or the version that is installed, maybe below somebody else's clone.

    So too where git is not there, or refuses to answer: it does in a clone that another user owns.
    """
    if (REPOSITORY / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    return importlib.metadata.version("edgemoe")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def disk_bandwidth(path: Path) -> float | None:
    """Bytes per second of O_DIRECT reads of the file, the way that suits its disk best; None where it refuses them."""
    best = probe(path)
    try:
        return bandwidth(path, best.lanes, best.read_bytes, _MEASURED_SECONDS)
    except StoreError:
        return None


def make_cold(path: Path) -> None:
    """Drop one file from the page cache, which takes no special right.

    Raises
    ------
    StoreError
        When parts of it stay there, because a process has them mapped.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        for _ in range(_TRIES):
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            cached = _cached_share(file)
            if not cached:
                return
            time.sleep(1)  # what was just written is let go a little later
    finally:
        os.close(file)
    raise StoreError(f"{cached:.0%} of {path} stays in the page cache; end the programs that use it")


def _cached_share(file: int) -> float:
    """Share of a file's pages that are in the page cache; 0 for somebody else's file, where the system may not tell.

    A mapping is asked (mincore). Reading with RWF_NOWAIT would have recent kernels read ahead what it asks about.
    """
    status = os.fstat(file)
    if os.geteuid() not in (0, status.st_uid):
        return 0.0
    resident = np.zeros(-(-status.st_size // mmap.PAGESIZE), dtype=np.uint8)
    with mmap.mmap(file, status.st_size, prot=mmap.PROT_READ) as pages:
        address = ctypes.c_void_p(np.frombuffer(pages, dtype=np.uint8).ctypes.data)
        n_bytes, found = ctypes.c_size_t(status.st_size), ctypes.c_void_p(resident.ctypes.data)
        if ctypes.CDLL(None, use_errno=True).mincore(address, n_bytes, found):
            raise OSError(ctypes.get_errno(), "mincore failed")
    return float(np.mean(resident & 1))
