"""Which experts may be chosen and which stay in memory: a set of experts put into force on a loaded model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgemoe.expert_set import ExpertSet
from edgemoe.index import ExpertIndex
from edgemoe.plan import expert_pages
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
    index : ExpertIndex
        The model.
    """

    def __init__(self, store: ExpertStore, index: ExpertIndex) -> None:
        self._store = store
        self._layers = index.moe_layers
        self._expert_bytes = dict(zip(index.moe_layers, expert_pages(index), strict=True))

    def restrict(self, chosen: ExpertSet) -> Switch:
        """Route within the set and hold it in memory: PreMoe's pruned model.

        Raises
        ------
        StoreError
            If experts cannot be read.
        """
        self._allow(chosen)
        return self._hold(_by_layer(chosen), _by_layer(chosen))

    def prefer(self, chosen: ExpertSet) -> Switch:
        """Allow every expert, but have the set in memory now, and count its experts as likelier than others.

        Raises
        ------
        StoreError
            If experts cannot be read.
        """
        self._allow(None)
        return self._hold(_by_layer(chosen), _by_layer(chosen))

    def restore(self, residents: Mapping[int, tuple[int, ...]], preferred: ExpertSet | None) -> Switch:
        """Allow every expert, and have those in memory that were when a session was saved, as many as the arena holds.

        Parameters
        ----------
        residents : Mapping of int to tuple of int
            What `ExpertStore.residents` said then.
        preferred : ExpertSet or None
            Experts of the active task. Without a task those of the session count as likelier than others.

        Raises
        ------
        StoreError
            If experts cannot be read.
        """
        self._allow(None)
        likely = residents if preferred is None else _by_layer(preferred)
        return self._hold(likely, self._what_fits(residents))

    def _what_fits(self, residents: Mapping[int, tuple[int, ...]]) -> dict[int, list[int]]:
        """Take the likeliest of every layer, then the second ones, and so on."""
        ranked = sorted((rank, layer, expert) for layer, ids in residents.items() for rank, expert in enumerate(ids))
        chosen: dict[int, list[int]] = {}
        room = self._store.arena_bytes
        for _, layer, expert in ranked:
            room -= self._expert_bytes[layer]
            if room < 0:
                break
            chosen.setdefault(layer, []).append(expert)
        return chosen

    def allow_all(self) -> None:
        """Allow every expert and prefer none; what is in memory stays until others need the room."""
        self._allow(None)
        for layer in self._layers:
            self._store.session.prefer(layer, [])

    def limit(self, chosen: ExpertSet | None) -> None:
        """Route within the set, or among all experts, reading experts only when they are used: for measuring."""
        self._allow(chosen)

    def _allow(self, chosen: ExpertSet | None) -> None:
        kept = _by_layer(chosen)
        for layer in self._layers:
            ids = kept.get(layer, ())
            # No list means no limit, which costs nothing while the model runs.
            whole = chosen is None or len(ids) == chosen.n_expert
            self._store.session.keep(layer, [] if whole else list(ids))

    def _hold(self, likely: Mapping[int, Sequence[int]], warm: Mapping[int, Sequence[int]]) -> Switch:
        started, before = time.perf_counter(), self._store.stats()
        # First who is likely, so that those of the former task make room.
        for layer in self._layers:
            self._store.session.prefer(layer, list(likely.get(layer, ())))
        for layer, ids in warm.items():
            self._store.warm(layer, ids)
        return Switch(self._store.stats().bytes_read - before.bytes_read, time.perf_counter() - started)


def _by_layer(chosen: ExpertSet | None) -> dict[int, tuple[int, ...]]:
    return {} if chosen is None else dict(zip(chosen.layers, chosen.kept, strict=True))
