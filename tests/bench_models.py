"""A model of one's own to bench, and runs that were never run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from plain_llama import TINY_MOE

from edgemoe.bench_machine import make_cold
from edgemoe.bench_run import Run
from edgemoe.errors import StoreError


def coolable_model(folder: Path) -> Path:
    """Copy the embedded model to where no other test uses it; skips where files cannot leave the page cache."""
    path = folder / "tiny-moe.gguf"
    shutil.copyfile(TINY_MOE, path)
    try:
        make_cold(path)
    except StoreError as error:
        pytest.skip(str(error))
    return path


def made_up_run(arm: str, seconds: float = 0.1, n_tokens: int = 100, checksum: int = 1) -> Run:
    """A run whose every token takes that long; half of it is waiting, unless plain llama.cpp is meant."""
    edgemoe = arm != "mmap"
    return Run(
        arm,
        load_s=2.0,
        warm_s=0.5 if arm == "auto" else 0.0,
        prompt_s=4.0,
        token_s=[seconds] * n_tokens,
        checksums=[checksum] * n_tokens,
        hits=75 if edgemoe else None,
        misses=25 if edgemoe else None,
        bytes_read=1000 * n_tokens,
        prompt_bytes_read=5000,
        wait_s=seconds * n_tokens / 2 if edgemoe else None,
        busy_s=seconds * n_tokens / 4 if edgemoe else None,
        prompt_wait_s=1.5 if edgemoe else None,
        system_s=seconds * n_tokens / 5 * len(os.sched_getaffinity(0)),
        stolen_s=None,
        peak=10,
        peak_rss=9,
        times_full=0,
        details={"n_threads": 2},
    )
