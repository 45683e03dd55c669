"""The flags that verbs share: each declared once, and `ModelOptions`, what they say together."""

from __future__ import annotations

import functools
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.chat import Sampling
from edgemoe.errors import BudgetError, ModelFileError, PromptError

if TYPE_CHECKING:
    from edgemoe.backend import Llama
    from edgemoe.plan import ExpertPlan, PlanLine


LONGEST_INPUT = 64 << 20
"""Bytes of standard input that may be a prompt."""


def _finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.", ctx, param)
    return value


class _ModelPath(click.Path):
    """The path of a model."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Make a Path of what was given.

        Raises
        ------
        ModelFileError
            When that is no file name that the native store takes.
        """
        # Before it becomes a Path: that of nothing is the present folder.
        if not value:
            raise ModelFileError("no file name was given as MODEL; give the path of a GGUF file")
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ModelFileError(f"the path {value!r} is not UTF-8; rename the file or its folder") from None
        return super().convert(value, param, ctx)


MODEL = click.argument("model", type=_ModelPath(path_type=Path, readable=False), metavar="MODEL")
RAM = click.option(
    "--ram",
    metavar="SIZE",
    default="auto",
    show_default=True,
    help="Memory for the whole process: 6GiB, 800MB, 50% of RAM, or auto (what is free now, less a reserve).",
)
CTX = click.option(
    "--ctx", metavar="N", type=click.IntRange(1, 2**24), help="Context in tokens.  [default: what fits --ram]"
)
UBATCH = click.option(
    "--ubatch",
    metavar="N",
    type=click.IntRange(1, 2**14),
    help="Prompt tokens evaluated at once.  [default: up to 512, what fits --ram]",
)
JSON = click.option("--json", is_flag=True, help="Print JSON on standard output.")
THREADS = click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(1, 512),
    help="Compute threads.  [default: the physical cores that may be used]",
)
IO = click.option(
    "--io",
    type=click.Choice(["auto", "direct", "mmap", "pread"]),
    default="auto",
    show_default=True,
    help="How experts are read from disk; auto tries direct on the file.",
)
STORE = click.option(
    "--store",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, readable=False),
    envvar="EDGEMOE_TASKS",
    help="Folder with this model's tasks.  [default: one for each model, in the user's data folder]",
)

OUTPUT = click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), required=True, help="The file to write."
)
FORCE = click.option("--force", is_flag=True, help="Replace an existing output.")

