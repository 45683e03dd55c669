"""All looks of the command line: consoles, tables, the load progress bar and the status line.

Standard output carries what a verb exists for; everything else goes to standard error. Where a stream is not a
terminal it gets plain text: no colours, no bars, no control characters.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from edgemoe.cli.flags import in_flags
from edgemoe.expert_offsets import has_offsets
from edgemoe.memory import current_rss, format_bytes, peak_rss

if TYPE_CHECKING:
    from edgemoe.backend import Llama
    from edgemoe.chat import Answer
    from edgemoe.disk import DiskSpeed
    from edgemoe.index import ExpertIndex
    from edgemoe.plan import ExpertPlan

PLAIN_WIDTH = 1000
"""Columns where there is no terminal: lines are not broken, so that grep finds whole ones."""

NOTICEABLE_WAIT = 0.25
"""Share of an answer's time that was spent waiting for the disk, from which on a slow disk is worth a word."""

PROMPT_MODES = {
    "whole": "all experts of a batch fit at once",
    "per-tensor": "experts of a batch are served one tensor at a time",
    "small-batches": "narrowed to fit the budget",
}


def out() -> Console:
    """Give the console on standard output."""
    return _console(stderr=False)


def err() -> Console:
    """Give the console on standard error."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if terminal else PLAIN_WIDTH)


def show(console: Console, *parts: RenderableType) -> None:
    """Print parts with an empty line between them."""
    with console.capture() as capture:
        for number, part in enumerate(parts):
            if number:
                console.print()
            console.print(part)
    text = capture.get()
    if not console.is_terminal:
        # Tables pad their last column.
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    console.file.write(text)
    console.file.flush()


def show_json(document: dict[str, Any], indent: int | None = 2) -> None:
    """Print one JSON document on standard output."""
    # Escapes say what another encoding could not.
    ensure_ascii = sys.stdout.encoding.lower() != "utf-8"
    sys.stdout.write(json.dumps(document, ensure_ascii=ensure_ascii, indent=indent) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a remark on standard error."""
    show(err(), Text(text, style="dim"))


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Lay out names and what there is to say of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def inspection(model: dict[str, Any]) -> Iterator[RenderableType]:
    """Lay out what `edgemoe.index.describe` says of a model."""
    layers, dense = model["moe_layers"], model["n_layer"] - len(model["moe_layers"])
    used = model["n_expert_used"]
    top_k = str(used) if isinstance(used, int) else f"{min(used)} to {max(used)}"
    one = model["one_expert_bytes"]
    size = format_bytes(one["min"])
    if one["max"] != one["min"]:
        size += f" to {format_bytes(one['max'])}, by layer"
    rows = [
        ("model", model["name"]),
        ("architecture", model["architecture"]),
        ("quantization", model["quantization"]),
        ("context", f"{model['context_length']:,} tokens"),
        ("layers", f"{model['n_layer']}, {len(layers)} with experts" + (f", {dense} dense" if dense else "")),
        ("experts", f"{model['n_expert']} in each layer, top-{top_k} for each token"),
        ("shared experts", str(model["n_expert_shared"] or "none")),
        (
            "expert groups",
            f"{model['n_expert_group']}, {model['n_group_used']} for each token"
            if model["n_expert_group"] > 1
            else "none",
        ),
    ]
    sizes = [
        ("file", format_bytes(model["file_bytes"])),
        ("dense weights", f"{format_bytes(model['dense_bytes'])} ({_types(model['types']['dense'])})"),
        ("experts", f"{format_bytes(model['expert_bytes'])} ({_types(model['types']['experts'])})"),
        ("one expert", size),
        ("one token", f"{format_bytes(model['token_cycle_bytes'])} of experts, all layers together"),
        (
            "page alignment",
            f"{model['aligned_slabs']:.0%} of the experts' parts start on a page of {model['page_size']:,} bytes",
        ),
    ]
    yield facts(rows)
    yield facts(sizes)
    if len(model["files"]) > 1:
        yield facts(("part", path) for path in model["files"])
    if model["skipped_tensors"]:
        yield Text(
            f"{len(model['skipped_tensors'])} tensors of prediction layers are in the file; llama.cpp skips them."
        )
    if "expert_offsets" in model:
        yield from _expert_parts(model["expert_offsets"])


def expert_document(index: ExpertIndex) -> dict[str, Any]:
    """Give the offset of every expert in each expert tensor as JSON types, in bytes from the start of its file."""
    return {
        "stored": has_offsets(index.metadata, len(index.files)),
        "tensors": [
            {
                "name": tensor.name,
                "layer": tensor.layer,
                "part": tensor.part,
                "type": tensor.type_name,
                "file": str(index.files[tensor.file]),
                "stride": tensor.slab_bytes,
                "offsets": [tensor.offset + i * tensor.slab_bytes for i in range(tensor.n_expert)],
            }
            for tensor in index.experts
        ],
    }


