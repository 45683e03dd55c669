"""Decodes under bad conditions, one after the other: what they cost, and whether anything else changes.

    python -m benchmarks.bad_conditions model.gguf --ram 6GiB

Each condition has an `edgemoe chat` of its own that answers three questions, once it has answered one: the condition
holds during the second answer, or begins in the middle of it. The table has the speed of all three, their prompts
included, by the clock of this program, peak memory (VmHWM) beside the budget, whether the texts are those of a quiet
run, how the process ended and what it said about it. The budget has to be small enough that each answer reads experts.
Slow reads and read errors are made by a library that is preloaded (tests/bad_disk.c), which takes a C compiler; the
pressure on memory and a fifth of a processor take the right to make cgroups, usually root. Exits with 1 if anything but
the speed changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from bad_disk import BadDisk, build_library
from bad_machine import brake, cpu_quota, neighbour, suspended
from rich.table import Table
from talk import Talk, TalkEndedError, talking

from benchmarks.compare import Size
from benchmarks.measurements import MIB, say
from edgemoe.bench_machine import describe
from edgemoe.cli import ui
from edgemoe.memory import format_bytes
from edgemoe.memory_cgroup import CgroupUnavailableError, MemoryCgroup, memory_cgroup

QUESTIONS = (
    "What does the Python function os.path.join do?",
    "Tell me how a river finds its way to the sea.",
    "Which plants grow well in the shade of a tree?",
)
SLOW = 50_000_000  # bytes per second
SUSPENDED_S = 2.0
SHARE = 0.2  # of one processor
HELD = 64 * MIB
ROOM = 16 * MIB  # what the memory cgroup has beyond the budget and what the other process holds


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one conversation; None where it was not seen.

    `tokens_per_s` and `texts` are of the answers before, during and after the condition, the speed with the prompts;
    `middle` is half of the bytes of experts that the second answer read, `peak_rss` is VmHWM in bytes.
    """

    condition: str
    tokens_per_s: list[float]
    texts: list[str]
    same_texts: bool
    middle: int
    peak_rss: int | None
    status: int | None
    said: str

    def is_good(self, ram: int) -> bool:
        """Whether nothing but the speed changed."""
        return self.same_texts and self.status == 0 and self.peak_rss is not None and self.peak_rss <= ram


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a condition finds what it disturbs."""

    disk: BadDisk
    group: MemoryCgroup | None
    folder: Path
    middle: int  # so many bytes into the second answer


class NotTriedError(Exception):
    """The condition cannot be made here, or was not in time; says why."""


def wait_for_the_middle(talk: Talk, stage: Stage) -> None:
    control = stage.disk.control
    end = control.bytes + stage.middle
    while control.bytes < end:
        if talk.has_answered():
            talk.answer()
            raise NotTriedError("the answer was there too soon; give more --tokens")
        time.sleep(0.0005)


def first_answer(talk: Talk, stage: Stage) -> dict[str, Any]:
    return talk.answer_to(QUESTIONS[0])


def quiet(talk: Talk, stage: Stage) -> dict[str, Any]:
    return talk.answer_to(QUESTIONS[1])


def last_answer(talk: Talk, stage: Stage) -> dict[str, Any]:
    talk.ask("/stats")  # says on standard error what was wrong during the answer before
    return talk.answer_to(QUESTIONS[2])


def slow_disk(talk: Talk, stage: Stage) -> dict[str, Any]:
    control = stage.disk.control
    talk.ask(QUESTIONS[1])
    wait_for_the_middle(talk, stage)
    control.bytes_per_s = SLOW
    answer = talk.answer()
    control.bytes_per_s = 0
    return answer


def errors_of_one_lane(talk: Talk, stage: Stage) -> dict[str, Any]:
    control = stage.disk.control
    control.failing_thread, control.failures_left = BadDisk.NEXT_THREAD, BadDisk.FOR_EVER
    answer = talk.answer_to(QUESTIONS[1])
    control.failures_left = 0
    return answer


def memory_pressure(talk: Talk, stage: Stage) -> dict[str, Any]:
    if stage.group is None:
        raise NotTriedError("it takes the right to make a memory cgroup, usually root")
    with neighbour(stage.group, HELD, stage.folder):
        return talk.answer_to(QUESTIONS[1])


def suspension(talk: Talk, stage: Stage) -> dict[str, Any]:
    talk.ask(QUESTIONS[1])
    wait_for_the_middle(talk, stage)
    with suspended(talk.process.pid):
        time.sleep(SUSPENDED_S)
    return talk.answer()


def throttled(talk: Talk, stage: Stage) -> dict[str, Any]:
    with cpu_quota(talk.process.pid, SHARE):
        return talk.answer_to(QUESTIONS[1])


def braked(talk: Talk, stage: Stage) -> dict[str, Any]:
    with brake(talk.process.pid):
        return talk.answer_to(QUESTIONS[1])


CONDITIONS: dict[str, Callable[[Talk, Stage], dict[str, Any]]] = {
    "quiet": quiet,
    "disk at 50 MB/s": slow_disk,
    "read errors on one lane": errors_of_one_lane,
    "memory taken by another": memory_pressure,
    "suspended for 2 s": suspension,
    "a fifth of a processor": throttled,
    "stopped 3/4 of the time": braked,
}


def run(condition: str, settings: dict[str, Any], library: Path, undisturbed: Outcome | None) -> Outcome:
    """One conversation; `undisturbed` is the quiet one, None for that itself."""
    answers: list[dict[str, Any]] = []
    speeds: list[float] = []  # by our clock: what it does not run it need not count
    peak: int | None = None
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgemoe-bad-")))
        disk = BadDisk(library, settings["model"].name, folder)
        group: MemoryCgroup | None = None
        with contextlib.suppress(CgroupUnavailableError):
            group = stack.enter_context(memory_cgroup(settings["ram"] + HELD + ROOM))
        wrapper = group.command([]) if group else []
        # Wide enough for what it says of the disk; whose speed is measured once, while it is good.
        environment = {**disk.environment, "COLUMNS": "200", "EDGEMOE_CACHE": str(library.parent)}
        stage = Stage(disk, group, folder, undisturbed.middle if undisturbed else 0)
        talk = stack.enter_context(talking(environment, wrapper, **settings))
        try:
            talk.answer_to(QUESTIONS[2])  # the model is loaded then, and some experts are in memory
            for answer in (first_answer, CONDITIONS[condition], last_answer):
                answers.append(answer(talk, stage))
                speeds.append(answers[-1]["timings"]["generated_tokens"] / talk.seconds)
                peak = talk.peak()
            status, _, errors = talk.end()
            said = "; ".join(re.findall(r"^(?:disk +|conditions +|edgemoe: )(.+?) *$", errors, re.MULTILINE))
        except (CgroupUnavailableError, ChildProcessError, NotTriedError) as error:
            status, said = None, f"not tried: {error}"
        except TalkEndedError as error:
            status, said = talk.process.wait(), str(error).strip().removeprefix("edgemoe: ")
    texts = [answer["text"] for answer in answers]
    same = undisturbed is None or texts == undisturbed.texts
    stats = answers[1]["stats"] if len(answers) > 1 else {"prompt_bytes_read": 0, "generation_bytes_read": 0}
    middle = (stats["prompt_bytes_read"] + stats["generation_bytes_read"]) // 2
    return Outcome(condition, speeds, texts, same, middle, peak, status, said)


def table_of(outcomes: Iterable[Outcome], ram: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("condition", "tok/s before", "during", "after", "peak", "budget", "texts", "exit", "it said"):
        table.add_column(column, justify="left" if column in ("condition", "texts", "it said") else "right")
    for outcome in outcomes:
        speeds = [f"{speed:.2f}" for speed in outcome.tokens_per_s]
        table.add_row(
            outcome.condition,
            *[*speeds, "-", "-", "-"][:3],
            "-" if outcome.peak_rss is None else format_bytes(outcome.peak_rss),
            format_bytes(ram) if outcome.peak_rss is None or outcome.peak_rss <= ram else f"{format_bytes(ram)} BROKEN",
            "-" if outcome.status is None else "same" if outcome.same_texts else "DIFFER",
            "-" if outcome.status is None else str(outcome.status),
            outcome.said or "nothing",
        )
    return table


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--ram", type=Size(), required=True, help="Budget of edgemoe.")
@click.option("--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Of each answer, at most.")
@click.option("--threads", type=click.IntRange(min=1), default=len(os.sched_getaffinity(0)), show_default="all cores")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write everything as JSON here.")
@click.pass_context
def main(ctx: click.Context, model: Path, ram: int, tokens: int, threads: int, out: Path | None) -> None:
    settings = {"ram": ram, "n_ctx": 5 * (tokens + 64), "n_tokens": tokens, "n_threads": threads}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="edgemoe-bad-") as folder:
        library = build_library(Path(folder))
        if library is None:
            raise click.ClickException("there is no C compiler to build the bad disk with; install one as cc")
        for condition in CONDITIONS:
            undisturbed = outcomes[0] if outcomes else None
            outcomes.append(run(condition, {"model": model.resolve(), **settings}, library, undisturbed))
            if outcomes[0].status != 0:
                raise click.ClickException(outcomes[0].said)
            if outcomes[0].middle == 0:
                raise click.ClickException("no experts were read for the second answer; give less --ram")
            say(f"{condition}: {outcomes[-1].said or 'nothing said'}")
    ui.show(ui.out(), table_of(outcomes, ram))
    if out is not None:
        result = {
            "benchmark": "bad_conditions",
            **describe(model),
            "settings": settings,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    if not all(outcome.is_good(ram) for outcome in outcomes if outcome.status is not None):
        ctx.exit(1)


if __name__ == "__main__":
    main()
