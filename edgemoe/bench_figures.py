"""What the runs of an arm come to: speeds with their spread, and how near they are to the roofline."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from edgemoe.bench_arm import MMAP
from edgemoe.bench_roofline import Roofline
from edgemoe.bench_run import Run

__all__ = ["EXACT", "FIRST", "Figures", "figures_of", "median_of"]

FIRST = 64
"""Tokens of an answer's beginning."""

EXACT = (MMAP, "plain", "blind", "lru", "all")
"""Whose logits the others are compared with."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One arm's figures over all rounds; medians of the rounds where nothing else is said, None where unknown.

    Attributes
    ----------
    arm : str
        Its name.
    failures : tuple of str
        Of runs that ended early.
    n_tokens : int
        Tokens decoded in the shortest run.
    tokens_per_s, slow_tokens_per_s, fast_tokens_per_s : float
        Decode speed at the median, the 90th and the 10th percentile of the seconds per token of all rounds.
    round_tokens_per_s : tuple of float
        At each round's median.
    mean_s : float
        Mean seconds per decoded token.
    first_tokens_per_s : float
        Over the first 64 tokens.
    prompt_tokens_per_s, first_token_s, load_s, warm_s : float
        Speed of the prompt; seconds, see `Run`.
    bytes_per_token, prompt_bytes : float
        Read from the disk.
    prompt_s, prompt_wait_s, prompt_other_s : float
        Seconds of the prompt, a task's experts having been read included; those of them that computation waited for
        experts; what is left when computing with every expert in memory is taken away too.
    hit_rate : float
        0 to 1.
    peak, peak_rss : int
        The largest of all rounds, bytes.
    wait_share, busy_share : float
        Part of the decoding time that computation waited for experts, and that the disk was at work.
    system_share, stolen_share : float
        Part of all processors' time that the kernel took for the process, and that a virtual machine did not get.
    of_lru, of_belady : float
        Share reached of the roofline at LRU's and at Belady's misses.
    of_prompt : float
        Share of the roofline reached with the prompt.
    eaten_by, prompt_eaten_by : str
        What takes most of a token's time, and of the prompt's: ``compute``, ``waiting`` or ``other``.
    to_mmap, to_plain : float
        Decode speed over that of the other arm, of the tokens that both decoded.
    same_logits : bool
        Whether the logits are, bit for bit, those of the first of `EXACT` that is there, as far as both decoded.
    details : dict
        Of the last run.
    """

    arm: str
    failures: tuple[str, ...]
    n_tokens: int
    tokens_per_s: float | None
    slow_tokens_per_s: float | None
    fast_tokens_per_s: float | None
    round_tokens_per_s: tuple[float, ...]
    mean_s: float | None
    first_tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    first_token_s: float | None
    load_s: float | None
    warm_s: float | None
    bytes_per_token: float | None
    prompt_bytes: float | None
    prompt_s: float | None
    prompt_wait_s: float | None
    prompt_other_s: float | None
    hit_rate: float | None
    peak: int | None
    peak_rss: int | None
    wait_share: float | None
    busy_share: float | None
    system_share: float | None
    stolen_share: float | None
    of_lru: float | None
    of_belady: float | None
    of_prompt: float | None
    eaten_by: str | None
    prompt_eaten_by: str | None
    to_mmap: float | None
    to_plain: float | None
    same_logits: bool | None
    details: dict[str, Any]