def _expert_parts(experts: dict[str, Any]) -> Iterator[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("tensor", "type"):
        table.add_column(name, no_wrap=True)
    for name in ("first expert at byte", "bytes to the next", "last expert at byte"):
        table.add_column(name, justify="right", no_wrap=True)
    split = len({tensor["file"] for tensor in experts["tensors"]}) > 1
    if split:
        table.add_column("of file", no_wrap=True)
    for tensor in experts["tensors"]:
        numbers = (tensor["offsets"][0], tensor["stride"], tensor["offsets"][-1])
        file = [Text(Path(tensor["file"]).name)] if split else []
        table.add_row(tensor["name"], tensor["type"], *(f"{number:,}" for number in numbers), *file)
    yield table
    yield Text(
        "The file's own index of its experts says the same."
        if experts["stored"]
        else "The file has no index of its experts; this follows from its tensors."
    )


def _types(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def plan_parts(plan: ExpertPlan) -> Iterator[RenderableType]:
    """Lay out a plan: where every byte goes, what follows from it, and what to know."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(no_wrap=True, justify="right", min_width=8)  # the numbers are what it is for
    table.add_column(style="dim")
    for line in plan.lines:
        table.add_row(Text(line.name), format_bytes(line.bytes), Text(line.why))
    table.add_row(Text("total"), format_bytes(plan.budget.bytes), Text(in_flags(plan.budget.reason)))
    yield table
    yield facts(
        [
            ("context", f"{plan.n_ctx:,} tokens"),
            ("prompt batch", f"{plan.n_ubatch:,} tokens, {PROMPT_MODES[plan.prompt_mode]}"),
            ("smallest --ram", f"{plan.floor_mebibytes}MiB at this context"),
        ]
    )
    for text in plan.notes:
        yield Text(text)


def announce(plan: ExpertPlan) -> None:
    """Print a plan on standard error, with an empty line after it."""
    show(err(), *plan_parts(plan))
    err().print()


def report(llama: Llama, answer: Answer) -> None:
    """Print what an answer took on standard error, after an empty line."""
    err().print()
    show(err(), statistics(llama, answer))


def statistics(llama: Llama, answer: Answer) -> Table:
    """Lay out what an answer took, measured."""
    store = llama.store
    assert store is not None, "the model is open"
    prompt = f"{_tokens(answer.prompt_tokens)}{_rate(answer.prompt_rate)}"
    if answer.reused_tokens:
        prompt += f", {answer.reused_tokens:,} of them reused"
    read = f"{format_bytes(answer.prompt_bytes)} for the prompt"
    if answer.bytes_per_token is not None:
        read += f", then {format_bytes(round(answer.bytes_per_token))} for each token"
    remarks = disk_remarks(answer, store.disk)
    return facts(
        [
            ("peak memory", f"{format_bytes(peak_rss())} of {format_bytes(llama.plan.budget.bytes)}"),
            ("hit rate", _percent(answer.hit_rate) + f" of {answer.hits + answer.misses:,} expert parts"),
            ("prompt", prompt),
            ("generation", _generation(llama, answer)),
            ("read", read),
            *([("skipped", _skipped(llama, answer))] if llama.skip_mass else []),
            ("io", f"{store.io}: {store.io_reason}"),
            *([("disk", remarks)] if remarks else []),
            *([("conditions", "; ".join(answer.conditions))] if answer.conditions else []),
            ("seed", str(answer.seed)),
        ]
    )


def status_line(llama: Llama, answer: Answer) -> str:
    """Sum up an answer in one line."""
    assert llama.store is not None, "the model is open"
    remarks = disk_remarks(answer, llama.store.disk)
    return ", ".join(
        [
            _generation(llama, answer),
            f"hit rate {_percent(answer.hit_rate)}",
            *([f"skipped {_skipped(llama, answer)}"] if llama.skip_mass else []),
            f"RAM {format_bytes(current_rss())} of {format_bytes(llama.plan.budget.bytes)}"
            f" (peak {format_bytes(peak_rss())})",
            *([f"disk: {remarks}"] if remarks else []),
            *answer.conditions,
        ]
    )


def disk_remarks(answer: Answer, disk: DiskSpeed) -> str:
    """Say what the disk did worse during an answer than it should: nothing as a rule."""
    remarks = []
    seconds = answer.prompt_seconds + answer.generation_seconds
    waited = answer.waited_seconds / seconds if seconds else 0.0
    if answer.busy_seconds and disk.bytes_per_s is not None and waited > NOTICEABLE_WAIT:
        speed = (answer.prompt_bytes + answer.generation_bytes) / answer.busy_seconds
        if speed < disk.bytes_per_s / 2:
            remarks.append(
                f"{decimal(round(speed))}/s, {decimal(round(disk.bytes_per_s))}/s when measured:"
                f" waiting for it took {waited:.0%} of the time"
            )
    if answer.retries:
        what = "1 read failed and was" if answer.retries == 1 else f"{answer.retries:,} reads failed and were"
        remarks.append(f"{what} repeated")
    return "; ".join(remarks)


def _generation(llama: Llama, answer: Answer) -> str:
    text = f"{_tokens(answer.tokens)}{_rate(answer.generation_rate)}"
    if answer.finish_reason == "interrupted":
        text += ", stopped"
    elif answer.finish_reason == "length":
        full = answer.prompt_tokens + answer.tokens >= llama.n_ctx()
        text += ", cut: the context is full" if full else ", cut at --max-tokens"
    return text


def _skipped(llama: Llama, answer: Answer) -> str:
    routings, mass = _percent(answer.skipped_share), _percent(answer.skipped_mass)
    return f"{routings} of routings, {mass} of router mass (bound {_percent(llama.skip_mass)})"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"


def _rate(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f", {tokens_per_second:.1f} tok/s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def plan_document(plan: ExpertPlan) -> dict[str, Any]:
    """Give a plan as JSON types."""
    document = asdict(plan)
    document["budget"]["reason"] = in_flags(plan.budget.reason)
    return document


def answer_document(llama: Llama, answer: Answer) -> dict[str, Any]:
    """Give an answer and what it took as JSON types: tokens, seconds, bytes, shares from 0 to 1."""
    store = llama.store
    assert store is not None, "the model is open"
    document = {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "timings": {
            "prompt_tokens": answer.prompt_tokens,
            "reused_tokens": answer.reused_tokens,
            "prompt_seconds": answer.prompt_seconds,
            "prompt_tokens_per_second": answer.prompt_rate,
            "generated_tokens": answer.tokens,
            "generation_seconds": answer.generation_seconds,
            "generated_tokens_per_second": answer.generation_rate,
            "suspended_seconds": answer.suspended_seconds,
        },
        "stats": {
            "hits": answer.hits,
            "misses": answer.misses,
            "hit_rate": answer.hit_rate,
            "prompt_bytes_read": answer.prompt_bytes,
            "generation_bytes_read": answer.generation_bytes,
            "bytes_read_per_token": answer.bytes_per_token,
            "prefetched_bytes": answer.prefetched_bytes,
            "wasted_bytes": answer.wasted_bytes,
            "waited_seconds": answer.waited_seconds,
            "busy_seconds": answer.busy_seconds,
            "retries": answer.retries,
            "conditions": answer.conditions,
            "skip_mass": llama.skip_mass,
            "skipped_share": answer.skipped_share,
            "skipped_mass": answer.skipped_mass,
            "rss_bytes": current_rss(),
            "peak_rss_bytes": peak_rss(),
            "budget_bytes": llama.plan.budget.bytes,
            "io": store.io,
            "io_reason": store.io_reason,
            "seed": answer.seed,
        },
    }
    if llama.task_mode is not None:
        from edgemoe.cli.task_ui import mode_document

        document["task"] = mode_document(llama.task_mode)
    return document


def stream(answer: Answer) -> None:
    """Print an answer on standard output as it comes, and end its last line."""
    terminal = sys.stdout.isatty()
    end = ""
    try:
        with contextlib.closing(iter(answer)) as pieces:
            for piece in pieces:
                # A model may say escape sequences: a terminal would obey them.
                text = "".join(filter(_is_text, piece)) if terminal else piece
                sys.stdout.write(text)
                sys.stdout.flush()
                end = text[-1:] or end
    finally:
        # On a terminal even an answer without text has a line: Ctrl-C is echoed there.
        if end != "\n" and (end or terminal):
            sys.stdout.write("\n")
            sys.stdout.flush()


def _is_text(character: str) -> bool:
    return character in "\n\t" or not (character < " " or "\x7f" <= character < "\xa0")


class Loading:
    """A progress bar of bytes, on standard error while a terminal is there.

    Parameters
    ----------
    shown : bool
        Whether to show anything at all.
    what : str
        What is going on.
    """

    def __init__(self, shown: bool, what: str = "loading dense weights") -> None:
        console = err()
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            DownloadColumn(binary_units=True),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal and not console.is_dumb_terminal),
        )
        self._task: TaskID | None = None

    def progress(self, done: int, total: int) -> None:
        """Take the bytes loaded so far; may be called from any thread."""
        if self._task is None:
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done)

    def __enter__(self) -> Loading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
