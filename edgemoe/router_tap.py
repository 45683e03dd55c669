"""The native hook's records as `RouterTrace`s, one for each decode, handed on as they come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edgemoe.errors import TraceError
from edgemoe.index import ExpertIndex
from edgemoe.plan import PlanLine
from edgemoe.store import ExpertStore
from edgemoe.trace import ExpertOutputs, RouterTrace

__all__ = ["RouterTap", "trace_memory"]

_NO_CUT = -1


class RouterTap:
    """Watches the routers of a loaded model.

    Parameters
    ----------
    store : ExpertStore
        Of the model; attached.
    index : ExpertIndex
        Its header.
    """

    def __init__(self, store: ExpertStore, index: ExpertIndex) -> None:
        self._store = store
        self._index = index
        self._layers: tuple[int, ...] = ()
        self._outputs = False
        self._listener: Callable[[RouterTrace], None] | None = None

    @contextlib.contextmanager
    def watch(
        self,
        listener: Callable[[RouterTrace], None],
        layers: Sequence[int] | None = None,
        *,
        outputs: bool = False,
        cut: bool = False,
    ) -> Iterator[None]:
        """Call `listener` after each decode within this context.

        Parameters
        ----------
        listener : callable
            Takes the batch's `RouterTrace`.
        layers : sequence of int, optional
            MoE layers to watch, ascending; all of them by default.
        outputs : bool
            Record what the chosen experts give, too.
        cut : bool
            Leave out of each decode what comes after the last watched layer's router (its experts with `outputs`).
            Its logits are void then; keys and values of the layers before are good.

        Raises
        ------
        TraceError
            On leaving a decode: if a layer routes without logits, or gives no outputs to watch.
        """
        self._layers = tuple(self._index.moe_layers if layers is None else layers)
        self._outputs = outputs
        session = self._store.session
        session.watch_routers(list(self._layers), outputs)
        session.cut_after(self._layers[-1] if cut else _NO_CUT)
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None
            session.watch_routers([], False)
            session.cut_after(_NO_CUT)

    def drain(self) -> None:
        """Hand on what the latest decode left. For the backend, after each decode that succeeded."""
        if self._listener is not None:
            self._listener(self._take())

    def _take(self) -> RouterTrace:
        session = self._store.session
        logits, outputs = [], []
        for layer in self._layers:
            rows, *rest = session.take_trace(layer)
            logits.append(rows)
            outputs.append(rest)
        n_tokens = max(map(len, logits))
        for layer, rows, (_, weights, _, _) in zip(self._layers, logits, outputs, strict=True):
            if len(rows) != n_tokens:
                raise TraceError(
                    f"layer {layer} of {self._index.path} routed {len(rows)} of {n_tokens} tokens by logits; tasks"
                    " cannot be profiled with this architecture, use experts=all"
                )
            if self._outputs and len(weights) != n_tokens:
                raise TraceError(
                    f"layer {layer} of {self._index.path} ({self._index.architecture}) does not show what its experts"
                    " give; use criteria of the router alone"
                )
        return RouterTrace(self._layers, np.stack(logits), self._stack(outputs) if self._outputs else None)

    def _stack(self, layers: Sequence[Sequence[np.ndarray]]) -> ExpertOutputs:
        """Join the layers' outputs, padded to the widest top-k."""
        widest = max(ids.shape[1] for ids, *_ in layers)

        def padded(which: int, filler: float) -> np.ndarray:
            arrays = [arrays[which] for arrays in layers]
            return np.stack([np.pad(a, ((0, 0), (0, widest - a.shape[1])), constant_values=filler) for a in arrays])

        change = np.stack([arrays[3][:, 0] for arrays in layers])
        return ExpertOutputs(padded(0, -1), padded(1, 0), padded(2, 0), change)


def trace_memory(index: ExpertIndex, n_tokens: int, *, outputs: bool = False) -> PlanLine:
    """Plan for watching all routers while a batch is handed over: natively, in numpy, with room to grow."""
    per_token = 4 * index.n_expert + (20 * max(index.n_expert_used) if outputs else 0)
    n_bytes = 3 * n_tokens * len(index.moe_layers) * per_token
    return PlanLine("router trace", n_bytes, f"what the routers say of {n_tokens} tokens at once")