def figures_of(runs: Sequence[Run], n_prompt: int, roofline: Roofline | None) -> list[Figures]:
    """Sum up a cell's runs.

    Parameters
    ----------
    runs : sequence of Run
        Of all arms and rounds.
    n_prompt : int
        Tokens of the prompt.
    roofline : Roofline or None
        Of the cell.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    of_arms = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    exact = next((run.checksums for arm in EXACT for run in runs if run.arm == arm and run.checksums), None)
    return [_of_arm(arm, of_arms, n_prompt, roofline, exact) for arm in arms]


def _of_arm(
    arm: str,
    of_arms: dict[str, list[Run]],
    n_prompt: int,
    roofline: Roofline | None,
    exact: list[int] | None,
) -> Figures:
    runs = of_arms[arm]
    done = [run for run in runs if run.token_s]
    seconds = np.array([second for run in done for second in run.token_s])
    mean = float(seconds.mean()) if len(seconds) else None
    prompt_s = median_of(runs, lambda run: run.prompt_s and run.prompt_s + run.warm_s)
    prompt_wait = median_of(runs, lambda run: None if run.prompt_wait_s is None else run.prompt_wait_s + run.warm_s)
    prompt_parts = _parts(prompt_s, prompt_wait, roofline.prompt_compute_s if roofline else None)

    def of_arm(other: str) -> float | None:
        return _factor(done, [run for run in of_arms.get(other, ()) if run.token_s]) if other != arm else None

    def percentile(share: float) -> float | None:
        return 1 / float(np.quantile(seconds, share)) if len(seconds) else None

    wait = median_of(done, lambda run: None if run.wait_s is None else run.wait_s / sum(run.token_s))
    parts = _parts(mean, mean and wait and wait * mean, roofline.compute_s if roofline else None)
    return Figures(
        arm=arm,
        failures=tuple(run.failure for run in runs if run.failure),
        n_tokens=min((len(run.token_s) for run in done), default=0),
        tokens_per_s=1 / median(seconds) if len(seconds) else None,
        slow_tokens_per_s=percentile(0.9),
        fast_tokens_per_s=percentile(0.1),
        round_tokens_per_s=tuple(1 / median(run.token_s) for run in done),
        mean_s=mean,
        first_tokens_per_s=median_of(
            done, lambda run: FIRST / sum(run.token_s[:FIRST]) if len(run.token_s) >= FIRST else None
        ),
        prompt_tokens_per_s=median_of(runs, lambda run: n_prompt / run.prompt_s if run.prompt_s else None),
        first_token_s=median_of(runs, lambda run: run.first_token_s),
        load_s=median_of(runs, lambda run: run.load_s),
        warm_s=median_of(runs, lambda run: run.warm_s),
        bytes_per_token=median_of(
            done, lambda run: None if run.bytes_read is None else run.bytes_read / len(run.token_s)
        ),
        prompt_bytes=median_of(runs, lambda run: run.prompt_bytes_read),
        prompt_s=prompt_s,
        prompt_wait_s=prompt_wait,
        prompt_other_s=prompt_parts["other"] if prompt_parts else None,
        hit_rate=median_of(
            done, lambda run: None if run.hits is None else run.hits / max(run.hits + (run.misses or 0), 1)
        ),
        peak=max((run.peak for run in runs if run.peak is not None), default=None),
        peak_rss=max((run.peak_rss for run in runs if run.peak_rss is not None), default=None),
        wait_share=wait,
        busy_share=median_of(done, lambda run: None if run.busy_s is None else run.busy_s / sum(run.token_s)),
        system_share=median_of(done, lambda run: _of_processors(run, run.system_s)),
        stolen_share=median_of(done, lambda run: _of_processors(run, run.stolen_s)),
        of_lru=roofline.lru_s / mean if roofline and mean else None,
        of_belady=roofline.belady_s / mean if roofline and mean else None,
        of_prompt=roofline.prompt_s / prompt_s if roofline and prompt_s else None,
        eaten_by=_largest(parts),
        prompt_eaten_by=_largest(prompt_parts),
        to_mmap=of_arm(MMAP),
        to_plain=of_arm("plain"),
        same_logits=_same(done, exact),
        details=runs[-1].details,
    )


def _factor(mine: Sequence[Run], theirs: Sequence[Run]) -> float | None:
    """Give how many times as fast as theirs the tokens are that all runs of both decoded: the first ones are slower."""
    if not mine or not theirs:
        return None
    n = min(len(run.token_s) for run in (*mine, *theirs))
    mine_s, theirs_s = (median(second for run in runs for second in run.token_s[:n]) for runs in (mine, theirs))
    return theirs_s / mine_s


def median_of(runs: Sequence[Run], of: Callable[[Run], float | None]) -> float | None:
    """Give the median of what is known of the runs; None where nothing is."""
    values = [value for run in runs if (value := of(run)) is not None]
    return median(values) if values else None


def _of_processors(run: Run, seconds: float | None) -> float | None:
    return None if seconds is None else seconds / sum(run.token_s) / len(os.sched_getaffinity(0))


def _parts(seconds: float | None, waiting: float | None, compute: float | None) -> dict[str, float]:
    """Divide a time into seconds of ``compute``, ``waiting`` and ``other``; empty where they are not known."""
    if seconds is None or waiting is None or compute is None:
        return {}
    return {"compute": compute, "waiting": waiting, "other": seconds - waiting - compute}


def _largest(parts: dict[str, float]) -> str | None:
    return max(parts, key=lambda part: parts[part], default=None)


def _same(runs: Sequence[Run], exact: list[int] | None) -> bool | None:
    if exact is None or not runs:
        return None
    return all(mine == theirs for run in runs for mine, theirs in zip(run.checksums, exact, strict=False))
