"""A task's text through the model: what its routers said is kept on disk, piece by piece, and scored at the end."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemoe.chat import chat_prompt
from edgemoe.documents import Document
from edgemoe.errors import TraceError
from edgemoe.evidence import DocumentShares
from edgemoe.fingerprint import ModelFingerprint, fingerprint
from edgemoe.routed_shares import place_of, routed_shares
from edgemoe.score import CRITERIA, score
from edgemoe.trace import ExpertOutputs, RoutedTokens, RouterTrace, top_k

if TYPE_CHECKING:
    from edgemoe.backend import Llama

__all__ = ["Piece", "Spool", "compile_kernels", "pieces_of", "record", "scores_of", "shares_of"]

FEW_DOCUMENTS = 5
"""Below this a pattern says more about the documents than about the task (PreMoe v3, calibration samples)."""

BEGINNINGS = (32, 128)
"""Tokens of the beginnings of each text that are kept beside the whole, for matching short prompts."""

_BEFORE_EXPERTS = frozenset({"llama4"})  # it weighs what goes into the experts, and shows that under the same name


@dataclass(frozen=True, slots=True)
class Piece:
    """As much of a document as one context holds.

    Attributes
    ----------
    key : str
        Tells this piece of this document, evaluated in this way, from all others.
    tokens : tuple of int
        What is evaluated.
    counted : slice
        Which of them prompts are matched by: of a conversation what was said last before the answer, of other text
        all. None of a piece that holds nothing of that, or little that an earlier piece left over.
    n_answer : int
        Tokens that the model may add of its own.
    """

    key: str
    tokens: tuple[int, ...]
    counted: slice
    n_answer: int


class Spool:
    """Routed tokens of a task's pieces, one file each: what was recorded once need not be evaluated again.

    Iterating loads one piece at a time, any number of times.

    Parameters
    ----------
    folder : Path
        Made when the first piece is added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keys: list[str] = []

    def add(self, piece: Piece, tokens: RoutedTokens) -> None:
        """Keep a piece on disk; `take` counts it in.

        Raises
        ------
        TraceError
            If it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"{self.folder} cannot be made: {error.strerror}; check its permissions") from error
        tokens.save(self._path(piece.key))

    def take(self, piece: Piece) -> bool:
        """Count a piece in, if it is there and whole; False: it has to be recorded."""
        try:
            RoutedTokens.load(self._path(piece.key))
        except TraceError:
            return False
        self._keys.append(piece.key)
        return True

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[RoutedTokens]:
        for key in self._keys:
            yield RoutedTokens.load(self._path(key))

    def remove(self) -> None:
        """Delete the folder: the pieces have been scored."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"


def compile_kernels(n_expert: int) -> None:
    """Have numba compile all that recording and scoring call for a model of so many experts.

    They take a hundred MiB or two that stay: before a plan is made, which counts what the process holds.
    """
    one = np.zeros((1, 1, 1), np.float32)
    outputs = ExpertOutputs(np.zeros((1, 1, 1), np.int32), one, one, one[:, :, 0])
    routed = top_k(RouterTrace((0,), np.zeros((1, 1, n_expert), np.float32), outputs), 1)
    for name in ("peu", "easy-ep"):
        score([routed], CRITERIA[name])


def pieces_of(llama: Llama, documents: Iterable[Document], n_answer: int) -> Iterator[Piece]:
    """Tokens of documents, through the chat template where they are conversations and the model has one.

    Parameters
    ----------
    llama : Llama
        The model.
    documents : iterable of Document
        What to evaluate. Text that is longer than the context is cut into pieces that are evaluated for themselves.
    n_answer : int
        Tokens that the model may answer where the document holds no answer; 0 for none. A prompt that leaves no room
        for them gets no answer.

    Raises
    ------
    PromptError
        If the chat template refuses the conversation.
    """
    model = fingerprint(llama.index)
    for document in documents:
        prompt, rest, counted = _tokens(llama, document)
        tokens = prompt + rest
        room = llama.n_ctx() - len(tokens)
        answering = n_answer if not rest and 0 < n_answer <= room else 0
        for start in range(0, len(tokens), llama.n_ctx()):
            part = tuple(tokens[start : start + llama.n_ctx()])
            first, end = (min(max(at - start, 0), len(part)) for at in (counted.start, counted.stop))
            if start > counted.start and end - first < BEGINNINGS[0]:
                end = first
            yield Piece(_key(model, part, answering), part, slice(first, end), answering)


