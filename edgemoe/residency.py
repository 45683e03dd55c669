"""Which experts may be chosen and which stay in memory: a set of experts put into force on a loaded model."""

from __future__ import annotations

import time
from dataclasses import dataclass

from edgemoe.expert_set import ExpertSet
from edgemoe.store import ExpertStore

__all__ = ["Residency", "Switch"]


@dataclass(frozen=True, slots=True)
class Switch:
    """What putting a set into force took.

    Attributes
    ----------
    bytes_read : int
        Bytes of experts that were not in memory yet.
    seconds : float
        Wall time.
    """

    bytes_read: int
    seconds: float


class Residency:
    """Keeps one set of experts in force at a time; starts with every expert allowed and none preferred.

    Parameters
    ----------
    store : ExpertStore
        Of the loaded model.
    layers : tuple of int
        Its MoE layers.
    """

    def __init__(self, store: ExpertStore, layers: tuple[int, ...]) -> None:
        self._store = store
        self._layers = layers

    def restrict(self, chosen: ExpertSet) -> Switch:
        """Route within the set and hold it in memory: PreMoe's pruned model.

        Raises
        ------
        StoreError
            If experts cannot be read.
        """
        self._allow(chosen)
        return self._hold(chosen)

    def prefer(self, chosen: ExpertSet) -> Switch:
        """Allow every expert, but have the set in memory now, and count its experts as likelier than others.

        Raises
        ------
        StoreError
            If experts cannot be read.
        """
        self._allow(None)
        return self._hold(chosen)

    def allow_all(self) -> None:
        """Allow every expert and prefer none; what is in memory stays until others need the room."""
        self._allow(None)
        for layer in self._layers:
            self._store.session.prefer(layer, [])

    def limit(self, chosen: ExpertSet | None) -> None:
        """Route within the set, or among all experts, reading experts only when they are used: for measuring."""
        self._allow(chosen)

    def _allow(self, chosen: ExpertSet | None) -> None:
        kept = {} if chosen is None else dict(zip(chosen.layers, chosen.kept, strict=True))
        for layer in self._layers:
            ids = kept.get(layer, ())
            # No list means no limit, which costs nothing while the model runs.
            whole = chosen is None or len(ids) == chosen.n_expert
            self._store.session.keep(layer, [] if whole else list(ids))

    def _hold(self, chosen: ExpertSet) -> Switch:
        started, before = time.perf_counter(), self._store.stats()
        # First who is likely, so that those of the former task make room.
        for layer, ids in zip(chosen.layers, chosen.kept, strict=True):
            self._store.session.prefer(layer, list(ids))
        for layer, ids in zip(chosen.layers, chosen.kept, strict=True):
            self._store.warm(layer, ids)
        return Switch(self._store.stats().bytes_read - before.bytes_read, time.perf_counter() - started)
