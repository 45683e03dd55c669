"""Measures what watching the routers costs a prompt: profiling beside plain prefill, and asking for a prompt's task.

    python -m benchmarks.observe model.gguf

Every way evaluates the same prompt of random tokens, everything in memory, in turn in one process, with the same batch
and threads. `plain` is llama.cpp; `edgemoe` the same through the store; `routers` and `outputs` are what `edgemoe
profile` does with a piece of text, without and with what the experts give; `first` asks the first router alone which
stored task the prompt is of, and `heard` is a prefill whose routers are all heard and matched at its end: a
conversation begins with both. Lines for people go to standard error, the last line of standard output is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.measurements import say, show, spread
from edgemoe.backend import Llama
from edgemoe.bench_arm import Settings, ask_plan
from edgemoe.bench_child import open_edgemoe, open_plain
from edgemoe.bench_machine import describe
from edgemoe.evidence import Source
from edgemoe.fingerprint import fingerprint
from edgemoe.index import read_index
from edgemoe.pattern import make_pattern
from edgemoe.patterns import PatternStore
from edgemoe.profiling import Piece, Spool, record, scores_of, shares_of
from edgemoe.routed_shares import RoutedShares

N_TASKS, N_DOCUMENTS = 3, 8


def piece_of(tokens: list[int]) -> Piece:
    return Piece("0" * 32, tuple(tokens), slice(0, len(tokens)), 0)


def make_tasks(llama: Llama, folder: Path) -> None:
    """Store tasks of random text: matching costs the same whatever they are about."""
    store = PatternStore(fingerprint(llama.index), folder)
    random = np.random.default_rng(1)
    for task in range(N_TASKS):
        spool = Spool(folder / f".{task}")
        pieces = [
            Piece(f"{number:032}", tuple(random.integers(0, llama.n_vocab(), 64).tolist()), slice(0, 64), 0)
            for number in range(N_DOCUMENTS)
        ]
        for piece in pieces:
            spool.add(piece, record(llama, piece))
            spool.take(piece)
        scores, shares = scores_of(spool), shares_of(spool, pieces)
        source = Source(f"task{task}", f"{task:064}", N_DOCUMENTS, 64 * N_DOCUMENTS, False, False)
        store.save(make_pattern(f"task{task}", store.model, "peu", scores, source, shares))
        spool.remove()


def measure(settings: Settings, n_tokens: int, rounds: int, folder: Path) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(0, read_index(Path(settings.model)).n_vocab, n_tokens).tolist()

    def fresh(llama: Any) -> None:
        llama.reset()
        llama.eval(tokens)

    def heard(llama: Llama) -> None:
        assert llama.task_mode is not None
        layers = llama.index.running_layers
        shares = RoutedShares(layers, llama.index.n_expert, llama.task_mode.k_a)
        with llama.tap.watch(shares.add, layers):
            fresh(llama)
        llama.task_mode.match_of(shares)

    with contextlib.ExitStack() as stack:
        profiler = stack.enter_context(open_edgemoe(settings, logits_all=True))
        make_tasks(profiler, folder)
        llama = stack.enter_context(open_edgemoe(settings, experts="auto", tasks=folder))
        plain = stack.enter_context(contextlib.closing(open_plain(settings)))
        ways: dict[str, Callable[[], object]] = {
            "plain": lambda: fresh(plain),
            "edgemoe": lambda: fresh(llama),
            "routers": lambda: record(profiler, piece_of(tokens), outputs=False),
            "outputs": lambda: record(profiler, piece_of(tokens)),
            "first": lambda: llama.match(tokens, first=True),
            "heard": lambda: heard(llama),
        }
        for way in ways.values():
            way()  # reads the experts, compiles
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            for name in sorted(ways, reverse=turn % 2 == 1):
                started = time.perf_counter()
                ways[name]()
                seconds[name].append(time.perf_counter() - started)
    ratios = {
        name: spread([ours / theirs for ours, theirs in zip(seconds[name], seconds["plain"], strict=True)])
        for name in ways
        if name != "plain"
    }
    say(f"plain prefill of {n_tokens} tokens: {show(spread(seconds['plain']))} s")
    for name, ratio in ratios.items():
        say(f"  {name:8} / plain: {show(ratio)}")
    return {"n_tokens": n_tokens, "seconds": seconds, "ratio": ratios}


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", type=int, default=512, show_default=True)
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option("--threads", type=int, default=len(os.sched_getaffinity(0)), show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def main(model: Path, tokens: int, rounds: int, threads: int, out: Path | None) -> None:
    settings = Settings(str(model.resolve()), n_ctx=tokens, n_ubatch=tokens, n_threads=threads)
    # The other models and what was imported lie in this process too, and count.
    settings = settings.within(3 * ask_plan(settings)["everything"] + (1 << 30))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings, tokens, rounds, Path(folder))
    shape = {"n_ctx": tokens, "n_ubatch": tokens, "n_threads": threads}
    written = {"benchmark": "observe", **describe(model), "settings": shape, **result}
    click.echo(json.dumps(written))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
