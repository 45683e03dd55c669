"""``edgemoe profile``: a task's text in, one pattern file out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemoe.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgemoe.backend import Llama
    from edgemoe.cli.task_ui import Steps
    from edgemoe.documents import Document
    from edgemoe.index import ExpertIndex
    from edgemoe.patterns import Pattern, PatternStore
    from edgemoe.plan import PlanLine
    from edgemoe.profiling import Piece, Spool

WINDOW = 512
"""Tokens evaluated at once: what a piece of text is cut to when the user names no context."""

CURVE_PIECES = 4
"""Pieces of text, evenly chosen, that the loss of each layer is measured on."""


@click.command("profile")
@options.MODEL
@click.argument("text", nargs=-1, required=True, type=click.Path(path_type=str, allow_dash=True, readable=False))
@click.option("--task", required=True, metavar="NAME", help="Name of the task: a-z, 0-9, - and _.")
@options.RAM
@click.option(
    "--ctx", metavar="N", type=click.IntRange(32, 2**20), default=WINDOW, show_default=True, help="Tokens of a piece."
)
@click.option(
    "--answers",
    metavar="N",
    type=click.IntRange(1, 2**16),
    help="Let the model answer each prompt with up to N tokens, and profile question and answer.",
)
@click.option("--no-curves", is_flag=True, help="Do not measure how much each layer loses when it is cut.")
@options.STORE
@options.THREADS
@options.IO
@click.option("--quiet", is_flag=True, help="Print nothing but the result, and errors.")
@options.JSON
def command(
    model: Path,
    text: tuple[str, ...],
    task: str,
    ram: str,
    ctx: int,
    answers: int | None,
    no_curves: bool,
    store: Path | None,
    threads: int | None,
    io: str,
    quiet: bool,
    json: bool,
) -> None:
    """Learn from text which experts a task needs.

    TEXT is files and folders of JSON lines or plain text, or - for standard input. Each line of a .jsonl file is an
    object with "text", "prompt" (or "question") and "answer", or "messages"; any other file is one document. Some tens
    of documents are enough. The same command goes on where it was stopped; a task that exists is not replaced.
    """
    from edgemoe.cli import task_ui, ui
    from edgemoe.documents import read_documents
    from edgemoe.evidence import check_task_name
    from edgemoe.fingerprint import fingerprint
    from edgemoe.index import read_index
    from edgemoe.patterns import PatternStore
    from edgemoe.profiling import compile_kernels

    check_task_name(task)
    reader = read_documents(text)
    documents = list(reader)
    index = read_index(model)
    patterns = PatternStore(fingerprint(index), store)
    if not _goes_on(patterns, task, documents):
        patterns.check_new(task)
    remark: Callable[[str], None] = (lambda _: None) if quiet or json else ui.note
    if reader.n_empty:
        remark(f"{reader.n_empty} empty documents were skipped.")
    compile_kernels(index.n_expert)
    with ui.Loading(shown=not quiet) as loading:
        reserved = _reserved(index, ctx, not no_curves)
        llama = options.open_for_text(model, ram, ctx, threads, io, reserved, loading.progress)
    with llama, task_ui.Steps(shown=not quiet) as steps:
        pattern = _profile(llama, documents, patterns, task, answers or 0, not no_curves, steps, remark)
    if json:
        ui.show_json(task_ui.pattern_document(pattern))
    else:
        ui.show(ui.out(), *task_ui.pattern_parts(pattern))
    remark(f"saved as {patterns.path(task)}")


def _spool(patterns: PatternStore, task: str) -> Spool:
    """Give what was recorded of a task's text; its folder is there as long as the task is not finished."""
    from edgemoe.profiling import Spool

    return Spool(patterns.folder / f".{task}.recorded")


def _goes_on(patterns: PatternStore, task: str, documents: Sequence[Document]) -> bool:
    """Whether the task that is there was saved by a run on this very text, which was stopped later."""
    from edgemoe.documents import calibration_hash
    from edgemoe.errors import PatternError

    if not _spool(patterns, task).folder.exists():
        return False
    try:
        known = patterns.load(task)
    except PatternError:
        return False
    texts = [source.calibration_hash for source in known.sources]
    return known.fingerprint == patterns.model and texts == [calibration_hash(documents)]


