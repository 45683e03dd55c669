"""Figures of made-up runs."""

from __future__ import annotations

import pytest
from bench_models import made_up_run

from edgemoe.bench_figures import Figures, figures_of
from edgemoe.bench_roofline import Roofline
from edgemoe.bench_run import Run

ROOFLINE = Roofline(0.04, 8.0, 5.0, 0.5, 0.7, 1.5, 200, 100.0)  # LRU 0.08 s, Belady 0.05 s, prompt 2 s


def figures(*runs: Run, roofline: Roofline | None = ROOFLINE) -> dict[str, Figures]:
    return {found.arm: found for found in figures_of(runs, n_prompt=32, roofline=roofline)}


def test_speeds_and_their_spread() -> None:
    slow, fast = made_up_run("all", 0.2), made_up_run("all", 0.1)
    found = figures(slow, fast, fast)["all"]
    assert found.tokens_per_s == pytest.approx(10)
    assert found.round_tokens_per_s == pytest.approx((5, 10, 10))
    assert (found.slow_tokens_per_s, found.fast_tokens_per_s) == pytest.approx((5, 10))
    assert found.mean_s == pytest.approx(0.4 / 3)
    assert found.first_tokens_per_s == pytest.approx(10)
    assert found.prompt_tokens_per_s == 8
    assert found.n_tokens == 100


def test_arms_against_each_other() -> None:
    found = figures(made_up_run("mmap", 2.0), made_up_run("plain", 0.2), made_up_run("all", 0.1))
    assert found["all"].to_mmap == pytest.approx(20) and found["all"].to_plain == pytest.approx(2)
    assert found["mmap"].to_mmap is None and found["mmap"].hit_rate is None and found["mmap"].eaten_by is None


def test_an_arm_that_ran_out_of_time_is_compared_token_by_token() -> None:
    slow, fast = made_up_run("mmap", 2.0, n_tokens=16), made_up_run("all", 0.1)
    fast.token_s[:16] = [0.5] * 16  # the cache was cold
    assert figures(slow, fast)["all"].to_mmap == pytest.approx(4)


def test_costs() -> None:
    found = figures(made_up_run("auto", 0.1))["auto"]
    assert (found.hit_rate, found.bytes_per_token, found.prompt_bytes) == (0.75, 1000, 5000)
    assert (found.wait_share, found.busy_share, found.system_share) == pytest.approx((0.5, 0.25, 0.2))
    assert found.stolen_share is None
    assert (found.of_lru, found.of_belady) == pytest.approx((0.8, 0.5))
    # What was read for the prompt's sake before it counts too.
    assert found.of_prompt == pytest.approx(2 / 4.5) and found.first_token_s == 6.5
    assert (found.peak, found.peak_rss) == (10, 9)


def test_what_eats_the_time() -> None:
    assert figures(made_up_run("all", 0.1))["all"].eaten_by == "waiting"  # 0.05 s of it, compute 0.04
    assert figures(made_up_run("all", 0.06))["all"].eaten_by == "compute"
    assert figures(made_up_run("all", 1.0))["all"].eaten_by == "waiting"
    quick = made_up_run("all", 1.0)
    quick.wait_s = 1.0
    assert figures(quick)["all"].eaten_by == "other"


def test_what_eats_the_prompt_s_time() -> None:
    found = figures(made_up_run("mmap"), made_up_run("all"), made_up_run("auto"))
    assert (found["all"].prompt_s, found["all"].prompt_wait_s, found["all"].prompt_other_s) == (4.0, 1.5, 1.0)
    # Reading a task's experts is waiting too.
    assert (found["auto"].prompt_s, found["auto"].prompt_wait_s, found["auto"].prompt_other_s) == (4.5, 2.0, 1.0)
    assert found["auto"].prompt_eaten_by == "waiting"
    assert (found["mmap"].prompt_s, found["mmap"].prompt_other_s, found["mmap"].prompt_eaten_by) == (4.0, None, None)
    unknown = figures(made_up_run("all"), roofline=None)["all"]
    assert (unknown.prompt_wait_s, unknown.prompt_other_s, unknown.prompt_eaten_by) == (1.5, None, None)


@pytest.mark.parametrize(("wait_s", "eaten_by"), [(0.5, "other"), (2.0, "waiting"), (1.25, "compute")])
def test_the_largest_part_eats_it(wait_s: float, eaten_by: str) -> None:
    run = made_up_run("all")
    run.prompt_wait_s = wait_s
    assert figures(run)["all"].prompt_eaten_by == eaten_by


def test_logits_are_compared_as_far_as_both_went() -> None:
    short = made_up_run("mmap", n_tokens=16)
    found = figures(short, made_up_run("all"), made_up_run("task", checksum=2))
    assert (found["mmap"].same_logits, found["all"].same_logits, found["task"].same_logits) == (True, True, False)
    assert figures(made_up_run("task"))["task"].same_logits is None


def test_a_short_run_has_no_first_64() -> None:
    assert figures(made_up_run("mmap", n_tokens=16))["mmap"].first_tokens_per_s is None


def test_a_dead_arm_is_a_row() -> None:
    dead = Run("mmap", failure="the kernel killed it", peak=7)
    found = figures(dead, made_up_run("all"), roofline=None)
    assert found["mmap"].failures == ("the kernel killed it",) and found["mmap"].tokens_per_s is None
    assert found["mmap"].peak == 7 and found["all"].to_mmap is None and found["all"].of_lru is None
    # One that died in one round of two still has the other's figures.
    again = figures(dead, made_up_run("mmap"))["mmap"]
    assert again.tokens_per_s == pytest.approx(10) and len(again.failures) == 1
