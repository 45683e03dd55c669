"""``edgemoe evaluate``: what tasks' sets of experts cost on text that they were not profiled with."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from edgemoe.cli import options
from edgemoe.errors import BudgetError, DocumentError, PatternError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.table import Table

    from edgemoe.arms import Arm
    from edgemoe.backend import Llama
    from edgemoe.evaluation import Result
    from edgemoe.expert_set import ExpertLayers
    from edgemoe.index import ExpertIndex
    from edgemoe.pattern import Pattern
    from edgemoe.patterns import PatternStore
    from edgemoe.plan import PlanLine

SUFFIXES = (".jsonl", ".txt")
"""Of a task's text, in order of preference."""

SHARES = (0.75, 0.5, 0.25, 0.125)
"""Parts of a layer's experts that are measured when the user names no numbers."""


@click.command("evaluate")
@options.MODEL
@click.option(
    "--text",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path, exists=True, file_okay=False, readable=False),
    help="Held-out text: TASK.jsonl or TASK.txt for each task.",
)
@click.option("--tasks", metavar="A,B", help="Tasks to evaluate.  [default: all that have text]")
@click.option(
    "--keep",
    metavar="M,M",
    help="Experts kept per layer, mean over layers.  [default: 75, 50, 25 and 12.5 % of them]",
)
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(2, 2**24),
    default=4096,
    show_default=True,
    help="Tokens of each task, evenly spread over its text.",
)
@click.option(
    "--window",
    metavar="N",
    type=click.IntRange(2, 2**20),
    default=512,
    show_default=True,
    help="Tokens that the model sees at once.",
)
@click.option(
    "--arms",
    type=click.Choice(["all", "main"]),
    default="all",
    show_default=True,
    help="main leaves out the sets that a task's other criteria, or the weights alone, choose.",
)
@click.option(
    "--skip-mass",
    metavar="P,P",
    help="Measure run --skip-mass P instead of tasks: half of each window decoded, on all text in DIR.",
)
@options.STORE
@options.RAM
@options.THREADS
@options.IO
@click.option("--csv", "csv_file", metavar="FILE", type=click.Path(path_type=Path), help="Write every figure.")
@click.option(
    "--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw perplexity against experts kept, a PNG."
)
@click.option("--per-task", is_flag=True, help="Print a table for each task too.")
@click.option("--quiet", is_flag=True, help="Print nothing but the result, and errors.")
@options.JSON
def command(
    model: Path,
    text: Path,
    tasks: str | None,
    keep: str | None,
    tokens: int,
    window: int,
    arms: str,
    skip_mass: str | None,
    store: Path | None,
    ram: str,
    threads: int | None,
    io: str,
    csv_file: Path | None,
    plot: Path | None,
    per_task: bool,
    quiet: bool,
    json: bool,
) -> None:
    """Measure what keeping only a task's experts costs.

    The text should be other than what the tasks were profiled with. Each task's own experts are held against those of
    the nearest and of a wrong task, of all tasks together, and against random ones.

    Perplexity is given as its change against the full model; KL is the divergence from the full model's predictions in
    nats per token, top-1 how often both expect the same token. What is measured of a task is kept in its pattern.
    """
    if skip_mass is not None:
        from edgemoe.cli.evaluate_skipping import evaluate_skipping, parse_bounds

        if tasks or keep or csv_file or plot or per_task:
            raise click.UsageError(
                "--skip-mass is measured without tasks: leave --tasks, --keep, --csv, --plot and --per-task out."
            )
        evaluate_skipping(model, text, parse_bounds(skip_mass), tokens, window, ram, threads, io, quiet, json)
        return
    import edgemoe.chat  # noqa: F401  (before the plan, which counts what this process holds)
    from edgemoe.arms import arms_of
    from edgemoe.cli import task_ui, ui
    from edgemoe.evaluation import evaluate_task, summarise, with_quality
    from edgemoe.expert_set import ExpertLayers
    from edgemoe.fingerprint import fingerprint
    from edgemoe.index import read_index
    from edgemoe.patterns import PatternStore

    _check_plot(plot)
    remark: Callable[[str], None] = (lambda _: None) if quiet or json else ui.note
    index = read_index(model)
    layers = ExpertLayers.of(index)
    patterns = PatternStore(fingerprint(index), store)
    known, texts = _tasks(patterns, text, tasks, remark)
    keeps = _keeps(keep, layers)
    for task in texts:
        if note := known[task].note_for(patterns.model):
            remark(f"{note}.")
    aimer = _aimer(index, remark) if arms == "all" else None
    plans = {
        task: arms_of(known[task], tuple(known.values()), layers, keeps, criteria=arms == "all", aimer=aimer)
        for task in texts
    }
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        write = _writer(csv_file, stack)
        with ui.Loading(shown=not quiet) as loading:
            reserved = _reserved(index, window)
            llama = options.open_for_text(model, ram, window, threads, io, reserved, loading.progress)
        stack.enter_context(llama)
        windows = {task: _windows(llama, file, max(1, tokens // window), window) for task, file in texts.items()}
        try:
            with task_ui.Steps(shown=not quiet) as steps, steps.step("evaluating") as progress:
                advance = _counter(progress, windows, plans)
                for task in texts:
                    found = evaluate_task(llama, task, windows[task], plans[task], advance)
                    results += found
                    write(found)
                    for measured in sorted({task, *(result.arm.task for result in found)} - {""}):
                        patterns.save(with_quality(patterns.load(measured), found, index.quantization))
        except KeyboardInterrupt:
            remark(f"Stopped: {len({result.task for result in results})} of {len(texts)} tasks are complete.")
            _show(results, per_task, json, index)
            raise
    _show(results, per_task, json, index)
    if plot is not None:
        from edgemoe.evaluation_report import save_plot

        save_plot(summarise(results), index.n_expert, _title(index, results), plot)
    remark(f"What was measured of each task is kept with it in {patterns.folder}; see edgemoe tasks.")


def _aimer(index: ExpertIndex, remark: Callable[[str], None]) -> npt.NDArray[np.float64] | None:
    """Score the experts by their weights; None where those cannot be unpacked."""
    from edgemoe.errors import ModelFileError
    from edgemoe.weight_scores import aimer

    try:
        return aimer(index)
    except ModelFileError as error:
        remark(f"Left out, the score by weights alone: {error}.")
        return None


def _check_plot(plot: Path | None) -> None:
    """Refuse now what would fail after an hour."""
    if plot is None:
        return
    from edgemoe.figures import NO_MATPLOTLIB, can_plot

    if plot.suffix.lower() != ".png":
        raise click.BadParameter(f"{plot} is no PNG file; give a name that ends in .png.", param_hint="--plot")
    if not plot.parent.is_dir() or plot.is_dir():
        raise click.BadParameter(f"{plot} cannot be written; give a file in an existing folder.", param_hint="--plot")
    if not can_plot():
        raise click.BadParameter(NO_MATPLOTLIB, param_hint="--plot")


def _tasks(
    store: PatternStore, folder: Path, wanted: str | None, remark: Callable[[str], None]
) -> tuple[dict[str, Pattern], dict[str, Path]]:
    """Find all tasks of the model, and the text of those that are to be evaluated."""
    found = store.list()
    for problem in found.problems:
        remark(f"left out: {problem}")
    known = {pattern.task: pattern for pattern in found.patterns}
    if not known:
        raise PatternError(f"there is no task for {store.model} in {store.folder}; run edgemoe profile first")
    files = {path.stem: path for suffix in reversed(SUFFIXES) for path in sorted(folder.glob(f"*{suffix}"))}
    if wanted is not None:
        names = [name.strip() for name in wanted.split(",") if name.strip()]
        for name in names:
            store.load(name)  # says what is near to a task that is not known
            if name not in files:
                raise DocumentError(f"{folder} holds no text of task {name}; put {name}.jsonl or {name}.txt there")
        return known, {name: files[name] for name in names}
    texts = {name: files[name] for name in known if name in files}
    if not texts:
        raise DocumentError(
            f"{folder} holds no text of any task; put {next(iter(known))}.jsonl or .txt there, one file for each of"
            f" {', '.join(known)}"
        )
    for name in sorted(known.keys() - files.keys()):
        remark(f"Task {name} is not evaluated: {folder} holds no {name}.jsonl or {name}.txt.")
    for name in sorted(files.keys() - known.keys()):
        remark(f"{files[name]} is not used: there is no task {name}.")
    return known, texts


def _keeps(text: str | None, layers: ExpertLayers) -> list[int]:
    """Numbers of experts to keep, the largest first."""
    from edgemoe.keep import Keep

    least, n_expert = max(layers.floor), layers.n_expert
    if text is None:
        wanted = {round(n_expert * share) // layers.n_group * layers.n_group for share in SHARES}
        return sorted((m for m in wanted if least <= m < n_expert), reverse=True) or [least]
    keeps = [Keep.parse(part) for part in text.split(",")]
    for keep in keeps:
        if keep.k not in (None, max(layers.n_expert_used)):
            raise BudgetError(
                f"--keep {keep} activates {keep.k} experts, but the model is compared with itself at"
                f" {max(layers.n_expert_used)}; give {keep.m} alone"
            )
        if not least <= keep.m < n_expert:
            raise BudgetError(
                f"--keep {keep.m} cannot be measured: the model has {n_expert} experts in a layer and needs at least"
                f" {least} of them; give numbers from {least} to {n_expert - 1}"
            )
    return sorted({keep.m for keep in keeps}, reverse=True)


def _reserved(index: ExpertIndex, window: int) -> tuple[PlanLine, ...]:
    from edgemoe.perplexity import measuring_bytes
    from edgemoe.plan import PlanLine

    n_bytes = measuring_bytes(window, index.n_vocab)
    return (PlanLine("full model's answers", n_bytes, "what sets of experts are compared with, one window of text"),)


def _windows(llama: Llama, file: Path, n_windows: int, window: int) -> list[tuple[int, ...]]:
    from edgemoe.documents import read_documents
    from edgemoe.evaluation import begin_of_text, cut_windows, held_out_tokens

    return cut_windows(held_out_tokens(llama, read_documents([file])), n_windows, window, begin_of_text(llama))


def _counter(
    progress: Callable[[int, int], None], windows: dict[str, list[tuple[int, ...]]], plans: dict[str, tuple[Arm, ...]]
) -> Callable[[], None]:
    """Count evaluated windows."""
    from edgemoe.evaluation import distinct_sets

    total = sum(len(windows[task]) * (1 + len(distinct_sets(plan))) for task, plan in plans.items())
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return advance


def _writer(path: Path | None, stack: contextlib.ExitStack) -> Callable[[Sequence[Result]], None]:
    """Open the CSV file now, and write what is complete as it comes."""
    if path is None:
        return lambda results: None
    from edgemoe.evaluation_report import FIELDS, row

    file: TextIO = stack.enter_context(path.open("w", newline="", encoding="utf-8"))
    table = csv.DictWriter(file, FIELDS)
    table.writeheader()

    def write(results: Sequence[Result]) -> None:
        table.writerows(row(result) for result in results)
        file.flush()

    return write


def _show(results: Sequence[Result], per_task: bool, json: bool, index: ExpertIndex) -> None:
    if json:
        _show_json(results, index)
    elif results:
        from edgemoe.cli import ui

        ui.show(ui.out(), *_tables(results, per_task))


def _show_json(results: Sequence[Result], index: ExpertIndex) -> None:
    from edgemoe.cli import ui
    from edgemoe.evaluation import summarise
    from edgemoe.evaluation_report import row, summary_row

    ui.show_json(
        {
            "model": index.name,
            "quantization": index.quantization,
            "n_expert": index.n_expert,
            "summary": [summary_row(summary) for summary in summarise(results)],
            "rows": [row(result) for result in results],
        }
    )


def _tables(results: Sequence[Result], per_task: bool) -> Iterator[Table]:
    from edgemoe.evaluation import summarise
    from edgemoe.evaluation_report import summary_table, task_table

    tasks = list(dict.fromkeys(result.task for result in results))
    if per_task:
        for task in tasks:
            yield task_table([result for result in results if result.task == task])
    yield summary_table(summarise(results))


def _title(index: ExpertIndex, results: Sequence[Result]) -> str:
    tasks = len({result.task for result in results})
    return f"{index.name} {index.quantization}: held-out text of {tasks} task{'s' if tasks != 1 else ''}"
