"""The opponent and the means to compare: plain llama.cpp with edgemoe's settings, and logits of both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as C  # noqa: N812

from edgemoe import dry_run
from edgemoe.memory import Budget
from edgemoe.plan import ExpertPlan, make_plan

Logits = npt.NDArray[np.float32]

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_MOE = REPOSITORY / "models" / "tiny-moe-q4_k_m.gguf"
SHARED_MODELS = REPOSITORY.parent / "shared" / "models" / "tiny-moe"


def plain_llama(path: Path, **options: Any) -> llama_cpp.Llama:
    """llama_cpp.Llama without weight repacking, which changes the order of additions."""
    defaults = C.llama_model_default_params

    def without_repacking() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    with mock.patch.object(C, "llama_model_default_params", without_repacking):
        return llama_cpp.Llama(str(path), verbose=False, **options)


@contextlib.contextmanager
def arena_share(share: float) -> Iterator[None]:
    """Have every plan use the smallest budget whose arena holds that share of the experts; 0 is the floor.

    A tiny model's experts are small beside Python, so their share cannot be steered by a literal ``--ram``.
    """

    def plan(index: Any, _: Budget, footprint: Any, process: int, *shape: Any) -> ExpertPlan:
        def at(n_bytes: int) -> ExpertPlan:
            return make_plan(index, Budget(n_bytes, f"{share:.0%} of the experts"), footprint, process, *shape)

        with_everything = at(1 << 36)
        low, high = with_everything.floor_budget, 1 << 36
        while high - low > 4096:
            middle = (low + high) // 2
            if at(middle).arena_bytes >= share * with_everything.arena_bytes:
                high = middle
            else:
                low = middle + 1
        return at(high if share else with_everything.floor_budget)

    with mock.patch.object(dry_run, "make_plan", plan):
        yield


def logits(llama: llama_cpp.Llama, prompt: Sequence[int], answer: Sequence[int]) -> Logits:
    """Logits after the prompt and after each further token: [1 + len(answer), n_vocab]."""
    rows = []

    def note() -> None:
        last = C.llama_get_logits_ith(llama.ctx, -1)
        rows.append(np.ctypeslib.as_array(last, shape=(llama.n_vocab(),)).copy())

    llama.reset()
    llama.eval(prompt)
    note()
    for token in answer:
        llama.eval([token])
        note()
    return np.stack(rows)


def greedy(llama: llama_cpp.Llama, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """The most likely continuation, without stopping at an end of text."""
    llama.reset()
    llama.eval(prompt)
    answer: list[int] = []
    for _ in range(n_tokens):
        last = C.llama_get_logits_ith(llama.ctx, -1)
        answer.append(int(np.ctypeslib.as_array(last, shape=(llama.n_vocab(),)).argmax()))
        llama.eval(answer[-1:])
    return answer


__all__ = ["SHARED_MODELS", "TINY_MOE", "arena_share", "greedy", "logits", "plain_llama"]
