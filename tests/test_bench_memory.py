"""Memory that is let go as a run takes it."""

from __future__ import annotations

import time

from edgemoe.bench_memory import HeldMemory
from edgemoe.memory import current_rss

MIB = 1 << 20


def wait_for(held: HeldMemory, n_bytes: int) -> bool:
    until = time.monotonic() + 20
    while held.held > n_bytes and time.monotonic() < until:
        time.sleep(0.01)
    return held.held == n_bytes


def test_memory_is_let_go_as_it_is_taken() -> None:
    before = current_rss()
    taken = 0
    with HeldMemory(1024 * MIB, lambda: taken) as held:
        assert held.held == 768 * MIB
        assert current_rss() - before > 700 * MIB
        taken = 300 * MIB
        assert wait_for(held, 448 * MIB)
        assert current_rss() - before < 500 * MIB
        taken = 100 * MIB  # what was let go is not taken again
        time.sleep(0.1)
        assert held.held == 448 * MIB
        taken = 2048 * MIB
        assert wait_for(held, 0)
    assert current_rss() - before < 50 * MIB


def test_closed_before_anything_is_taken() -> None:
    before = current_rss()
    held = HeldMemory(512 * MIB, lambda: 0)
    held.close()
    held.close()
    assert held.held == 0
    assert current_rss() - before < 50 * MIB


def test_little_memory_is_not_held() -> None:
    with HeldMemory(100 * MIB, lambda: 0) as held:
        assert held.held == 0
