"""How many threads compute when nobody says."""

from __future__ import annotations

import os

import psutil
import pytest
from plain_llama import TINY_MOE

from edgemoe import Llama, backend
from edgemoe.threads import default_threads


@pytest.mark.parametrize(
    ("cores", "processors", "allowed", "threads"),
    [(4, 8, 8, 4), (4, 8, 2, 2), (None, 6, 6, 6), (None, None, 3, 1), (2, 2, 4, 2)],
    ids=["two threads a core", "bound to two", "cores unknown", "nothing known", "more allowed than there are"],
)
def test_one_for_each_core_that_may_be_used(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, processors: int | None, allowed: int, threads: int
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: processors if logical else cores)
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    assert default_threads() == threads


def test_system_that_binds_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert default_threads() == 4


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, (3, 3)),
        ({"n_threads": None, "n_threads_batch": 0}, (3, 3)),
        ({"n_threads": 1}, (1, 3)),
        ({"n_threads": 1, "n_threads_batch": 2}, (1, 2)),
    ],
)
def test_llama_takes_them_too(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, int | None], taken: tuple[int, int]
) -> None:
    monkeypatch.setattr(backend, "default_threads", lambda: 3)
    with Llama(str(TINY_MOE), ram="1GiB", n_ctx=32, **given) as llama:
        assert (llama.n_threads, llama.n_threads_batch) == taken
        params = llama.context_params
        assert (params.n_threads, params.n_threads_batch) == taken