_SHARED = (
    RAM,
    CTX,
    THREADS,
    UBATCH,
    IO,
    click.option(
        "--experts",
        type=click.Choice(["all", "task", "auto"]),
        default="all",
        show_default=True,
        help="all: exact. task: only those of the prompt's task. auto: exact, the task's in memory first.",
    ),
    click.option(
        "--keep", metavar="K/M", help="With --experts task: K active of M kept, on average.  [default: what fits]"
    ),
    click.option("--task", metavar="NAME", help="Use this task, whatever the prompts are about."),
    STORE,
    click.option(
        "--skip-mass",
        metavar="P",
        type=click.FloatRange(0, 0.5),
        callback=_finite,
        default=0.0,
        show_default=True,
        help="Leave out experts that are not in memory up to this share of a token's router weights; 0: exact.",
    ),
    click.option(
        "--max-tokens",
        metavar="N",
        type=click.IntRange(min=1),
        help="Longest answer in tokens.  [default: until the model ends it or the context is full]",
    ),
    click.option(
        "--temp",
        metavar="T",
        type=click.FloatRange(min=0),
        callback=_finite,
        default=0.8,
        show_default=True,
        help="Temperature; 0 always takes the likeliest token.",
    ),
    click.option(
        "--seed", metavar="N", type=click.IntRange(0, 2**32 - 1), help="Random seed.  [default: a new one each time]"
    ),
    click.option("--quiet", is_flag=True, help="Print nothing but the answer, and errors."),
    JSON,
)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What the shared flags say; None leaves a choice to the plan.

    Raises
    ------
    BudgetError
        When they contradict each other, so that this is told before anything is imported.

    Attributes
    ----------
    ram : str
        Budget as the user wrote it.
    ctx, threads, ubatch, max_tokens : int or None
        Tokens; threads.
    io : str
        ``auto``, ``direct``, ``mmap`` or ``pread``.
    experts : str
        ``all``, ``task`` or ``auto``.
    keep, task : str or None
        Experts kept; the task to use.
    store : Path or None
        Folder of tasks.
    skip_mass : float
        Share of the router's weights that may be left out, 0 to 0.5.
    temp : float
        Sampling temperature.
    seed : int or None
        Random seed.
    quiet, json : bool
        What to print.
    """

    ram: str
    ctx: int | None
    threads: int | None
    ubatch: int | None
    io: str
    experts: str
    keep: str | None
    task: str | None
    store: Path | None
    skip_mass: float
    max_tokens: int | None
    temp: float
    seed: int | None
    quiet: bool
    json: bool

    def __post_init__(self) -> None:
        if self.keep is not None and self.experts != "task":
            raise BudgetError(
                f"--keep {self.keep} limits the experts, which --experts {self.experts} does not; give --experts task"
            )

    def sampling(self) -> Sampling:
        """How to draw answers, with a fresh seed when none was given."""
        seed = random.getrandbits(32) if self.seed is None else self.seed
        return Sampling(self.max_tokens, self.temp, seed)

    def open(
        self,
        model: Path,
        on_plan: Callable[[ExpertPlan], None] | None = None,
    ) -> Llama:
        """Load a model as the flags ask, with a progress bar unless they say otherwise.

        Raises
        ------
        EdgemoeError
            Whatever keeps the model from loading.
        """
        from edgemoe.backend import Llama
        from edgemoe.cli import ui

        with ui.Loading(shown=not self.quiet) as loading:
            llama = Llama(
                str(model),
                ram=self.ram,
                io=self.io,
                experts=self.experts,
                keep=self.keep,
                task=self.task,
                tasks=self.store,
                skip_mass=self.skip_mass,
                n_ctx=self.ctx,
                n_batch=max(512, self.ubatch or 0),
                n_ubatch=self.ubatch,
                n_threads=self.threads,
                n_threads_batch=self.threads,
                flash_attn=True,
                on_plan=on_plan,
                on_progress=loading.progress,
            )
        trained = llama.index.context_length
        if 0 < trained < (self.ctx or 0) and not (self.quiet or self.json):
            ui.note(
                f"--ctx {self.ctx} is more than the {trained:,} tokens that {llama.index.name} was trained for:"
                " what it says after them may make no sense."
            )
        return llama


def open_for_text(
    model: Path,
    ram: str,
    ctx: int,
    threads: int | None,
    io: str,
    reserved: Sequence[PlanLine],
    on_progress: Callable[[int, int], None] | None = None,
    logits_all: bool = True,
) -> Llama:
    """Load a model to evaluate text with, all of its tokens' logits kept unless only the last one's are asked for.

    Raises
    ------
    EdgemoeError
        Whatever keeps the model from loading.
    """
    from edgemoe.backend import Llama

    return Llama(
        str(model),
        ram=ram,
        io=io,
        n_ctx=ctx,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        logits_all=logits_all,
        reserved=reserved,
        on_progress=on_progress,
    )


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the shared flags, passed as one argument ``options``."""

    @functools.wraps(command)
    def with_options(**arguments: Any) -> Any:
        options = ModelOptions(**{field.name: arguments.pop(field.name) for field in fields(ModelOptions)})
        return command(options=options, **arguments)

    for option in reversed(_SHARED):
        with_options = option(with_options)
    return with_options


def utf8(data: bytes, source: str) -> str:
    """Read text that the user gave.

    Raises
    ------
    PromptError
        When it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source} is not UTF-8 text (byte {data[error.start]:#04x} at {error.start}); convert it first"
        ) from error


def read_prompt(argument: str | None) -> str:
    """Take the prompt from the command line, else from standard input.

    Raises
    ------
    PromptError
        When there is none, it is endless, or it is not UTF-8.
    """
    if argument is not None and argument != "-":
        text = utf8(os.fsencode(argument), "the prompt")
    elif sys.stdin.isatty():
        raise PromptError('there is no prompt; give it as an argument ("...") or on standard input')
    else:
        data = sys.stdin.buffer.read(LONGEST_INPUT + 1)
        if len(data) > LONGEST_INPUT:
            raise PromptError(
                f"standard input has more than {LONGEST_INPUT >> 20} MiB, which no context holds; give a shorter prompt"
            )
        text = utf8(data, "standard input").rstrip("\r\n")
    if not text.strip():
        raise PromptError("the prompt is empty; give it as an argument or on standard input")
    return text
