"""A task's held-out text through all sets of experts that are compared, and what of it goes into the task's pattern."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.arms import ALL_TASKS, FULL, OWN, RANDOM, WEIGHTS, Arm
from edgemoe.chat import chat_prompt
from edgemoe.documents import Document
from edgemoe.errors import DocumentError
from edgemoe.evidence import QualityRow
from edgemoe.expert_set import ExpertSet
from edgemoe.pattern import Pattern
from edgemoe.perplexity import Figures, measure

if TYPE_CHECKING:
    from edgemoe.backend import Llama

__all__ = [
    "Result",
    "Summary",
    "begin_of_text",
    "cut_windows",
    "distinct_sets",
    "evaluate_task",
    "held_out_tokens",
    "summarise",
    "with_quality",
]


@dataclass(frozen=True, slots=True)
class Result:
    """What one arm gave on one task's text.

    Attributes
    ----------
    task : str
        Whose text.
    arm : Arm
        Which sets; figures are means over them.
    figures : Figures
        Measured.
    """

    task: str
    arm: Arm
    figures: Figures


@dataclass(frozen=True, slots=True)
class Summary:
    """One arm over all tasks; every task counts the same.

    Attributes
    ----------
    arm : Arm
        Of the first task; name, allocation, criterion and keep are those of all.
    mean_kept : float
        Experts per layer, mean over layers and tasks.
    loss : float
        Change of the negative log-likelihood, nats per token, mean over tasks.
    standard_error : float or None
        Of `loss`, over windows; None if a task has only one.
    kl, top1_agreement : float
        Means over tasks.
    worst_task : str
        The task with the largest loss.
    worst_loss : float
        Its loss.
    """

    arm: Arm
    mean_kept: float
    loss: float
    standard_error: float | None
    kl: float
    top1_agreement: float
    worst_task: str
    worst_loss: float

    @property
    def perplexity_change(self) -> float:
        """Relative to the full model, geometric mean over tasks: 0.03 is 3 % worse."""
        return math.expm1(self.loss)


def held_out_tokens(llama: Llama, documents: Iterable[Document]) -> list[int]:
    """Tokens of all documents, each followed by the model's end of text.

    Conversations go through the chat template where the model has one, as they do when a task is profiled.
    """
    end = [llama.token_eos()] if llama.token_eos() >= 0 else []
    tokens: list[int] = []
    for document in documents:
        if document.prompt and llama.index.has_chat_template:
            tokens += chat_prompt(llama, [{"role": turn.role, "content": turn.content} for turn in document.prompt])
            text = document.answer or ""
        else:
            text = document.text
        tokens += llama.tokenize(text.encode("utf-8"), add_bos=False, special=True) + end
    return tokens


def cut_windows(tokens: Sequence[int], n_windows: int, window: int, bos: int | None = None) -> list[tuple[int, ...]]:
    """Cut text into windows, evenly spaced over it.

    Parameters
    ----------
    tokens : sequence of int
        All text.
    n_windows : int
        Windows wanted; fewer if there is no more text.
    window : int
        Tokens that the model sees at once.
    bos : int, optional
        What each window begins with, in place of its first token, for models that were trained so.

    Returns
    -------
    list of tuple of int
        ``window + 1`` tokens each: one more than the model sees, to be predicted. Text that does not fill one window
        gives a shorter one.

    Raises
    ------
    DocumentError
        If there are fewer than two tokens.
    """
    if len(tokens) < 2:
        raise DocumentError(f"the text has {len(tokens)} tokens, of which nothing can be predicted; give more text")
    whole = max(1, (len(tokens) - 1) // window)
    starts = np.linspace(0, whole - 1, min(n_windows, whole)).astype(np.int64) * window
    windows = [tuple(tokens[start : start + window + 1]) for start in starts.tolist()]
    return windows if bos is None else [(bos, *text[1:]) for text in windows]


def begin_of_text(llama: Llama) -> int | None:
    """Token that the model was trained to see first, None where there is none."""
    tokens: list[int] = llama.tokenize(b"", add_bos=True)
    return tokens[0] if tokens[:1] == [llama.token_bos()] else None


def evaluate_task(
    llama: Llama,
    task: str,
    windows: Sequence[Sequence[int]],
    arms: Sequence[Arm],
    on_progress: Callable[[], None] | None = None,
) -> list[Result]:
    """Measure all arms on one task's text; sets that several arms have in common are measured once.

    Raises
    ------
    EdgemoeError
        What `edgemoe.perplexity.measure` raises.
    """
    sets = distinct_sets(arms)
    figures = dict(zip(sets, measure(llama, windows, sets, on_progress), strict=True))
    return [Result(task, arm, reduce(Figures.with_run, [figures[chosen] for chosen in arm.sets])) for arm in arms]


def distinct_sets(arms: Sequence[Arm]) -> list[ExpertSet]:
    """All sets of the arms, each once."""
    return list(dict.fromkeys(chosen for arm in arms for chosen in arm.sets))


def summarise(results: Sequence[Result]) -> list[Summary]:
    """Average each arm over the tasks it was measured on, in the order the arms first appear."""
    groups: dict[tuple[str, str, str, int], list[Result]] = {}
    for result in results:
        arm = result.arm
        groups.setdefault((arm.name, arm.allocation, arm.criterion, arm.keep), []).append(result)
    return [_summary(group) for group in groups.values()]


def with_quality(pattern: Pattern, results: Sequence[Result], model: str) -> Pattern:
    """Write what was measured of a task into its pattern, in place of older figures of the same sets.

    Parameters
    ----------
    pattern : Pattern
        The task.
    results : sequence of Result
        Those on its own text count, and those of its own sets on other tasks' text.
    model : str
        Name of the quantization that was measured.
    """
    rows = [
        _quality(result, pattern.task, model) for result in results if pattern.task in (result.task, result.arm.task)
    ]
    measured = {_key(row) for row in rows}
    return replace(pattern, quality=(*(row for row in pattern.quality if _key(row) not in measured), *rows))


def _summary(group: Sequence[Result]) -> Summary:
    figures = [result.figures for result in group]
    worst = max(group, key=lambda result: result.figures.loss)
    errors = [one.standard_error for one in figures]
    known = [error for error in errors if error is not None]
    return Summary(
        arm=group[0].arm,
        mean_kept=sum(result.arm.mean_kept for result in group) / len(group),
        loss=sum(one.loss for one in figures) / len(group),
        # Of a mean of independent means, each with its own error.
        standard_error=math.hypot(*known) / len(group) if len(known) == len(group) else None,
        kl=sum(one.kl for one in figures) / len(group),
        top1_agreement=sum(one.top1_agreement for one in figures) / len(group),
        worst_task=worst.task,
        worst_loss=worst.figures.loss,
    )


def _quality(result: Result, task: str, model: str) -> QualityRow:
    arm, figures = result.arm, result.figures
    size = f"{arm.sets[0].n_expert_used}/{arm.keep}"
    whose = {FULL: "full", OWN: size, RANDOM: size, WEIGHTS: size, ALL_TASKS: f"{size} of all tasks"}
    expert_set = whose.get(arm.name, f"{size} of {arm.task}, {arm.name}")
    n_tokens = int(figures.tokens.sum()) // len(arm.sets)
    return QualityRow(
        expert_set=expert_set if result.task == task else f"{size} on text of {result.task}",
        allocation=arm.allocation,
        criterion=arm.criterion,
        mean_kept=arm.mean_kept,
        perplexity=figures.perplexity,
        perplexity_change=figures.perplexity_change,
        kl=figures.kl,
        top1_agreement=figures.top1_agreement,
        text=f"held-out text of {result.task}, {n_tokens} tokens, {model[:60]}",
        seeds=len(arm.sets),
    )


def _key(row: QualityRow) -> tuple[str, str, str]:
    return row.expert_set, row.allocation, row.criterion
