"""How many documents does a task's profile need? The cost of sets that were chosen by 1, 5, 10 and all of them.

    python -m benchmarks.calibration_curve model.gguf calibration held-out --store tasks

Both folders hold TASK.jsonl files. Each task's documents are recorded once; the first n rank its experts by PEU.
`uniform` keeps M in every layer; `measured` spends the same on the layers by the loss curves of the task's stored
pattern, where `--store` has one with curves. Every set is measured on the same held-out windows. `common` is the share
of the uniform set that the set of all recorded documents has too. Lines for people go to standard error, the last line
of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click
import numpy as np

from benchmarks.measurements import say
from edgemoe.allocation import ExpertBudget, measured, uniform
from edgemoe.backend import Llama
from edgemoe.bench_machine import describe
from edgemoe.documents import read_documents
from edgemoe.evaluation import begin_of_text, cut_windows, held_out_tokens
from edgemoe.expert_set import ExpertLayers, ExpertSet
from edgemoe.fingerprint import fingerprint
from edgemoe.loss_curves import LossCurves
from edgemoe.patterns import PatternStore
from edgemoe.perplexity import measure
from edgemoe.profiling import Spool, pieces_of, record
from edgemoe.score import CRITERIA, score


def scores_by_documents(llama: Llama, text: Path, counts: list[int]) -> Iterator[np.ndarray]:
    """PEU of the first n documents, [L, N], for each n."""
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder))
        documents = [list(pieces_of(llama, [document], 0)) for document in islice(read_documents([text]), max(counts))]
        for piece in (piece for pieces in documents for piece in pieces):
            spool.add(piece, record(llama, piece, outputs=False))
        for count in counts:
            first = Spool(Path(folder))
            for piece in (piece for pieces in documents[:count] for piece in pieces):
                first.take(piece)
            yield score(first, CRITERIA["peu"]).scores()


def common(chosen: ExpertSet, whole: ExpertSet) -> float:
    return 1 - len(chosen.missing_from(whole)) / chosen.n_kept


def measure_task(
    llama: Llama,
    text: Path,
    held_out: Path,
    counts: list[int],
    budget: ExpertBudget,
    curves: LossCurves | None,
    n_tokens: int,
) -> dict[str, list[float]]:
    layers = ExpertLayers.of(llama.index)
    scores = list(scores_by_documents(llama, text, counts))
    sets = {"uniform": [uniform(one, layers, budget) for one in scores]}
    if curves is not None:
        sets["measured"] = [measured(one, layers, budget, curves) for one in scores]
    tokens = held_out_tokens(llama, read_documents([held_out]))
    windows = cut_windows(tokens, max(1, n_tokens // llama.n_ctx()), llama.n_ctx(), begin_of_text(llama))
    losses = iter(figures.loss for figures in measure(llama, windows, [one for way in sets.values() for one in way]))
    found = {way: [next(losses) for _ in counts] for way in sets}
    return {**found, "common": [common(one, sets["uniform"][-1]) for one in sets["uniform"]]}


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("calibration", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--store", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--documents", default="1,5,10,50", show_default=True, help="How many rank the experts, ascending.")
@click.option("--keep", type=int, default=16, show_default=True)
@click.option("--tokens", type=int, default=4096, show_default=True, help="Held-out text of each task.")
@click.option("--window", type=int, default=512, show_default=True)
@click.option("--tasks", help="Some of them.  [default: all]")
@click.option("--threads", type=int, default=len(os.sched_getaffinity(0)), show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def main(
    model: Path,
    calibration: Path,
    held_out: Path,
    store: Path | None,
    documents: str,
    keep: int,
    tokens: int,
    window: int,
    tasks: str | None,
    threads: int,
    out: Path | None,
) -> None:
    counts = [int(count) for count in documents.split(",")]
    names = tasks.split(",") if tasks else sorted(path.stem for path in calibration.glob("*.jsonl"))
    rows: dict[str, dict[str, list[float]]] = {}
    with Llama(
        str(model), ram="50%", n_ctx=window, n_threads=threads, n_threads_batch=threads, logits_all=True
    ) as llama:
        known = PatternStore(fingerprint(llama.index), store).list().patterns if store else ()
        curves = {pattern.task: pattern.sensitivity for pattern in known}
        for task in names:
            text, held = (folder / f"{task}.jsonl" for folder in (calibration, held_out))
            budget = ExpertBudget(per_layer=keep)
            rows[task] = measure_task(llama, text, held, counts, budget, curves.get(task), tokens)
            say(line(task, rows[task], counts))
    mean = {}
    for way in rows[names[0]]:
        if all(way in row for row in rows.values()):
            mean[way] = [statistics.fmean(values) for values in zip(*(row[way] for row in rows.values()), strict=True)]
    say(line("mean", mean, counts))
    written = {
        "benchmark": "calibration_curve",
        **describe(model),
        "documents": counts,
        "keep": keep,
        "tokens": tokens,
        "mean": mean,
        "rows": rows,
    }
    click.echo(json.dumps(written))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(written, indent=1) + "\n")


def line(task: str, row: dict[str, list[float]], counts: list[int]) -> str:
    """Change of perplexity by number of documents, and what the sets have in common with the last."""
    shown = []
    for way, values in row.items():
        figures = (f"{value:.0%}" if way == "common" else f"{math.expm1(value):+.1%}" for value in values)
        shown.append(f"{way} " + " ".join(f"{count}: {figure}" for count, figure in zip(counts, figures, strict=True)))
    return f"{task:12} " + "   ".join(shown)


if __name__ == "__main__":
    main()
