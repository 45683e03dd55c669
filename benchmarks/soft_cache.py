"""Measures what a task's pattern is worth as a cache: hit rate and bytes read with it, without it, and with others.

    python -m benchmarks.soft_cache model.gguf --store tasks --text held-out

Held-out text of each task is read token by token from a cold start, every way within the same arena, and every way
gives the same logits. `lru` is `--experts all` where the least recently used leaves and nothing is read ahead, `all` is
`--experts all`; `own`, `wrong` and `common` are `--experts auto` with the text's own task, with the task that is least
like it, and with all tasks merged into one: the experts that are hot whatever the text is about. What is read ahead
counts as read. Lines for people go to standard error, the last line of standard output is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.measurements import MIB, say
from edgemoe.arms import generalist, tasks_by_similarity
from edgemoe.backend import Llama
from edgemoe.bench_machine import describe
from edgemoe.documents import read_documents
from edgemoe.evaluation import held_out_tokens
from edgemoe.fingerprint import fingerprint
from edgemoe.index import read_index
from edgemoe.patterns import PatternStore
from edgemoe.plan import headroom_of
from edgemoe.router_tap import trace_memory
from edgemoe.store import Tuning

COMMON = "common"
WAYS = ("lru", "all", "own", "wrong", COMMON)
N_BATCH = 512
FIRST = 64  # tokens after a cold start


def read(model: Path, ram: int, tokens: list[int], way: str, task: str, store: Path, threads: int) -> dict[str, float]:
    """One text, from a cold start."""
    options: dict[str, Any] = {"experts": "auto", "task": task, "tasks": store}
    if way in ("lru", "all"):
        # What `auto` sets aside: equal arenas.
        options = {"reserved": (trace_memory(read_index(model), N_BATCH),)}
        options["tuning"] = Tuning.plain() if way == "lru" else Tuning()
    with Llama(
        str(model),
        ram=ram,
        n_ctx=len(tokens),
        n_batch=N_BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        **options,
    ) as llama:
        started = time.perf_counter()
        half: Any = None
        for number, token in enumerate(tokens):
            if number == FIRST:
                half = llama.store.stats()
            llama.eval([token])
        seconds = time.perf_counter() - started
        stats = llama.store.stats()
        return {
            "hit_rate": stats.hit_rate,
            "first_hit_rate": half.hit_rate,
            "bytes_per_token": stats.bytes_read / len(tokens),
            "tokens_per_s": len(tokens) / seconds,
            "arena_bytes": llama.plan.arena_bytes,
        }


def run(model: Path, store: Path, text: Path, shares: list[float], n_tokens: int, threads: int) -> dict[str, Any]:
    index = read_index(model)
    known = PatternStore(fingerprint(index), store).list().patterns
    everyone = generalist(known)
    if everyone is None or n_tokens <= FIRST:
        raise click.UsageError(f"at least two tasks and {FIRST + 1} tokens are needed")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = PatternStore(fingerprint(index), Path(folder))
        for pattern in (*known, everyone):
            tasks.save(pattern)
        with Llama(str(model), ram="50%", n_ctx=n_tokens, experts="auto", tasks=folder) as llama:
            # What all but the experts takes, matching included: the same for every way.
            plan = llama.plan
            free = plan.bytes_of("left free") + plan.bytes_of("headroom")
            fixed = plan.budget.bytes - plan.arena_bytes - free
            texts = {
                pattern.task: held_out_tokens(llama, read_documents([text / f"{pattern.task}.jsonl"]))[:n_tokens]
                for pattern in known
            }
        for share in shares:
            planned = fixed + round(share * index.expert_bytes)
            ram = planned + headroom_of(planned)
            rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for pattern in known:
                chosen = {
                    "lru": "",
                    "all": "",
                    "own": pattern.task,
                    "wrong": tasks_by_similarity(pattern, known)[-1].task,
                    COMMON: everyone.task,
                }
                for way, task in chosen.items():
                    rows[way].append(read(model, ram, texts[pattern.task], way, task, tasks.folder, threads))
            means = {
                way: {key: statistics.fmean(row[key] for row in rows[way]) for key in rows[way][0]} for way in WAYS
            }
            result[f"{share:g}"] = means
            say(f"arena of {share:.0%} of the experts")
            for way, mean in means.items():
                say(
                    f"  {way:7} hits {mean['hit_rate']:.1%} (first {FIRST} tokens {mean['first_hit_rate']:.1%}),"
                    f" {mean['bytes_per_token'] / MIB:.3f} MiB read a token, {mean['tokens_per_s']:.0f} tok/s,"
                    f" arena {mean['arena_bytes'] / MIB:.1f} MiB"
                )
    return {"n_tokens": n_tokens, "tasks": [pattern.task for pattern in known], "shares": result}


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--store", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--text", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--shares", default="0.25,0.4,0.6", show_default=True, help="Of the experts that the arena holds.")
@click.option("--tokens", type=int, default=256, show_default=True)
@click.option("--threads", type=int, default=len(os.sched_getaffinity(0)), show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def main(model: Path, store: Path, text: Path, shares: str, tokens: int, threads: int, out: Path | None) -> None:
    result = run(model, store, text, [float(share) for share in shares.split(",")], tokens, threads)
    written = {"benchmark": "soft_cache", **describe(model), **result}
    click.echo(json.dumps(written))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
