"""How local and how skewed routing is, and whether a drawn stream is like the trace that it was fitted to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgemoe.errors import TraceError
from edgemoe.routes import Routes

__all__ = ["TOLERANCE", "TRACES", "RouteStatistics", "check", "statistics"]

TOLERANCE = 0.05
"""A drawn stream may differ from its trace by this much in each statistic."""

LAGS = (1, 2, 4, 8, 16, 32)
WITHIN = (2, 4, 8, 16, 32)
HOTTEST = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
SLOTS = (8, 16, 32, 48)
_RANKS = 40

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RouteStatistics:
    """Means over layers, of decoded tokens; every value is a share of 1, except the Zipf exponents.

    Attributes
    ----------
    n_token : int
        Tokens they were measured on: distinct experts and hit rates from cold depend on it.
    overlap : tuple of float
        Share of a token's experts that the token 1, 2, 4, 8, 16, 32 before used too.
    used_within : tuple of float
        Share that one of the last 2, 4, 8, 16, 32 tokens used; tokens with fewer before them are not counted.
    hottest : tuple of float
        Share of all uses that the most used 1/16, 1/8, 1/4, 1/2 of a layer's experts have.
    lru : tuple of float
        Hit rate of 8, 16, 32, 48 least-recently-used slots for each layer, from cold.
    distinct : float
        Share of a layer's experts that is used at all.
    effective : float
        exp(entropy of a layer's uses), as a share of its experts.
    zipf, zipf_first : float
        Exponent of uses against rank, ranks 1 to 40; the mean, and that of layer 0.
    """

    n_token: int
    overlap: tuple[float, ...]
    used_within: tuple[float, ...]
    hottest: tuple[float, ...]
    lru: tuple[float, ...]
    distinct: float
    effective: float
    zipf: float
    zipf_first: float

    def shares(self) -> Iterator[tuple[str, float]]:
        """Name and value of every statistic that is a share."""
        for name, parameters, values in (
            ("overlap at lag", LAGS, self.overlap),
            ("used within", WITHIN, self.used_within),
            ("share of the hottest", HOTTEST, self.hottest),
            ("hits of LRU slots", SLOTS, self.lru),
        ):
            yield from ((f"{name} {parameter:g}", value) for parameter, value in zip(parameters, values, strict=True))
        yield "distinct experts", self.distinct
        yield "effective experts", self.effective


TRACES = {
    "qwen": RouteStatistics(
        128,
        (0.380, 0.289, 0.277, 0.267, 0.283, 0.236),
        (0.47, 0.61, 0.74, 0.86, 0.93),
        (0.45, 0.64, 0.86, 0.99),
        (0.38, 0.59, 0.80, 0.89),
        64 / 128,
        39 / 128,
        0.80,
        0.36,
    ),
    "gemma": RouteStatistics(
        128,
        (0.357, 0.293, 0.284, 0.261, 0.237, 0.219),
        (0.47, 0.61, 0.72, 0.83, 0.91),
        (0.47, 0.66, 0.85, 0.99),
        (0.36, 0.59, 0.77, 0.87),
        67 / 128,
        38 / 128,
        0.84,
        0.80,
    ),
    "gptoss": RouteStatistics(
        64,
        (0.179, 0.210, 0.134, 0.131, 0.104, 0.118),
        (0.31, 0.46, 0.58, 0.69, 0.83),
        (0.60, 0.80, 0.96, 1.0),
        (0.49, 0.63, 0.71, 0.72),
        36 / 128,
        24 / 128,
        0.98,
        0.69,
    ),
}
"""Of the generated tokens of the traces in ``benchmarks/routes``, by kind."""


def statistics(routes: Routes, n_token: int) -> RouteStatistics:
    """Measure the first n_token decoded tokens.

    Raises
    ------
    TraceError
        If there are fewer tokens than asked for, or not more than the longest lag.
    """
    if not max(LAGS) < n_token <= len(routes.decode):
        raise TraceError(
            f"statistics of {n_token} decoded tokens were asked of routes with {len(routes.decode)};"
            f" give more than {max(LAGS)}, and no more than there are"
        )
    rows, n_expert = routes.decode[:n_token], routes.n_expert
    used = np.zeros((n_token, routes.n_layer, n_expert), np.bool_)
    np.put_along_axis(used, rows.astype(np.intp), True, axis=2)
    counts = np.sort(used.sum(0), axis=1)[:, ::-1]
    share = counts / counts.sum(1, keepdims=True)
    entropy = -np.sum(share * np.log(share, where=share > 0, out=np.zeros_like(share)), axis=1)
    hottest = np.cumsum(share, axis=1).mean(0)
    zipf = [_zipf(row) for row in counts]
    return RouteStatistics(
        n_token,
        tuple(float((used[lag:] & used[:-lag]).sum() / used[lag:].sum()) for lag in LAGS),
        tuple(_used_within(used, n) for n in WITHIN),
        tuple(float(hottest[max(round(part * n_expert), 1) - 1]) for part in HOTTEST),
        tuple(float(np.mean([_lru(layer, n) for layer in rows.swapaxes(0, 1)])) for n in SLOTS),
        float(np.mean(counts > 0)),
        float(np.mean(np.exp(entropy)) / n_expert),
        float(np.mean(zipf)),
        zipf[0],
    )


def check(stats: RouteStatistics, kind: str) -> list[str]:
    """Name what differs by more than `TOLERANCE` from the trace of that kind; no lines if nothing does.

    Raises
    ------
    TraceError
        If there is no such trace, or it is of another number of tokens.
    """
    if kind not in TRACES or TRACES[kind].n_token != stats.n_token:
        raise TraceError(
            f"statistics of {stats.n_token} tokens have no trace {kind!r} to be compared with; measure "
            + ", ".join(f"{trace.n_token} tokens for {name}" for name, trace in TRACES.items())
        )
    return [
        f"{name} is {value:.2f}, {kind}'s {of_trace:.2f}"
        for (name, value), (_, of_trace) in zip(stats.shares(), TRACES[kind].shares(), strict=True)
        if abs(value - of_trace) > TOLERANCE
    ]


def _used_within(used: npt.NDArray[np.bool_], n: int) -> float:
    """Share of uses, from token n on, of experts that the n tokens before used."""
    past = np.cumsum(used, axis=0, dtype=np.int32)
    before = past[n - 1 : -1].copy()
    before[1:] -= past[: -n - 1]
    return float((used[n:] & (before > 0)).sum() / used[n:].sum())


def _lru(rows: Ids, n_slots: int) -> float:
    """Hit rate of one layer's rows [tokens, k] in slots of its own."""
    slots: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in rows.ravel().tolist():
        hits += expert in slots
        slots[expert] = None
        slots.move_to_end(expert)
        if len(slots) > n_slots:
            slots.popitem(last=False)
    return hits / rows.size


def _zipf(counts: npt.NDArray[np.int64]) -> float:
    """Slope of log uses against log rank, as a positive number, over the ranks up to 40 that are used."""
    top = counts[:_RANKS][counts[:_RANKS] > 0]
    if len(top) < 2:
        return 0.0
    return -float(np.polyfit(np.log(np.arange(1, len(top) + 1)), np.log(top), 1)[0])
