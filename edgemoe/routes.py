"""Which experts tokens are routed to: read from a trace of a real model, or drawn from a generator fitted to three.

A model with random weights routes meaninglessly, so what is measured on one has its experts forced, the same in every
arm. The generator is a popularity of experts that stays, a fast and a slow AR(1) process, and Gumbel noise, whose
largest k scores are chosen. Popularity is skewed: many experts are as good as never used, none stands far out, which
no normal distribution gives together with the traces' locality. The adversaries are independent uniform routing, where
a cache hits no more than its share and nothing can be predicted, and a task that changes.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgemoe.errors import TraceError

__all__ = [
    "FITTED",
    "Generator",
    "Routes",
    "fitted_routes",
    "predictions",
    "read_routes",
    "task_switch_routes",
    "uniform_routes",
]

Ids = npt.NDArray[np.int32]

_MAGIC = "# route_trace v1"
RECENT_TOKENS, RECENT_SHARE = 4, 0.5
"""Wrong guesses of a router that is asked a layer too early: this share was used within so many tokens before."""

REPEATED_SHARE = 0.5
"""Wrong guesses of such a router: this share was among its guesses when it was asked a layer earlier still."""

_COLUMNS = ["turn", "phase", "step", "layer", "slot", "expert"]


@dataclass(frozen=True, slots=True)
class Routes:
    """Which experts the tokens of a prompt and of its answer are routed to: L MoE layers, k experts of N per token.

    Attributes
    ----------
    name : str
        Where they come from: ``qwen``, ``fitted qwen``, ``uniform``, ``task switch``.
    n_expert : int
        Experts of each layer, N.
    prompt : int32 array [n_prompt, L, k]
        Experts by rank, the largest weight first, no two equal.
    decode : int32 array [n_decode, L, k]
        The same of the tokens that were generated.

    Raises
    ------
    TraceError
        If shapes do not fit, or a token uses an expert twice in a layer or one that is not there.
    """

    name: str
    n_expert: int
    prompt: Ids
    decode: Ids

    def __post_init__(self) -> None:
        found = [(ids.dtype.name, ids.shape[1:]) for ids in (self.prompt, self.decode)]
        if found != [("int32", self.decode.shape[1:])] * 2 or self.decode.ndim != 3 or 0 in self.decode.shape[1:]:
            raise TraceError(
                f"prompt and decode of routes are {found}, expected int32 arrays [tokens, layers, experts per token]"
                " of the same layers, at least one"
            )
        for rows in (self.prompt, self.decode):
            if np.any((rows < 0) | (rows >= self.n_expert)):
                raise TraceError(f"routes name an expert that is not among the {self.n_expert} of a layer; check them")
            ordered = np.sort(rows, axis=2)
            if np.any(ordered[..., 1:] == ordered[..., :-1]):
                raise TraceError("routes use an expert twice for one token in one layer; check them")

    @property
    def n_layer(self) -> int:
        """Layers with experts, L."""
        return int(self.decode.shape[1])

    @property
    def n_used(self) -> int:
        """Experts per token and layer, k."""
        return int(self.decode.shape[2])

    def stretched(self, n_prompt: int, n_decode: int) -> Routes:
        """Give as many tokens as are asked for.

        A longer prompt repeats the prompt's rows. Decoding longer than the trace goes on with the prompt's rows, then
        the decode rows, and so on: no passage follows itself at once.

        Raises
        ------
        TraceError
            If there are no rows to repeat.
        """
        if len(self.prompt) + len(self.decode) == 0:
            raise TraceError(f"routes {self.name!r} have no tokens to repeat; take others")
        prompt = self.prompt if len(self.prompt) else self.decode
        passages = np.concatenate([self.decode, self.prompt])
        return replace(
            self,
            prompt=prompt[np.arange(n_prompt) % len(prompt)],
            decode=passages[np.arange(n_decode) % len(passages)],
        )

    def shaped(self, n_layer: int, n_expert: int) -> Routes:
        """Put the routes onto a model of another shape, its layers spread evenly over theirs.

        Raises
        ------
        TraceError
            If the model has fewer experts than the routes use.
        """
        used = 1 + max(int(self.prompt.max(initial=-1)), int(self.decode.max(initial=-1)))
        if n_expert < used:
            raise TraceError(
                f"routes {self.name!r} use experts up to {used - 1}, the model has {n_expert} in a layer;"
                " take uniform or fitted routes"
            )
        layers = np.arange(n_layer) * self.n_layer // n_layer
        return replace(self, n_expert=n_expert, prompt=self.prompt[:, layers], decode=self.decode[:, layers])


@dataclass(frozen=True, slots=True)
class Generator:
    """Scores of the experts: what stays of their popularity, what changes fast, what changes slowly.

    Attributes
    ----------
    popularity : float
        Standard deviation of an expert's constant score, which is minus an exponential variable.
    first_layer : float
        The same in layer 0, where routing is flatter.
    fast, fast_kept : float
        Standard deviation of the fast AR(1) process and its correlation from token to token.
    slow, slow_kept : float
        The same of the slow one.
    """

    popularity: float
    first_layer: float
    fast: float
    fast_kept: float
    slow: float
    slow_kept: float


FITTED = {
    "qwen": Generator(5.68, 1.0, 1.07, 0.61, 1.43, 0.985),
    "gemma": Generator(4.7, 4.0, 1.17, 0.67, 1.37, 0.994),
    "gptoss": Generator(8.3, 1.5, 1.2, 0.9, 0.86, 0.988),
}
"""By kind: random-search fits to the traces in ``benchmarks/routes``, all shares of `edgemoe.route_statistics`."""


def read_routes(path: Path) -> Routes:
    """Read a trace (``.csv`` or ``.csv.gz``) with the columns turn, phase, step, layer, slot, expert.

    Phase 0 are prompt tokens, phase 1 generated ones. llama.cpp computes the last layer only for tokens whose logits
    are wanted, so prompt tokens may lack layers that their batch's last token has: they get that token's experts.

    Raises
    ------
    TraceError
        If the file cannot be read, is no such trace, or is incomplete.
    """
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise TraceError(f"{path} cannot be read as a routing trace ({reason}); give the .csv or .csv.gz") from error
    try:
        n_layer, n_expert, n_used = _shape(lines)
        table = np.array(list(_rows(lines)), dtype=np.int64).reshape(-1, len(_COLUMNS))
        prompt, decode = (_tokens(table[table[:, 1] == phase], n_layer, n_used) for phase in (0, 1))
        if len(np.unique(table[:, 1])) + len(decode) == 0 or np.any(table[:, 1] > 1):
            raise ValueError("it holds no tokens, or a phase that is neither 0 nor 1")
        if np.any(decode < 0):
            raise ValueError("a generated token lacks experts of a layer")
        if np.any(prompt[-1:] < 0):
            raise ValueError("the last prompt token lacks experts of a layer")
        prompt = np.where(prompt < 0, prompt[-1:], prompt)
        return Routes(path.name.split(".")[0], n_expert, prompt.astype(np.int32), decode.astype(np.int32))
    except (ValueError, OverflowError, csv.Error, TraceError) as error:
        raise TraceError(f"{path} is no sound routing trace: {error}; record it again") from error


def _shape(lines: list[str]) -> tuple[int, int, int]:
    """n_layer, n_expert and n_expert_used of the comment lines."""
    if not lines or lines[0].strip() != _MAGIC:
        raise ValueError(f"it does not start with {_MAGIC!r}")
    fields = dict(part.split("=", 1) for part in lines[1].split() if "=" in part) if len(lines) > 1 else {}
    try:
        shape = tuple(int(fields[name]) for name in ("n_layer", "n_expert", "n_expert_used"))
    except (KeyError, ValueError) as error:
        raise ValueError("its second line does not give n_layer, n_expert and n_expert_used") from error
    n_layer, n_expert, n_used = shape
    if not (0 < n_layer <= 1024 and 0 < n_used <= n_expert <= 65536):
        raise ValueError(f"{n_layer} layers with {n_used} of {n_expert} experts make no sense")
    return n_layer, n_expert, n_used


def _rows(lines: list[str]) -> Iterator[list[int]]:
    reader = csv.reader(line for line in lines if not line.startswith("#"))
    if next(reader, [])[: len(_COLUMNS)] != _COLUMNS:
        raise ValueError(f"its columns do not start with {','.join(_COLUMNS)}")
    for row in reader:
        numbers = [int(cell) for cell in row[: len(_COLUMNS)]]
        if len(numbers) != len(_COLUMNS):
            raise ValueError(f"a row has {len(numbers)} of {len(_COLUMNS)} columns")
        yield numbers


def _tokens(table: npt.NDArray[np.int64], n_layer: int, n_used: int) -> npt.NDArray[np.int64]:
    """Experts [tokens, layers, k] in order of turn and step, -1 where a row is missing."""
    _, token = np.unique(table[:, [0, 2]], axis=0, return_inverse=True)
    token = token.reshape(-1)
    layer, slot, expert = table[:, 3], table[:, 4], table[:, 5]
    if np.any((layer < 0) | (layer >= n_layer) | (slot < 0) | (slot >= n_used) | (expert < 0)):
        raise ValueError(f"a row lies outside {n_layer} layers and {n_used} experts per token")
    ids = np.full((int(token.max(initial=-1)) + 1, n_layer, n_used), -1, np.int64)
    ids[token, layer, slot] = expert
    if np.count_nonzero(ids >= 0) != len(table):
        raise ValueError("a row is there twice")
    if np.any(np.any(ids < 0, axis=2) != np.all(ids < 0, axis=2)):
        raise ValueError(f"a token has fewer than {n_used} experts in a layer")
    return ids


def fitted_routes(
    kind: str, n_layer: int, n_expert: int, n_used: int, n_prompt: int, n_decode: int, seed: int
) -> Routes:
    """Draw routes with the statistics of a real trace.

    Parameters
    ----------
    kind : str
        ``qwen``, ``gemma`` or ``gptoss``.
    n_layer, n_expert, n_used : int
        Shape of the model.
    n_prompt, n_decode : int
        Tokens.
    seed : int
        The same seed gives the same routes.

    Raises
    ------
    TraceError
        If the kind is unknown or a token would use more experts than there are.
    """
    _check_shape(n_layer, n_expert, n_used)
    ids = _drawn(_generator(kind), n_layer, n_expert, n_used, n_prompt + n_decode, np.random.default_rng(seed))
    return Routes(f"fitted {kind}", n_expert, ids[:n_prompt], ids[n_prompt:])


def uniform_routes(n_layer: int, n_expert: int, n_used: int, n_prompt: int, n_decode: int, seed: int) -> Routes:
    """Draw every token's experts independently, all alike; parameters and errors as `fitted_routes`."""
    _check_shape(n_layer, n_expert, n_used)
    rng = np.random.default_rng(seed)
    ids = _best(rng.random((n_prompt + n_decode, n_layer, n_expert), dtype=np.float32), n_used)
    return Routes("uniform", n_expert, ids[:n_prompt], ids[n_prompt:])


