"""Compares who leaves when the arena is full: hit rates of eviction policies on routes, in seconds and without a model.

    python -m benchmarks.policy_sim qwen uniform

One cache holds experts of all layers, each a slot. The prompt passes first as one batch, the union of its experts layer
by layer; then decoded tokens are counted. Where `cold` is said, no prompt passes; `cold, pattern` starts with the
experts there that the prompt used most, which it is told to prefer. `lru` and `belady` are those of
`edgemoe.cache_replay`. Lines for people go to standard error, the last line of standard output is the result as JSON.

The policy to beat them, `forecast`, keeps for each expert n = layer * N + expert the probability p[n] that the next
token to pass its layer uses it. That is a mixture of forecasters q[0..4]: a prior, and exponential averages of its use
with half-lives of 1, 4, 16 and 64 tokens. The weights w of the mixture are learnt while it runs, as EM would, one set
for all layers. N experts, k used by a token, L layers that have experts, all numbers double::

    start:    q[i][n] = p[n] = k / N, w[i] = 1/5 (5 forecasters)
    a layer is routed for m tokens, expert n by c[n] of them, before anything is evicted for it:
        if m = 1:  share[i] = sum over used n, by rank: w[i] q[i][n] / (w[0] q[0][n] + ... + w[4] q[4][n]) / k
                   w[i] = (1 - LEARN) w[i] + LEARN ((1 - SHARED) share[i] + SHARED / 5)
        for each half-life h_i, all n of the layer:  g = 2^(-min(m, MOST) / h_i)
                   q[i][n] = max(LEAST, g q[i][n] + (1 - g) (c[n] / m))
        for all n of the layer:  p[n] = w[0] q[0][n] + ... + w[4] q[4][n], added in this order
    victim while layer l is served: the smallest p[n] * (1 / (1 + d / L)) of what is there and not in use now, where
        d = 1 + (layer of n - l - 1) mod L layers pass before n's layer comes round; among equals the smallest n

A prompt batch counts as no more than MOST = 32 tokens, so that the cache does not forget what was decoded before it.
LEARN and SHARED are 0.02, LEAST is 1e-12. The last factor makes an expert whose layer was just passed leave before one
that is as likely, but soon. A pattern that prefers M experts of a layer is another prior: (1 - s) k / N for all and
s k / M more for those; s = sqrt(M / N) is about what hot lists of real text cover. What it is worth is learnt, as w[0].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numba
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from edgemoe.cache_replay import belady, lru
from edgemoe.routes import Routes, fitted_routes, read_routes, task_switch_routes, uniform_routes

TRACES = Path(__file__).parent / "routes"
LFU, LFRU, CLASS_LRU, DECAYED, PINNED, FORECAST = range(6)
HALF_LIVES = np.array([2.0, 8.0, 32.0, 128.0])
FORECASTERS = np.array([1.0, 4.0, 16.0, 64.0])
LEARN, SHARED, LEAST = 0.02, 0.02, 1e-12
MOST = 32
FIRST = 64

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]


@numba.njit(cache=True)
def forecast(q, w, p, first, counts, used, m):
    """One visit of the layer whose experts start at `first`: learn w if one token passes, then update q and p."""
    n_expert, n_forecasters = len(counts), len(w)
    if m == 1:
        share = np.zeros(n_forecasters)
        for e in used:
            total = 0.0
            for i in range(n_forecasters):
                total += w[i] * q[i, first + e]
            for i in range(n_forecasters):
                share[i] += w[i] * q[i, first + e] / total / len(used)
        for i in range(n_forecasters):
            w[i] = (1 - LEARN) * w[i] + LEARN * ((1 - SHARED) * share[i] + SHARED / n_forecasters)
    for i in range(1, n_forecasters):
        kept = 2.0 ** (-min(m, MOST) / FORECASTERS[i - 1])
        for e in range(n_expert):
            q[i, first + e] = max(LEAST, kept * q[i, first + e] + (1 - kept) * (counts[e] / m))
    for e in range(n_expert):
        total = 0.0
        for i in range(n_forecasters):
            total += w[i] * q[i, first + e]
        p[first + e] = total


@numba.njit(cache=True)
def replay(policy, batches, n_expert, n_slots, prior, chosen, warm, half_life):
    """Serve batches of tokens, ids [tokens, layers, k] each.

    Parameters
    ----------
    policy : int
    batches : list of int32 arrays [tokens, layers, k]
    prior : float64 array [layers * n_expert]
        Of `FORECAST`.
    chosen : bool array [layers * n_expert]
        A pattern's experts; `PINNED` lets them leave after all others.
    warm : bool
        Whether the chosen ones, no more than the slots, are there from the start.
    half_life : int array [batches]
        Of `DECAYED`: which of `HALF_LIVES` is in force.

    Returns
    -------
    hits : int64 array [batches]
    victims : list of int
    """
    n_layer = batches[0].shape[1]
    n = n_layer * n_expert
    q = np.empty((1 + len(FORECASTERS), n))
    q[:] = prior
    w, p = np.full(len(q), 1.0 / len(q)), prior.copy()
    # Of the other policies: visits that used an expert, when it was last used, in tokens and in order.
    uses, decayed = np.zeros(n), np.zeros((len(HALF_LIVES), n))
    at, order = np.zeros(n), np.zeros(n)
    turn, now = 0, 0.0

    resident, n_resident = np.empty(n_slots, np.int64), 0
    place = np.full(n, -1)
    if warm:
        for x in np.nonzero(chosen)[0]:
            resident[n_resident], place[x] = x, n_resident
            n_resident += 1
    in_use = np.zeros(n, np.bool_)
    key, wait = np.empty(n_slots), np.empty(n_layer)
    hits = np.zeros(len(batches), np.int64)
    victims = [0 for _ in range(0)]
    for b in range(len(batches)):
        batch = batches[b]
        m = len(batch)
        tokens = now
        for layer in range(n_layer):
            now = tokens + layer / n_layer
            first = layer * n_expert
            counts = np.zeros(n_expert)
            for t in range(m):
                for e in batch[t, layer]:
                    counts[e] += 1
            # One token's experts by rank, those of a prompt ascending.
            used = batch[0, layer] if m == 1 else np.nonzero(counts)[0].astype(np.int32)
            if policy == FORECAST:
                forecast(q, w, p, first, counts, batch[0, layer], m)
            for e in used:
                x = first + e
                for j in range(len(HALF_LIVES)):
                    decayed[j, x] = 1 + decayed[j, x] * 2.0 ** ((at[x] - now) / HALF_LIVES[j])
                uses[x] += 1
                turn += 1
                at[x], order[x] = now, turn
                in_use[x] = m == 1  # a prompt's experts pass one by one
            for other in range(n_layer):
                wait[other] = 1 / (1 + (1 + (other - layer - 1) % n_layer) / n_layer)
            for e in used:
                if place[first + e] >= 0:
                    hits[b] += 1
                    continue
                if n_resident < n_slots:
                    slot = n_resident
                    n_resident += 1
                else:
                    for s in range(n_slots):
                        x = resident[s]
                        if policy == LFU:
                            key[s] = uses[x] + 1e-9 * order[x]
                        elif policy == LFRU:
                            key[s] = uses[x] / (now - at[x] + 1 / n_layer)
                        elif policy == CLASS_LRU:
                            key[s] = np.floor(np.log2(decayed[3, x]) + (at[x] - now) / HALF_LIVES[3]) + 1e-9 * order[x]
                        elif policy == DECAYED:
                            key[s] = np.log2(decayed[half_life[b], x]) + at[x] / HALF_LIVES[half_life[b]]
                        elif policy == PINNED:
                            key[s] = order[x] + (1e12 if chosen[x] else 0.0)
                        else:
                            key[s] = p[x] * wait[x // n_expert]
                    slot = -1
                    for s in range(n_slots):
                        x = resident[s]
                        if not in_use[x] and (
                            slot < 0 or key[s] < key[slot] or (key[s] == key[slot] and x < resident[slot])
                        ):
                            slot = s
                    victims.append(resident[slot])
                    place[resident[slot]] = -1
                resident[slot], place[first + e] = first + e, slot
            for e in used:
                in_use[first + e] = False
        now = tokens + m
    return hits, victims


def hits(
    routes: Routes,
    n_slots: int,
    policy: int,
    *,
    half_life: int | Counts = 0,
    chosen: npt.NDArray[np.bool_] | None = None,
    warm: bool = False,
) -> Counts:
    """Hits of each decoded token, after the prompt as one batch; `half_life` may differ from token to token."""
    chosen = np.zeros(routes.n_layer * routes.n_expert, np.bool_) if chosen is None else chosen
    batches = [*([routes.prompt] if len(routes.prompt) else []), *routes.decode[:, None]]
    arms = np.zeros(len(batches), np.int64)
    arms[len(batches) - len(routes.decode) :] = half_life
    found, _ = replay(
        policy,
        numba.typed.List(np.ascontiguousarray(batch) for batch in batches),
        routes.n_expert,
        n_slots,
        prior(routes, chosen),
        chosen,
        warm,
        arms,
    )
    return np.asarray(found[len(batches) - len(routes.decode) :])


def prior(routes: Routes, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """How likely each expert is before any was used: all alike, or the chosen ones of a layer more."""
    of_layer = chosen.reshape(routes.n_layer, routes.n_expert)
    n_chosen = of_layer.sum(1, keepdims=True)
    share = np.sqrt(n_chosen / routes.n_expert)
    return (routes.n_used * ((1 - share) / routes.n_expert + share * of_layer / np.maximum(n_chosen, 1))).ravel()


def hottest(routes: Routes, n: int) -> npt.NDArray[np.bool_]:
    """The n experts that the prompt used most, over all layers; fewer if it used fewer."""
    counts = np.stack([np.bincount(ids.ravel(), minlength=routes.n_expert) for ids in routes.prompt.swapaxes(0, 1)])
    best = np.argsort(-counts.ravel(), kind="stable")[:n]
    chosen = np.zeros(counts.size, np.bool_)
    chosen[best[counts.ravel()[best] > 0]] = True
    return chosen


def bandit(arms: list[Counts], memory: float = 32.0) -> Counts:
    """Which arm to follow at each token: the one with most hits so far, those of `memory` tokens ago counted half."""
    scores = np.zeros(len(arms))
    choices = np.empty(len(arms[0]), np.int64)
    for token, hits_of in enumerate(zip(*arms, strict=True)):
        choices[token] = scores.argmax()
        scores = scores * 2 ** (-1 / memory) + hits_of
    return choices


def compare(routes: Routes, n_slots: int) -> dict[str, Counts]:
    """Hits of each decoded token by policy."""
    sizes = [1] * routes.n_layer
    cold = replace(routes, prompt=routes.prompt[:0])
    arms = [hits(routes, n_slots, DECAYED, half_life=j) for j in range(len(HALF_LIVES))]
    return {
        "lru": lru(routes.decode, sizes, n_slots, routes.prompt).hits,
        "lfu": hits(routes, n_slots, LFU),
        "lfru": hits(routes, n_slots, LFRU),
        "class-lru": hits(routes, n_slots, CLASS_LRU),
        "pinned": hits(routes, n_slots, PINNED, chosen=hottest(routes, n_slots // 2)),
        **{f"decayed {h:.0f}": arm for h, arm in zip(HALF_LIVES, arms, strict=True)},
        "bandit": hits(routes, n_slots, DECAYED, half_life=bandit(arms)),
        "forecast": hits(routes, n_slots, FORECAST),
        "belady": belady(routes.decode, sizes, n_slots, routes.prompt).hits,
        "cold lru": lru(cold.decode, sizes, n_slots).hits,
        "cold forecast": hits(cold, n_slots, FORECAST),
        "cold, pattern": hits(cold, n_slots, FORECAST, chosen=hottest(routes, n_slots), warm=True),
    }


def every_routes(seed: int) -> dict[str, Callable[[], Routes]]:
    """The three traces, the streams fitted to them, and two adversaries."""
    shapes = {"qwen": (48, 128, 6), "gemma": (30, 128, 6), "gptoss": (36, 128, 2)}
    return {
        **{kind: lambda kind=kind: read_routes(TRACES / f"{kind}.route.csv.gz") for kind in shapes},
        **{
            f"fitted {kind}": lambda kind=kind, shape=shape: fitted_routes(kind, *shape, 512, 256, seed)
            for kind, shape in shapes.items()
        },
        "uniform": lambda: uniform_routes(*shapes["qwen"], 512, 256, seed),
        "task switch": lambda: task_switch_routes("qwen", *shapes["qwen"], 512, 600, seed),
    }


@click.command(help=__doc__)
@click.argument("names", nargs=-1, metavar="[ROUTES]...")
@click.option("--ratio", type=click.FloatRange(min=1), multiple=True, default=(2, 4, 8, 16), show_default=True)
@click.option("--seed", type=int, default=5, show_default=True, help="Of the routes that are drawn.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def main(names: tuple[str, ...], ratio: tuple[float, ...], seed: int, out: Path | None) -> None:
    known = every_routes(seed)
    unknown = set(names) - set(known)
    if unknown:
        raise click.UsageError(f"no routes are called {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    console = Console(stderr=True)
    rows = []
    for name in names or known:
        routes = known[name]()
        cycle = routes.n_layer * routes.n_used
        table = Table(title=f"{name}: hits of {len(routes.decode)} tokens, of the first {FIRST}, in %", box=None)
        table.add_column("experts / slots", no_wrap=True)
        sizes = {f"{r:g}": int(routes.n_layer * routes.n_expert / r) for r in ratio} | {"half a cycle": cycle // 2}
        columns: dict[str, dict[str, Counts]] = {label: compare(routes, n) for label, n in sizes.items()}
        for label, n in sizes.items():
            table.add_column(f"{label}\n{n}", justify="right")
        for policy in columns["half a cycle"]:
            shown = []
            for label, n in sizes.items():
                rates = columns[label][policy] / cycle
                rows.append(
                    {
                        "routes": name,
                        "policy": policy,
                        "ratio": label,
                        "slots": n,
                        "hit_rate": round(rates.mean(), 4),
                        "first_64": round(rates[:FIRST].mean(), 4),
                    }
                )
                shown.append(f"{100 * rates.mean():.1f} {100 * rates[:FIRST].mean():.1f}")
            table.add_row(policy, *shown)
        console.print(table)
    result = json.dumps({"benchmark": "policy_sim", "seed": seed, "rows": rows})
    click.echo(result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(result + "\n")


if __name__ == "__main__":
    main()
