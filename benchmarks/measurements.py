"""The measurements behind `benchmarks.compare`: each says what it sees, line by line, and returns it for the record."""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgemoe.bench_arm import EDGEMOE, PLAIN, Arm, ArmError, Name, Settings
from edgemoe.bench_machine import make_cold
from edgemoe.memory_cgroup import drop_page_cache, memory_cgroup

MIB = 1 << 20
WARM_UP = 200  # tokens; 8 of 128 experts each


def say(text: str) -> None:
    """A line for people; standard output is left to the JSON."""
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(spread: dict[str, float]) -> str:
    """A `spread` as text."""
    return f"{spread['median']:.3f}  ({spread['min']:.3f} to {spread['max']:.3f})"


def in_turn(pair: int) -> tuple[Name, Name]:
    """Which arm goes first changes from pair to pair, so that a slow drift of the machine favours neither."""
    return (EDGEMOE, PLAIN) if pair % 2 == 0 else (PLAIN, EDGEMOE)


def compare_load(settings: Settings, pairs: int) -> dict[str, Any]:
    """Wall time from the start of a process to a ready context, with the model outside the page cache.

    `answer_s` goes on to the first token after a prompt of 16: edgemoe reads experts only then.
    """
    runs: dict[Name, list[dict[str, float]]] = {EDGEMOE: [], PLAIN: []}
    for pair in range(pairs):
        for name in in_turn(pair):
            make_cold(Path(settings.model))
            with Arm(name, settings) as arm:
                first = arm.prompt(16)["seconds"]
                run = {"load_s": arm.ready["load_s"], "open_s": arm.ready["open_s"]}
                run["answer_s"] = run["load_s"] + first
                runs[name].append(run)
                say(f"{name:10} ready {run['load_s']:7.2f} s   first token {run['answer_s']:7.2f} s")
    result: dict[str, Any] = {"runs": runs}
    for what in ("load_s", "open_s", "answer_s"):
        result[f"{what[:-2]}_ratio"] = spread(
            [ours[what] / theirs[what] for ours, theirs in zip(runs[EDGEMOE], runs[PLAIN], strict=True)]
        )
    say(f"time to a ready context, edgemoe / llama.cpp:  {show(result['load_ratio'])}")
    say(f"time to the first token, edgemoe / llama.cpp:  {show(result['answer_ratio'])}")
    return result


def compare_decode(settings: Settings, pairs: int, n_tokens: int) -> dict[str, Any]:
    """Decode speed with everything in memory: both processes stay alive and take turns over the same tokens."""
    speeds: dict[Name, list[float]] = {EDGEMOE: [], PLAIN: []}
    equal = True
    with ExitStack() as stack:
        arms = {name: stack.enter_context(Arm(name, settings)) for name in (PLAIN, EDGEMOE)}
        for arm in arms.values():
            # Touch all experts. One prompt is not enough: in the last layer only its last token is computed.
            arm.prompt(settings.n_ctx - 1)
            for seed in range(WARM_UP):
                arm.prompt(1, seed)
        before = {name: arm.prompt(16) for name, arm in arms.items()}
        for pair in range(pairs):
            answers = {name: arms[name].decode(n_tokens) for name in in_turn(pair)}
            for name, answer in answers.items():
                speeds[name].append(n_tokens / sum(answer["seconds"]))
            equal &= answers[EDGEMOE]["logits_crc32"] == answers[PLAIN]["logits_crc32"]
            misses = answers[EDGEMOE]["misses"] - before[EDGEMOE]["misses"]
            say("   ".join(f"{name} {speeds[name][-1]:6.2f} tok/s" for name in (EDGEMOE, PLAIN)))
    ratio = spread([ours / theirs for ours, theirs in zip(speeds[EDGEMOE], speeds[PLAIN], strict=True)])
    say(f"decode speed, edgemoe / llama.cpp:  {show(ratio)}")
    say(f"logits {'equal' if equal else 'DIFFER'}; {misses} reads of an expert's tensor while measuring")
    return {"tokens_per_s": speeds, "ratio": ratio, "logits_equal": equal, "misses": misses}


def run_floor(settings: Settings, n_tokens: int) -> dict[str, Any]:
    """A long answer within the smallest budget: does it grow, does it slow down?"""
    step = n_tokens // 5
    with Arm(EDGEMOE, settings) as arm:
        before = arm.prompt(16)
        parts = [arm.decode(step) for _ in range(5)]
    speeds = [step / sum(part["seconds"]) for part in parts]
    growth = parts[-1]["rss"] - parts[0]["rss"]
    for part, speed in zip(parts, speeds, strict=True):
        say(f"{speed:6.2f} tok/s   RSS {part['rss'] / MIB:7.1f} MiB   peak {part['peak_rss'] / MIB:7.1f} MiB")
    say(f"last fifth / first fifth: {speeds[-1] / speeds[0]:.3f} in speed, {growth / MIB:+.2f} MiB of RSS")
    return {
        "ram": settings.ram,
        "tokens_per_s": speeds,
        "last_to_first": speeds[-1] / speeds[0],
        "rss": [before["rss"], *(part["rss"] for part in parts)],
        "peak_rss": parts[-1]["peak_rss"],
        "plan": arm.ready["plan"],
    }


def run_in_cgroup(settings: Settings, prompt: int, n_tokens: int, slack: int) -> dict[str, Any]:
    """One run in a memory cgroup whose limit is the budget (and `slack`, bytes).

    The page cache is dropped before, so that the pages of files and libraries are counted there as well.
    """
    assert settings.ram is not None
    run: dict[str, Any] = {"ram": settings.ram, "everything_counted": drop_page_cache()}
    with memory_cgroup(settings.ram + slack) as group:
        try:
            with Arm(EDGEMOE, settings, group.command) as arm:
                arm.prompt(prompt)
                last = arm.decode(n_tokens)
            run |= {
                "tokens_per_s": n_tokens / sum(last["seconds"]),
                "hit_rate": last["hits"] / max(last["hits"] + last["misses"], 1),
                "peak_rss": last["peak_rss"],
                "arena_peak": last["arena_peak"],
                "logits_crc32": last["logits_crc32"],
                **{key: arm.ready[key] for key in ("n_ubatch", "prompt_mode", "io", "resident_share", "plan")},
            }
        except ArmError as error:
            run["failure"] = str(error)
        run |= {"peak": group.peak(), "times_full": group.times_full(), "killed": group.killed()}
    run["kept"] = "failure" not in run and run["peak"] < settings.ram and run["times_full"] == 0
    return run


def show_memory(run: dict[str, Any]) -> None:
    verdict = "kept" if run["kept"] else f"NOT KEPT: limit met {run['times_full']} times {run.get('failure', '')}"
    details = (
        ""
        if "failure" in run
        else (
            f"RSS {run['peak_rss'] / MIB:8.1f}   {run['tokens_per_s']:6.2f} tok/s   hits {run['hit_rate']:4.0%}"
            f"   ubatch {run['n_ubatch']:3} {run['prompt_mode']:13} "
        )
    )
    say(f"budget {run['ram'] / MIB:8.1f} MiB   peak {run['peak'] / MIB:8.1f}   {details}{verdict}")
