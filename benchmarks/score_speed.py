"""Measures the compiled loops of trace.py and score.py beside their numpy form, on two real shapes.

    python -m benchmarks.score_speed

Logits are random, in chunks of the size of a decode batch, together far larger than the processor's cache. Lines for
people go to standard error, the last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy_kernels import score  # of the tests, which compare what both give

from benchmarks.measurements import say, show, spread
from edgemoe.bench_machine import REPOSITORY, describe
from edgemoe.score import CRITERIA
from edgemoe.trace import ExpertOutputs, RoutedTokens, RouterTrace, top_k

SHAPES = {"Qwen3-30B-A3B": (48, 128, 8), "DeepSeek-R1": (58, 256, 8)}  # MoE layers, experts, experts per token
CHUNK = 512
WAYS = {"numba": True, "numpy": False}


def random_text(n_layer: int, n_expert: int, k: int, n_token: int) -> list[RouterTrace]:
    """Chunks of logits and expert outputs."""
    rng = np.random.default_rng(0)

    def chunk(n: int) -> RouterTrace:
        logits = rng.standard_normal((n_layer, n, n_expert), dtype=np.float32)
        ids = rng.integers(0, n_expert, (n_layer, n, k), dtype=np.int32)
        weights, norms = rng.random((2, n_layer, n, k), dtype=np.float32)
        change = rng.random((n_layer, n), dtype=np.float32)
        return RouterTrace(tuple(range(n_layer)), logits, ExpertOutputs(ids, weights, norms, change))

    return [chunk(min(CHUNK, n_token - start)) for start in range(0, n_token, CHUNK)]


def read_bandwidth() -> float:
    """Bytes per second at which all cores together stream over 1 GiB, the best of five."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(1 << 28, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:

        def once() -> float:
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            return time.perf_counter() - started

        return (4 << 28) / min(once() for _ in range(5))


def compare(steps: dict[str, Callable[[bool], object]], n_token: int, pairs: int) -> dict[str, Any]:
    """Tokens per second of each step, both ways in turn; which goes first alternates."""
    result = {}
    for name, step in steps.items():
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        step(True)  # compiles
        for pair in range(pairs):
            for way in sorted(WAYS, reverse=pair % 2 == 1):
                started = time.perf_counter()
                step(WAYS[way])
                speeds[way].append(n_token / (time.perf_counter() - started))
        ratio = spread([ours / theirs for ours, theirs in zip(speeds["numba"], speeds["numpy"], strict=True)])
        result[name] = {"tokens_per_s": speeds, "ratio": ratio}
        for way in WAYS:
            thousands = spread([speed / 1000 for speed in speeds[way]])
            say(f"  {name:10} {way:6} {show(thousands)} thousand tokens/s")
        say(f"  {name:10} numba / numpy: {show(ratio)}")
    return result


def measure(shape: tuple[int, int, int], n_token: int, pairs: int) -> dict[str, Any]:
    """All steps of one shape, and how near the reduction of logits comes to the memory's speed."""
    n_layer, n_expert, k = shape
    text = random_text(n_layer, n_expert, k, n_token)
    kept: list[RoutedTokens] = [top_k(chunk, k) for chunk in text]
    bandwidth = read_bandwidth()
    result = compare(
        {
            "top_k": lambda compiled: [top_k(chunk, k, compiled=compiled) for chunk in text],
            "peu": lambda compiled: score(kept, CRITERIA["peu"], compiled=compiled),
            "easy-ep": lambda compiled: score(kept, CRITERIA["easy-ep"], compiled=compiled),
        },
        n_token,
        pairs,
    )
    token_bytes = n_layer * n_expert * 4
    median = spread(result["top_k"]["tokens_per_s"]["numba"])["median"]
    share = median * token_bytes / bandwidth
    say(f"  top_k reads {median * token_bytes / 1e9:.1f} GB/s of logits, {share:.0%} of {bandwidth / 1e9:.1f} GB/s")
    return {"n_layer": n_layer, "n_expert": n_expert, "k": k, "read_bandwidth": bandwidth, "share": share, **result}


def first_calls() -> dict[str, float]:
    """Seconds that importing numba and compiling all kernels take, in a process that has not done so."""
    started = time.perf_counter()
    import edgemoe.score_kernels  # noqa: F401

    imported = time.perf_counter() - started
    chunk = random_text(2, 8, 2, 4)[0]
    for name in ("peu", "easy-ep"):
        score([top_k(chunk, 2)], CRITERIA[name])
    return {"import_s": imported, "compile_s": time.perf_counter() - started - imported}


@click.command(help=__doc__)
@click.option("--tokens", type=int, default=4096, show_default=True)
@click.option("--pairs", type=int, default=5, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def main(tokens: int, pairs: int, out: Path | None) -> None:
    first = first_calls()
    say(f"import of numba {first['import_s']:.2f} s, all kernels compiled in {first['compile_s']:.2f} s")
    shapes = {}
    for name, shape in SHAPES.items():
        say(f"{name}: {shape[0]} layers, {shape[1]} experts, top {shape[2]}, {tokens} tokens in chunks of {CHUNK}")
        shapes[name] = measure(shape, tokens, pairs)
    machine = describe(REPOSITORY / "models" / "tiny-moe-q4_k_m.gguf")
    for about_the_model in ("model", "disk_bytes_per_s"):
        del machine[about_the_model]
    record = {"benchmark": "score_speed", **machine, "n_token": tokens, "chunk": CHUNK, **first, "shapes": shapes}
    click.echo(json.dumps(record))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
