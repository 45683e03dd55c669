"""What the arms of a bench evaluate: text with the model's own routing, or random tokens with routes by force."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from edgemoe.bench_arm import Settings, ask_text
from edgemoe.bench_roofline import with_last_layer
from edgemoe.bench_run import Workload
from edgemoe.errors import TraceError
from edgemoe.index import ExpertIndex
from edgemoe.plan import DEFAULT_UBATCH
from edgemoe.route_statistics import TRACES, RouteStatistics, check
from edgemoe.routes import Routes, fitted_routes, predictions, read_routes, task_switch_routes, uniform_routes

__all__ = ["FITTED_TO", "LOST_AHEAD", "NATURAL", "departures", "make_workload"]

NATURAL = "natural"
FITTED_TO = "qwen"
FITTED_EXPERTS, FITTED_USED = 128, 6
"""The model whose routing `fitted` and `switch` imitate, and its trace's experts of a layer and of a token: other
numbers change the statistics. `uniform` uses as many, to be comparable."""

MEASURED = TRACES[FITTED_TO].n_token
"""Decoded tokens that routes are judged by."""

LOST_AHEAD = 0.04
"""What routers' recall loses with each further layer that they are asked ahead: 0.035 to 0.04 on a large model
(BigMoeOnEdge, pull request 142). The test model, which has 8 layers rather than 48, loses 0.08 to 0.4."""

_SEED = 0


def make_workload(
    routing: str, index: ExpertIndex, settings: Settings, n_prompt: int, n_decode: int, recall: float | None
) -> tuple[Workload, ExpertIndex]:
    """Make the tokens and their routes.

    Parameters
    ----------
    routing : str
        ``natural``, ``fitted``, ``uniform``, ``switch``, or the path of a trace (`edgemoe.routes.read_routes`).
    index : ExpertIndex
        The model.
    settings : Settings
        How it would be opened, to record natural routes.
    n_prompt, n_decode : int
        Tokens.
    recall : float or None
        Share of the next layer's experts that look-ahead is told rightly, 0 to 1, `LOST_AHEAD` less of those of the
        layer after it; None lets it ask the routers.

    Returns
    -------
    workload : Workload
    index : ExpertIndex
        With as many experts per token as the routes have.

    Raises
    ------
    TraceError
        If the trace is none, does not fit the model, or `recall` is given with natural routing.
    ArmError
        If the model cannot be opened.
    """
    if routing == NATURAL:
        if recall is not None:
            raise TraceError(f"--recall {recall} needs forced routes; give --routes fitted or a trace")
        tokens, ids = ask_text(replace(settings, n_ubatch=DEFAULT_UBATCH), n_prompt + n_decode)
        natural = None if ids is None else Routes(NATURAL, index.n_expert, ids[:n_prompt], ids[n_prompt:])
        return Workload(tokens[:n_prompt], tokens[n_prompt:], _as_seen(natural, index), forced=False), index
    layers = index.moe_layers
    shape = (len(layers), index.n_expert, min(FITTED_USED, *(index.n_expert_used[layer] for layer in layers)))
    if routing == "fitted":
        routes = fitted_routes(FITTED_TO, *shape, n_prompt, n_decode, _SEED)
    elif routing == "uniform":
        routes = uniform_routes(*shape, n_prompt, n_decode, _SEED)
    elif routing == "switch":
        routes = task_switch_routes(FITTED_TO, *shape, n_prompt, n_decode, _SEED + 1)  # else it began as `fitted`
    else:
        routes = read_routes(Path(routing)).shaped(*shape[:2]).stretched(n_prompt, n_decode)
    tokens = np.random.default_rng(_SEED).integers(0, index.n_vocab, n_prompt + n_decode).tolist()
    predicted = None
    if recall is not None:
        ids = np.concatenate([routes.prompt, routes.decode])
        predicted = predictions(ids, index.n_expert, (recall, max(0.0, recall - LOST_AHEAD)), _SEED)
    workload = Workload(tokens[:n_prompt], tokens[n_prompt:], _as_seen(routes, index), True, predicted)
    return workload, index.using(routes.n_used)


def departures(routes: Routes, measured: RouteStatistics) -> list[str] | None:
    """Name what differs from the trace that routes were fitted to; None where there is no trace of their shape."""
    drawn = routes.name == f"fitted {FITTED_TO}"
    alike = (routes.n_expert, routes.n_used, measured.n_token) == (FITTED_EXPERTS, FITTED_USED, MEASURED)
    return check(measured, FITTED_TO) if drawn and alike else None


def _as_seen(routes: Routes | None, index: ExpertIndex) -> Routes | None:
    """Take the model's last layer as llama.cpp computes it: for the prompt's last token alone."""
    if routes is None or index.moe_layers[-1] != index.n_layer - 1 or not len(routes.prompt):
        return routes
    return replace(routes, prompt=with_last_layer(routes.prompt))