def task_switch_routes(
    kind: str, n_layer: int, n_expert: int, n_used: int, n_prompt: int, n_decode: int, seed: int, every: int = 200
) -> Routes:
    """Draw routes whose popular experts are others after each `every` generated tokens.

    The first task's prompt comes first; the other parameters and errors are those of `fitted_routes`.
    """
    _check_shape(n_layer, n_expert, n_used)
    if every < 1:
        raise TraceError(f"a task cannot switch every {every} tokens; give at least 1")
    rng, generator = np.random.default_rng(seed), _generator(kind)
    first = _drawn(generator, n_layer, n_expert, n_used, n_prompt + min(every, n_decode), rng)
    others = [
        _drawn(generator, n_layer, n_expert, n_used, min(every, n_decode - start), rng)
        for start in range(every, n_decode, every)
    ]
    return Routes("task switch", n_expert, first[:n_prompt], np.concatenate([first[n_prompt:], *others]))


def _generator(kind: str) -> Generator:
    if kind not in FITTED:
        raise TraceError(f"no generator is fitted to {kind!r}; choose one of {', '.join(FITTED)}")
    return FITTED[kind]


def _check_shape(n_layer: int, n_expert: int, n_used: int) -> None:
    if n_layer < 1 or not 1 <= n_used <= n_expert:
        raise TraceError(
            f"routes of {n_layer} layers with {n_used} of {n_expert} experts cannot be drawn; give a model's shape"
        )