def record(llama: Llama, piece: Piece, outputs: bool = True) -> RoutedTokens:
    """Evaluate a piece and keep what its routers said; with an answer of the model's own, of that too.

    Parameters
    ----------
    llama : Llama
        Opened with ``logits_all=True``: the last layer's router is computed for tokens with logits only.
    piece : Piece
        From `pieces_of`.
    outputs : bool
        Record what the chosen experts give, where the architecture shows it.

    Raises
    ------
    TraceError
        If the architecture does not route by logits.
    EdgemoeError
        What evaluating raises.
    """
    parts: list[RoutedTokens] = []
    # One number for all layers, as what is kept is an array [L, T, K_a]: a layer that selects fewer experts than the
    # widest one is scored by a few more of its logits than it selects.
    k_a = max(llama.index.n_expert_used[layer] for layer in llama.index.moe_layers)

    def keep(trace: RouterTrace) -> None:
        parts.append(top_k(trace, k_a))

    outputs = outputs and llama.index.architecture not in _BEFORE_EXPERTS
    llama.reset()
    # Without an answer nobody wants the last layer's experts, nor logits over the vocabulary.
    with llama.tap.watch(keep, outputs=outputs, cut=piece.n_answer == 0):
        if piece.n_answer == 0:
            llama.eval(piece.tokens)
        else:
            answer = llama.generate(piece.tokens, temp=0.0)
            for count, token in enumerate(answer, 1):
                if llama.ends_with(token) or count > piece.n_answer:
                    break
    return RoutedTokens.concatenate(parts)


def scores_of(spool: Spool) -> dict[str, npt.NDArray[np.float32]]:
    """Score a task's experts under every criterion that what was recorded allows; f32 [L, N] each.

    Raises
    ------
    TraceError
        If nothing was recorded.
    """
    scores = {}
    first = next(iter(spool), None)
    if first is None:
        raise TraceError("nothing was recorded; give text of the task")
    for name, criterion in CRITERIA.items():
        if criterion.needs_outputs and first.outputs is None:
            continue
        if criterion.gamma and first.outputs is not None and np.isnan(first.outputs.change).all(axis=1).any():
            continue
        scores[name] = score(spool, criterion).scores().astype(np.float32)
    return scores


def shares_of(spool: Spool, pieces: Sequence[Piece]) -> DocumentShares:
    """Where what counts of each piece was routed, and beginnings of that; `pieces` in the order they were taken."""
    numbers, tokens, shares = [], [], []
    for number, (routed, piece) in enumerate(zip(spool, pieces, strict=True)):
        first, whole = piece.counted.start, piece.counted.stop - piece.counted.start
        for n_token in (*(n for n in BEGINNINGS if n < whole), whole) if whole else ():
            numbers.append(number)
            tokens.append(n_token)
            shares.append(routed_shares(routed, slice(first, first + n_token)))
    return DocumentShares(
        np.array(numbers, np.int32), np.array(tokens, np.int32), np.stack(shares).astype(np.float16)
    ).sample()


def _tokens(llama: Llama, document: Document) -> tuple[list[int], list[int], slice]:
    """Prompt and answer of a document as the model would see them, and which tokens of the prompt count."""
    if not document.prompt or not llama.index.has_chat_template:
        text = llama.tokenize(document.text.encode("utf-8"), add_bos=True, special=True)
        return text, [], slice(0, len(text))
    prompt = chat_prompt(llama, [{"role": turn.role, "content": turn.content} for turn in document.prompt])
    said = llama.tokenize(document.prompt[-1].content.encode("utf-8"), add_bos=False, special=True)
    answer = (document.answer or "").encode("utf-8")
    rest = llama.tokenize(answer, add_bos=False, special=True) if answer else []
    return prompt, rest, place_of(said, prompt)


def _key(model: ModelFingerprint, tokens: tuple[int, ...], n_answer: int) -> str:
    """Name what was evaluated and how: the same piece has the same name in the next run."""
    facts = [list(tokens), n_answer, model.router, model.quantization]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
