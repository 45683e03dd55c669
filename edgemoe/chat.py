"""Answers of a model, streamed and measured, and `ChatSession`, a conversation kept within the context."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.conditions import Reading, Watch
from edgemoe.errors import PromptError

if TYPE_CHECKING:
    from edgemoe.backend import Llama
    from edgemoe.store import StoreStats

__all__ = ["Answer", "ChatSession", "Message", "Sampling", "chat_prompt", "complete"]

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""

ANSWER_SHARE = 4
"""One part in this many of the context is kept free for the next answer when its length is not bounded."""


LONGEST_TOKEN = 512
"""Characters that no token of a vocabulary is longer than."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn.

    Attributes
    ----------
    max_tokens : int or None
        Longest answer; None leaves it to the model and the context.
    temperature : float
        0 takes the likeliest token.
    seed : int
        Random seed, 0 to 2**32 - 1.
    """

    max_tokens: int | None
    temperature: float
    seed: int


class Answer:
    """One answer: iterate once for its text, then read what it cost.

    Parameters
    ----------
    llama : Llama
        The model; nothing else may run on it meanwhile.
    prompt : sequence of int
        The prompt's tokens.
    chunks : generator of dict
        What a streaming completion or chat completion yields, not yet started.
    seed : int
        The seed they were asked with.
    on_end : callable, optional
        Called with this object when the iteration ends, for whatever reason.

    Attributes
    ----------
    seed : int
        As given.
    text : str
        The text so far.
    finish_reason : str
        ``stop`` (the model was done), ``length`` (the bound or the end of the context was reached), ``interrupted``
        (by Ctrl-C, or because the iteration was left) or ``error``.
    prompt_tokens, reused_tokens : int
        Length of the prompt, and how much of it was still in the KV cache.
    tokens : int
        Tokens generated.
    prompt_seconds, generation_seconds : float
        Wall time until the first token, and from there to the end, but for what is in `suspended_seconds`.
    suspended_seconds : float
        Time that the process was stopped, or the machine asleep.
    conditions : list of str
        What else than the disk slowed the answer down, in a few words each; empty as a rule.
    hits, misses : int
        Expert slabs that were in memory, and that were read.
    prompt_bytes, generation_bytes : int
        Expert bytes read until the first token, and from there to the end.
    waited_seconds, busy_seconds : float
        Wall time that computation waited for experts; in which at least one read was under way.
    retries : int
        Reads that failed and were repeated.
    prefetched_bytes, wasted_bytes : int
        Read because the next layer was likely to need them; left without having been used.
    skipped_share, skipped_mass : float or None
        Share of the experts that the answer's tokens selected, and of the router's weights, that was left out, mean
        over tokens and layers, 0 to 1; None when nothing is skipped.
    """

    def __init__(
        self,
        llama: Llama,
        prompt: Sequence[int],
        chunks: Generator[dict[str, Any], None, None],
        seed: int,
        on_end: Callable[[Answer], None] | None = None,
    ) -> None:
        self.seed = seed
        self.text = ""
        self.finish_reason = "interrupted"
        self.prompt_tokens = len(prompt)
        self.reused_tokens = llama.reusable(prompt)
        self.tokens = 0
        self.prompt_seconds = self.generation_seconds = 0.0
        self.suspended_seconds = 0.0
        self.conditions: list[str] = []
        self.hits = self.misses = 0
        self.prompt_bytes = self.generation_bytes = 0
        self.waited_seconds = self.busy_seconds = 0.0
        self.retries = 0
        self.prefetched_bytes = self.wasted_bytes = 0
        self.skipped_share: float | None = None
        self.skipped_mass: float | None = None
        self._steps = 0
        self._watch = Watch(llama.conditions.pace)
        self._llama = llama
        self._chunks = chunks
        self._on_end = on_end

    @property
    def prompt_rate(self) -> float | None:
        """Prompt tokens evaluated per second, None when nothing was evaluated."""
        evaluated = self.prompt_tokens - self.reused_tokens
        return evaluated / self.prompt_seconds if self.tokens and self.prompt_seconds else None

    @property
    def generation_rate(self) -> float | None:
        """Tokens generated per second after the first, None when there was no second one."""
        return self._steps / self.generation_seconds if self._steps and self.generation_seconds else None

    @property
    def hit_rate(self) -> float | None:
        """Share of the expert slabs asked for that were in memory, 0 to 1; None when none was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    @property
    def bytes_per_token(self) -> float | None:
        """Expert bytes read for each token generated after the first, None when there was no second one."""
        return self.generation_bytes / self._steps if self._steps else None

    def drain(self) -> str:
        """Generate the whole answer and return its text."""
        for _ in self:
            pass
        return self.text

    def __iter__(self) -> Generator[str, None, None]:
        with self._llama.conditions.watched():
            start = latest = _Instant.now(self._llama)
            first: _Instant | None = None
            try:
                for chunk in self._chunks:
                    before, latest = latest, self._pass(latest)
                    if first is None:
                        first = latest
                    else:
                        self._decoded(before, latest)
                    choice = chunk["choices"][0]
                    piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                    if piece:
                        self.text += piece
                        yield piece
                        # What is done with the piece takes time, too, but not ours.
                        latest = self._pass(latest)
                    self.finish_reason = choice["finish_reason"] or self.finish_reason
            except Exception:
                self.finish_reason = "error"
                raise
            finally:
                self._chunks.close()
                self._measure(start, first, self._pass(latest))
                if self._on_end is not None:
                    self._on_end(self)

    def _pass(self, before: _Instant) -> _Instant:
        """Say what time it is; experts are not on their way while the process is stopped, although clocks go on."""
        now = _Instant.now(self._llama)
        self._watch.passed(before.reading, now.reading)
        if now.reading.stopped > before.reading.stopped:
            ran = now.ran - before.ran
            self.waited_seconds -= max(0.0, now.stats.read_seconds - before.stats.read_seconds - ran)
            self.busy_seconds -= max(0.0, now.stats.busy_seconds - before.stats.busy_seconds - ran)
        return now

    def _decoded(self, before: _Instant, now: _Instant) -> None:
        n_tokens = now.n_tokens - before.n_tokens
        misses = now.stats.misses - before.stats.misses
        self._watch.decoded(
            before.reading,
            now.reading,
            now.ran - before.ran - (now.stats.read_seconds - before.stats.read_seconds),
            n_tokens,
            # What grows with the context, with experts that are read, and with those that are computed.
            n_tokens * now.n_tokens,
            misses,
            misses + now.stats.hits - before.stats.hits,
        )

    def _measure(self, start: _Instant, first: _Instant | None, end: _Instant) -> None:
        middle = first or end
        self.prompt_seconds = middle.ran - start.ran
        self.generation_seconds = end.ran - middle.ran
        self.suspended_seconds = self._watch.suspended_seconds
        self.conditions = self._watch.words()
        self.hits = end.stats.hits - start.stats.hits
        self.misses = end.stats.misses - start.stats.misses
        self.prompt_bytes = middle.stats.bytes_read - start.stats.bytes_read
        self.generation_bytes = end.stats.bytes_read - middle.stats.bytes_read
        self.waited_seconds += end.stats.read_seconds - start.stats.read_seconds
        self.busy_seconds += end.stats.busy_seconds - start.stats.busy_seconds
        self.retries = end.stats.retries - start.stats.retries
        self.prefetched_bytes = end.stats.prefetched_bytes - start.stats.prefetched_bytes
        self.wasted_bytes = end.stats.wasted_bytes - start.stats.wasted_bytes
        if routed := end.stats.routed_slots - start.stats.routed_slots:
            self.skipped_share = (end.stats.skipped_slots - start.stats.skipped_slots) / routed
            n_layer = end.stats.routed_layers - start.stats.routed_layers
            self.skipped_mass = (end.stats.skipped_mass - start.stats.skipped_mass) / n_layer
        if first is not None:
            self._steps = end.n_tokens - first.n_tokens
            # The last token sampled is not evaluated any more; after "stop" it is the end mark, which is no text.
            self.tokens = end.n_tokens - self.prompt_tokens + (self.finish_reason != "stop")