def _drawn(
    generator: Generator, n_layer: int, n_expert: int, n_used: int, n_token: int, rng: np.random.Generator
) -> Ids:
    """Experts [tokens, layers, k] of one task."""
    shape = (n_layer, n_expert)
    popularity = np.where(np.arange(n_layer)[:, None] == 0, generator.first_layer, generator.popularity)
    constant = -popularity * rng.standard_exponential(shape)
    fast, slow = rng.standard_normal((2, *shape))
    ids = np.empty((n_token, n_layer, n_used), np.int32)
    for row in ids:
        score = constant + generator.fast * fast + generator.slow * slow + rng.gumbel(size=shape)
        row[...] = _best(-score, n_used)
        for state, kept in ((fast, generator.fast_kept), (slow, generator.slow_kept)):
            state *= kept
            state += np.sqrt(1 - kept**2) * rng.standard_normal(shape)
    return ids


def _best(scores: npt.NDArray[np.floating], n_used: int) -> Ids:
    """Find the n_used smallest of the last axis; their indices, the smallest first."""
    return np.argsort(scores, axis=-1, kind="stable")[..., :n_used].astype(np.int32)


def predictions(rows: Ids, n_expert: int, recalls: Sequence[float], seed: int) -> Ids:
    """Emulate a predictor of the next layers' experts, in place of one that works on hidden states.

    Each true id is kept with a probability that falls evenly with its rank and is the recall on average, as measured
    predictors do (0.59 on average: 0.92 at rank 1, 0.28 at rank 16); the others are replaced by wrong ones. A router
    that is asked too early guesses wrong what it likes at other times: half of them were used within the last 4 tokens,
    as with the test model's routers (0.20 to 0.58 by layer), the others are drawn uniformly. Asked earlier still, it is
    right where it will be right later (0.93 of such guesses), and repeats half of what it will guess wrong (0.46).

    Parameters
    ----------
    rows : int32 array [tokens, layers, k]
        The truth, by rank.
    n_expert : int
        Experts of a layer, at least (1 + recalls) k.
    recalls : sequence of float
        Share of true ids, 0 to 1: asked one layer ahead, then two, and so on.
    seed : int
        The same seed gives the same predictions.

    Returns
    -------
    int32 array [recalls, tokens, layers, k]
        Distinct within a row.

    Raises
    ------
    TraceError
        If a recall is no share, or there are not enough wrong experts to draw.
    """
    n_used = rows.shape[2]
    n_wrong = len(recalls) * n_used
    if not all(0 <= recall <= 1 for recall in recalls) or n_expert < n_wrong + n_used:
        raise TraceError(
            f"recalls of {', '.join(map(str, recalls))} with {n_used} of {n_expert} experts cannot be emulated;"
            f" give 0 to 1, and at least {n_wrong + n_used} experts"
        )
    rng = np.random.default_rng(seed)
    lots = rng.random((*rows.shape[:2], n_expert), dtype=np.float32)
    np.put_along_axis(lots, rows.astype(np.intp), np.float32(2), axis=2)
    used = np.zeros(lots.shape, dtype=np.bool_)
    np.put_along_axis(used, rows.astype(np.intp), True, axis=2)
    recent = np.zeros_like(used)
    for back in range(1, RECENT_TOKENS + 1):
        recent[back:] |= used[:-back]
    recent &= ~used
    n_recent = recent.sum(axis=2, keepdims=True)
    liked, others = _best(np.where(recent, lots, np.float32(2)), n_wrong), _best(lots + recent, n_wrong)
    likes = (rng.random(liked.shape) < RECENT_SHARE) & (np.arange(n_wrong) < n_recent)
    wrong = np.where(likes, liked, others)
    # Too few of the others: any wrong one.
    wrong = np.where(n_expert - n_used - n_recent < n_wrong, _best(lots, n_wrong), wrong)
    ranks = np.arange(n_used)
    draws, choice = rng.random(rows.shape), np.broadcast_to(ranks, rows.shape)
    kept = np.ones(rows.shape, np.bool_)
    found = []
    for ahead, recall in enumerate(recalls):
        again = ~kept & (rng.random(rows.shape) < REPEATED_SHARE)
        choice = np.where(again, choice, ahead * n_used + ranks)
        fall = 0.8 * min(recall, 1 - recall) * np.linspace(1, -1, n_used) if n_used > 1 else np.zeros(1)
        kept = draws < recall + fall
        found.append(np.where(kept, rows, np.take_along_axis(wrong, choice, axis=2)))
    return np.stack(found)