def _reserved(index: ExpertIndex, ctx: int, with_curves: bool) -> tuple[PlanLine, ...]:
    """Memory for one batch of traces, for two pieces of text, and for measuring what layers lose."""
    from edgemoe.perplexity import measuring_bytes
    from edgemoe.plan import PlanLine
    from edgemoe.router_tap import trace_memory

    pieces = 2 * ctx * len(index.moe_layers) * 20 * max(index.n_expert_used)
    measuring = measuring_bytes(ctx, index.n_vocab) if with_curves else 0
    return (
        trace_memory(index, min(ctx, 512), outputs=True),
        PlanLine("routed tokens", pieces, "what is kept of a piece of text, while it is scored"),
        PlanLine("full model's answers", measuring, "what cut layers are compared with, one piece of text"),
    )


def _profile(
    llama: Llama,
    documents: Sequence[Document],
    patterns: PatternStore,
    task: str,
    n_answer: int,
    with_curves: bool,
    steps: Steps,
    remark: Callable[[str], None],
) -> Pattern:
    """Record, score, save; then measure the curves and save again."""
    from dataclasses import replace

    from edgemoe import profiling
    from edgemoe.documents import calibration_hash
    from edgemoe.evidence import Source
    from edgemoe.pattern import make_pattern

    if len(documents) < profiling.FEW_DOCUMENTS:
        remark(
            f"{len(documents)} documents tell little about a task: at least {profiling.FEW_DOCUMENTS} are advised, some"
            " tens are better."
        )
    pieces = list(profiling.pieces_of(llama, documents, n_answer))
    if len(pieces) > len(documents):
        remark(f"Documents longer than {llama.n_ctx()} tokens were cut: {len(pieces)} pieces.")
    if n_answer and not any(piece.n_answer for piece in pieces):
        remark("No document leaves room for an answer, or all of them have one: the model's own are not profiled.")
    spool = _spool(patterns, task)
    _record(llama, pieces, spool, steps, remark)
    source = Source(
        task,
        calibration_hash(documents),
        len(documents),
        sum(routed.n_token for routed in spool),
        any(document.prompt for document in documents) and llama.index.has_chat_template,
        any(piece.n_answer for piece in pieces),
    )
    scores = profiling.scores_of(spool)
    shares = profiling.shares_of(spool, pieces)
    pattern = make_pattern(task, patterns.model, next(iter(scores)), scores, source, shares)
    patterns.save(pattern)
    if with_curves:
        from edgemoe.expert_set import ExpertLayers
        from edgemoe.sensitivity import sensitivity

        every = max(1, len(pieces) // CURVE_PIECES)
        windows = [piece.tokens for piece in pieces[::every] if len(piece.tokens) > 1][:CURVE_PIECES]
        with steps.step("measuring layers") as progress:
            try:
                curves = sensitivity(
                    llama, windows, pattern.rank_scores, ExpertLayers.of(llama.index), on_progress=progress
                )
            except KeyboardInterrupt:
                remark(f"Stopped: {task} is saved, without what each layer loses: the same command goes on.")
                raise
        pattern = replace(pattern, sensitivity=curves)
        patterns.save(pattern)
    spool.remove()
    return pattern


def _record(llama: Llama, pieces: Sequence[Piece], spool: Spool, steps: Steps, remark: Callable[[str], None]) -> None:
    from edgemoe.profiling import record

    n_done = 0
    with steps.step("recording routers") as progress:
        try:
            for n_done, piece in enumerate(pieces):
                progress(n_done, len(pieces))
                if not spool.take(piece):
                    spool.add(piece, record(llama, piece))
                    spool.take(piece)
        except KeyboardInterrupt:
            remark(f"Stopped after {n_done} of {len(pieces)} pieces, which are kept: the same command goes on.")
            raise
        progress(len(pieces), len(pieces))