@dataclass(frozen=True, slots=True)
class _Instant:
    """Clock and counters at one moment."""

    ran: float  # seconds, but for those that the process was stopped
    n_tokens: int
    stats: StoreStats
    reading: Reading

    @classmethod
    def now(cls, llama: Llama) -> _Instant:
        assert llama.store is not None, "the model is open"
        reading = llama.conditions.read()
        return cls(time.perf_counter() - reading.stopped, llama.n_tokens, llama.store.stats(), reading)


def complete(llama: Llama, text: str, sampling: Sampling) -> Answer:
    """Continue a text as it stands, without a chat template.

    Raises
    ------
    PromptError
        When the text fills the context.
    """
    _refuse_endless(llama, text)
    prompt = llama.tokenize(text.encode("utf-8"), add_bos=True, special=True)
    if len(prompt) >= llama.n_ctx():
        raise _too_long(llama, len(prompt))
    chunks = llama.create_completion(
        prompt,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        stream=True,
    )
    return Answer(llama, prompt, chunks, sampling.seed)


class ChatSession:
    """A conversation: messages, answers, and the oldest turns dropped when the context is full.

    Parameters
    ----------
    llama : Llama
        The model, whose chat template is applied.
    sampling : Sampling
        How answers are drawn; each takes the next seed.

    Attributes
    ----------
    system : str
        System message, empty for none.
    turns : list of Message
        User and assistant messages in turn, oldest first.
    n_asked : int
        Questions so far: what the next seed is counted with.
    dropped_turns : int
        Questions (with their answers) that the latest `ask` dropped to make room.
    """

    def __init__(self, llama: Llama, sampling: Sampling) -> None:
        self.system = ""
        self.turns: list[Message] = []
        self.n_asked = 0
        self.dropped_turns = 0
        self._llama = llama
        self._sampling = sampling

    def ask(self, text: str) -> Answer:
        """Put a question; iterate over the result to get the answer.

        However the iteration ends, question and answer so far join the history, unless there is no answer at all.

        Raises
        ------
        PromptError
            When the question alone fills the context, or the chat template refuses the conversation. The history is
            unchanged then.
        """
        _refuse_endless(self._llama, text)
        question = {"role": "user", "content": text}
        turns, prompt = self._fit([*self.turns, question])
        self.dropped_turns = (len(self.turns) + 1 - len(turns)) // 2
        self.turns = turns[:-1]
        seed = (self._sampling.seed + self.n_asked) % 2**32
        self.n_asked += 1
        chunks = self._llama.create_chat_completion(
            self._messages(turns),
            max_tokens=self._sampling.max_tokens,
            temperature=self._sampling.temperature,
            seed=seed,
            stream=True,
        )

        def remember(answer: Answer) -> None:
            if answer.text:
                self.turns += [question, {"role": "assistant", "content": answer.text}]

        return Answer(self._llama, prompt, chunks, seed, remember)

    def reset(self) -> None:
        """Forget the conversation, but not the system message."""
        self.turns = []

    def _messages(self, turns: list[Message]) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *turns]

    def _fit(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """Drop the oldest turns until an answer has room; the turns left, and their prompt's tokens."""
        n_ctx = self._llama.n_ctx()
        room = min(self._sampling.max_tokens or n_ctx, n_ctx // ANSWER_SHARE)
        while True:
            prompt = chat_prompt(self._llama, self._messages(turns))
            if len(prompt) + room <= n_ctx:
                return turns, prompt
            if len(turns) == 1:
                if len(prompt) >= n_ctx:
                    raise _too_long(self._llama, len(prompt))
                return turns, prompt
            turns = turns[2:]


class _TemplateOnly:
    """Stands in for the model so that its chat template and tokenizer run, and nothing else."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self.prompt: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def create_completion(self, prompt: list[int], **_: Any) -> Iterator[dict[str, Any]]:
        self.prompt = prompt
        return iter(())


def chat_prompt(llama: Llama, messages: list[Message]) -> list[int]:
    """Tokens that `create_chat_completion` would evaluate for these messages.

    Raises
    ------
    PromptError
        When the chat template refuses them.
    """
    stand_in: Any = _TemplateOnly(llama)
    try:
        type(llama).create_chat_completion(stand_in, messages, stream=True)
    except Exception as error:  # a template is a program from the file: it may raise anything
        raise PromptError(
            f"the chat template of {llama.index.path} refuses this conversation ({error}); say it in another way,"
            " or without a system message"
        ) from error
    prompt: list[int] = stand_in.prompt
    return prompt


def _refuse_endless(llama: Llama, text: str) -> None:
    """Refuse what cannot fit before it is tokenized, which takes a hundred times its bytes."""
    at_least = len(text) // LONGEST_TOKEN
    if at_least >= llama.n_ctx():
        raise _too_long(llama, f"more than {at_least:,}")


def _too_long(llama: Llama, n_tokens: int | str) -> PromptError:
    return PromptError(
        f"the prompt has {n_tokens} tokens, but the context holds {llama.n_ctx()} with the answer;"
        " shorten it or give a larger n_ctx"
    )
