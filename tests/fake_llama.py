"""A stand-in for `edgemoe.Llama` that says what it is told: conversations and screens without a model."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edgemoe.conditions import Pace, Reading
from edgemoe.disk import DiskSpeed
from edgemoe.memory import Budget
from edgemoe.plan import ExpertPlan, PlanLine
from edgemoe.store import StoreStats

MIB = 1 << 20

PLAN = ExpertPlan(
    budget=Budget(100 * MIB, "ram=100MiB"),
    lines=(PlanLine("dense weights", 60 * MIB, "every token"), PlanLine("expert arena", 40 * MIB, "half of them")),
    n_ctx=64,
    n_ubatch=32,
    rows_bytes=0,
    arena_bytes=40 * MIB,
    spared_bytes=0,
    lent_bytes=0,
    floor_budget=70 * MIB + 1,
    resident_share=0.5,
    prompt_mode="whole",
    notes=("A note.",),
)

Script = Sequence[str | BaseException | Callable[[], None]]
"""An answer: tokens; an exception is raised in its place, a function called."""


class FakeLlama:
    """Answers from scripts; a token is a word, the template puts each message's role before it.

    Every token evaluated costs a hit and a miss of 1 MiB and, on `clock`, 0.1 s for a prompt token, 0.5 s for others.
    What the disk is said to have done (`waited_seconds`, `retries` and so on), and what the system (`reading`), is up
    to the script. With a `skip_mass`, one expert of eight is skipped, and half of that mass.
    """

    def __init__(self, *scripts: Script, n_ctx: int = 64, has_chat_template: bool = True) -> None:
        self.scripts = list(scripts)
        self.prompts: list[str] = []
        self.seeds: list[int] = []
        self.plan = PLAN
        self.index = SimpleNamespace(path=Path("fake.gguf"), name="fake", has_chat_template=has_chat_template)
        disk = DiskSpeed(lanes=4, read_bytes=MIB, bytes_per_s=1.1e9, reason="measured")
        self.reading = Reading()
        self.conditions = SimpleNamespace(pace=Pace(), watched=contextlib.nullcontext, read=lambda: self.reading)
        self.store = SimpleNamespace(stats=self._stats, io="direct", io_reason="it works", disk=disk)
        self.chat_format = "llama-2"
        self.task_mode = None
        self.input_ids: list[int] = []
        self.clock = 0.0
        self.waited_seconds = self.busy_seconds = 0.0
        self.prefetched_bytes = self.wasted_bytes = self.retries = 0
        self.skip_mass = 0.0
        self.closed = False
        self._n_ctx = n_ctx
        self._evaluated = 0
        self._words: dict[str, int] = {}

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)

    def n_ctx(self) -> int:
        return self._n_ctx

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return [self._words.setdefault(word, len(self._words)) for word in text.decode().split()]

    def reusable(self, prompt: Sequence[int]) -> int:
        return self._known(prompt[:-1])

    def create_chat_completion(self, messages: list[dict[str, str]], **options: Any) -> Iterator[dict[str, Any]]:
        if any("REFUSE" in message["content"] for message in messages):
            raise ValueError("no such role")
        text = " ".join(f"{message['role']}: {message['content']}" for message in messages) + " assistant:"
        chunks = self.create_completion(prompt=self.tokenize(text.encode()), **options)
        return (
            {"choices": [{"delta": {"content": c["text"]}, "finish_reason": c["finish_reason"]}]}
            for chunk in chunks
            for c in chunk["choices"]
        )

    def create_completion(
        self, prompt: list[int], max_tokens: int | None = None, seed: int = 0, **_: Any
    ) -> Generator[dict[str, Any], None, None]:
        self.seeds.append(seed)
        names = list(self._words)
        self.prompts.append(" ".join(names[token] for token in prompt))
        known = self._known(prompt)
        self._evaluate(prompt[known:], 0.1, keep=known)
        said: list[int] = []
        for step in self.scripts.pop(0):
            if isinstance(step, BaseException):
                raise step
            if callable(step):
                step()
                continue
            # The token before is evaluated only now, as the real thing does.
            self._evaluate(said[-1:], 0.5, keep=self.n_tokens)
            said.append(self._words.setdefault(step, len(self._words)))
            yield _chunk(step, None)
            if len(said) == max_tokens or self.n_tokens + 1 == self._n_ctx:
                yield _chunk("", "length")
                return
        self._evaluate(said[-1:], 0.5, keep=self.n_tokens)
        yield _chunk("", "stop")

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _known(self, prompt: Sequence[int]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(self.input_ids, prompt, strict=False)))

    def _evaluate(self, tokens: list[int], seconds: float, keep: int) -> None:
        self.input_ids = [*self.input_ids[:keep], *tokens]
        self._evaluated += len(tokens)
        self.clock += seconds * len(tokens)

    def _stats(self) -> StoreStats:
        n = self._evaluated
        return StoreStats(
            hits=n,
            misses=n,
            expected_hits=0,
            evictions=0,
            bytes_read=n * MIB,
            dense_bytes=0,
            resident_bytes=0,
            peak_bytes=0,
            arena_bytes=0,
            read_seconds=self.waited_seconds,
            busy_seconds=self.busy_seconds,
            prefetched_bytes=self.prefetched_bytes,
            wasted_bytes=self.wasted_bytes,
            retries=self.retries,
            staged_layers=0,
            routed_slots=8 * n if self.skip_mass else 0,
            skipped_slots=n if self.skip_mass else 0,
            routed_layers=2 * n if self.skip_mass else 0,
            skipped_mass=self.skip_mass * n,
        )


def _chunk(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish_reason}]}
