"""Measures what a wrongly recognised task costs, with and without the right to say "none of them".

    python -m benchmarks.wrong_task model.gguf --store tasks --text held-out

Each task's held-out documents are matched by the routing of their first tokens, by all layers: once among all tasks,
and once with their own task left out of the store. What the matched task's set costs on that very document is measured;
a document that is rejected costs nothing, because all experts stay allowed. Lines for people go to standard error, the
last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import click

from benchmarks.measurements import say
from edgemoe.arms import spread
from edgemoe.backend import Llama
from edgemoe.bench_machine import describe
from edgemoe.documents import read_documents
from edgemoe.expert_set import ExpertLayers
from edgemoe.fingerprint import fingerprint
from edgemoe.index import read_index
from edgemoe.matcher import Match, TaskDocuments, TaskMatcher
from edgemoe.patterns import PatternStore
from edgemoe.perplexity import measure
from edgemoe.profiling import Piece, record
from edgemoe.routed_shares import routed_shares

FEWEST = 64  # tokens of a document that is measured
WAYS = ("own task's set", "matched", "matched or rejected", "own left out: matched", "own left out: or rejected")


def run(model: Path, store: Path, text: Path, keep: int, n_documents: int, window: int, threads: int) -> dict[str, Any]:
    index = read_index(model)
    layers = ExpertLayers.of(index)
    patterns = {pattern.task: pattern for pattern in PatternStore(fingerprint(index), store).list().patterns}
    sets = {
        task: spread(pattern, pattern.criterion, "measured" if pattern.sensitivity else "uniform", layers, keep)
        for task, pattern in patterns.items()
    }
    documents = {task: TaskDocuments.of(pattern) for task, pattern in patterns.items()}
    everyone = TaskMatcher(documents)
    rows: dict[str, dict[str, list[float]]] = {}
    matches: dict[str, list[dict[str, Any]]] = {}
    with Llama(
        str(model), ram="50%", n_ctx=window, n_threads=threads, n_threads_batch=threads, logits_all=True
    ) as llama:
        for task in patterns:
            others = TaskMatcher({name: kept for name, kept in documents.items() if name != task})
            rows[task], matches[task] = {way: [] for way in WAYS}, []
            for document in read_documents([text / f"{task}.jsonl"]):
                tokens = llama.tokenize(document.text.encode(), add_bos=False, special=True)[: window + 1]
                if len(tokens) <= FEWEST:
                    continue
                counted = slice(0, len(tokens) - 1)
                routed = record(llama, Piece("0" * 32, tuple(tokens[counted]), counted, 0), outputs=False)
                vector = routed_shares(routed, counted)
                known, unknown = (matcher.match(vector, routed.n_token) for matcher in (everyone, others))
                names = list(dict.fromkeys((task, known.nearest, unknown.nearest)))
                cost = dict(zip(names, measure(llama, [tokens], [sets[name] for name in names]), strict=True))
                loss = {name: figures.loss for name, figures in cost.items()}
                for way, value in zip(WAYS, (loss[task], *costs(known, loss), *costs(unknown, loss)), strict=True):
                    rows[task][way].append(value)
                matches[task].append({"known": known.task, "unknown": unknown.task, "nearest": unknown.nearest})
                if len(matches[task]) == n_documents:
                    break
            say(f"{task:12} " + "  ".join(f"{way} {show(rows[task][way])}" for way in WAYS))
    means = {way: statistics.fmean(statistics.fmean(rows[task][way]) for task in rows) for way in WAYS}
    say(f"{'mean':12} " + "  ".join(f"{way} {math.expm1(value):+.1%}" for way, value in means.items()))
    return {"keep": keep, "mean": means, "rows": rows, "matches": matches}


def costs(match: Match, loss: dict[str, float]) -> tuple[float, float]:
    """Nats per token with the nearest task's set, and with none where the match is rejected."""
    return loss[match.nearest], 0.0 if match.task is None else loss[match.task]


def show(losses: list[float]) -> str:
    return f"{math.expm1(statistics.fmean(losses)):+.1%}"


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--store", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--text", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--keep", type=int, default=16, show_default=True)
@click.option("--documents", type=int, default=12, show_default=True, help="Of each task.")
@click.option("--window", type=int, default=512, show_default=True)
@click.option("--threads", type=int, default=len(os.sched_getaffinity(0)), show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def main(
    model: Path, store: Path, text: Path, keep: int, documents: int, window: int, threads: int, out: Path | None
) -> None:
    result = run(model, store, text, keep, documents, window, threads)
    written = {"benchmark": "wrong_task", **describe(model), **result}
    click.echo(json.dumps(written))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
