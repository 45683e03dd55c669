"""Measures what aligning a model gains: decode speed from a cold start, before and after ``edgemoe convert align``.

    python -m benchmarks.align_speed model.gguf

Both arms are edgemoe with the same budget, each run a process of its own that starts with an empty arena and the file
outside the page cache. At the floor every expert is read for every token, so reads decide; at half of the experts some
are in memory. Lines for people go to standard error, the last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.measurements import MIB, say, show, spread
from edgemoe.bench_arm import EDGEMOE, Arm, ArmError, Settings, ask_plan
from edgemoe.bench_machine import describe, make_cold

PROMPT = 16


def run(settings: Settings, n_tokens: int) -> dict[str, Any]:
    """One cold start: a short prompt, then tokens, with what was read for them."""
    make_cold(Path(settings.model))
    with Arm(EDGEMOE, settings) as arm:
        before = arm.prompt(PROMPT)
        after = arm.decode(n_tokens)
        hits, misses = (after[what] - before[what] for what in ("hits", "misses"))
        return {
            "tokens_per_s": n_tokens / sum(after["seconds"]),
            "prompt_s": before["seconds"],
            "bytes_per_token": (after["bytes_read"] - before["bytes_read"]) / n_tokens,
            "read_s_per_token": (after["read_s"] - before["read_s"]) / n_tokens,
            "hit_rate": hits / max(hits + misses, 1),
            "logits_crc32": after["logits_crc32"],
            **{key: arm.ready[key] for key in ("load_s", "n_ubatch", "io", "resident_share")},
        }


def compare(settings: Settings, models: dict[str, Path], pairs: int, n_tokens: int) -> dict[str, Any]:
    """Runs of both files at one budget; which goes first alternates."""
    assert settings.ram is not None
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for pair in range(pairs):
        for name in list(models) if pair % 2 == 0 else list(models)[::-1]:
            found = run(replace(settings, model=str(models[name])), n_tokens)
            runs[name].append(found)
            say(
                f"{settings.ram / MIB:8.0f} MiB  {name:7}  {found['tokens_per_s']:7.2f} tok/s  hits"
                f" {found['hit_rate']:4.0%}  {found['bytes_per_token'] / MIB:8.2f} MiB read for a token"
            )
    pairs_of = list(zip(runs["aligned"], runs["stock"], strict=True))
    ratio = spread([aligned["tokens_per_s"] / stock["tokens_per_s"] for aligned, stock in pairs_of])
    equal = len({found["logits_crc32"] for both in runs.values() for found in both}) == 1
    say(f"{settings.ram / MIB:8.0f} MiB  aligned / stock:  {show(ratio)}; logits {'equal' if equal else 'DIFFER'}")
    return {"ram": settings.ram, "ratio": ratio, "logits_equal": equal, "runs": runs}


def layout(path: Path) -> dict[str, Any]:
    """How the experts of a file lie."""
    from edgemoe.index import read_index

    index = read_index(path)
    sizes = [tensor.slab_bytes for tensor in index.experts]
    return {"aligned_slabs": index.aligned_slabs, "slab_bytes": [min(sizes), max(sizes)], "bytes": index.file_bytes}


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--pairs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Decoded tokens of a run.")
@click.option("--io", type=click.Choice(["auto", "direct", "mmap", "pread"]), default="auto", show_default=True)
@click.option("--threads", type=int, default=len(os.sched_getaffinity(0)), show_default="all cores")
@click.option("--ctx", type=int, default=512, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def main(model: Path, pairs: int, tokens: int, io: str, threads: int, ctx: int, out: Path | None) -> None:
    from edgemoe.converters.align import align

    aligned = model.with_name(f"{model.stem}.aligned-for-timing.gguf")
    try:
        align(model, aligned, force=True)
        settings = Settings(str(model.resolve()), n_ctx=ctx, n_ubatch=PROMPT, n_threads=threads, io=io)
        budgets = ask_plan(settings)
        floor = -(-budgets["floor"] // MIB) * MIB + MIB
        models = {"stock": model.resolve(), "aligned": aligned.resolve()}
        result = {
            "benchmark": "align",
            **describe(model),
            "settings": {"n_ctx": ctx, "n_ubatch": PROMPT, "n_threads": threads, "io": io, "n_tokens": tokens},
            "layout": {name: layout(path) for name, path in models.items()},
            "at": {
                name: compare(settings.within(ram), models, pairs, tokens)
                for name, ram in (("floor", floor), ("half", (floor + budgets["everything"]) // 2))
            },
        }
    finally:
        aligned.unlink(missing_ok=True)
    click.echo(json.dumps(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ArmError as error:
        say(f"error: {error}")
        raise SystemExit(1) from None
