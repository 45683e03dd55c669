"""Memory that experts take, in pages, as the native store rounds it.

A *slab* is one expert's share of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgemoe.index import ExpertIndex
from edgemoe.memory import huge_pages_unasked, page_size

__all__ = ["SlabPages", "pages_of_one"]


def pages_of_one(n_bytes: int, offset: int) -> int:
    """Bytes of the whole pages that any one of many pieces of that size takes, which begin at that offset."""
    page = page_size()
    return -(-n_bytes // page) * page + (page if n_bytes % page or offset % page else 0)


class SlabPages:
    """Pages that experts occupy, rounded as the native store rounds them, bytes.

    A slab that does not start on a page shares its first and last page with its neighbours; counted for itself it
    may need one page more than its size.
    """

    def __init__(self, index: ExpertIndex) -> None:
        page = page_size()
        self._layers: dict[int, list[tuple[int, int]]] = {}  # for each expert tensor: pages of one slab, of all
        self._used: dict[int, int] = {}
        self._slab_bytes = {tensor.slab_bytes for tensor in index.experts}
        for tensor in index.experts:
            slab = pages_of_one(tensor.slab_bytes, tensor.offset)
            span = -(-(tensor.offset + tensor.n_bytes) // page) * page - tensor.offset // page * page
            self._layers.setdefault(tensor.layer, []).append((slab, span))
            self._used[tensor.layer] = index.n_expert_used[tensor.layer]
        self.total = sum(span for slabs in self._layers.values() for _, span in slabs)
        # Twice one token's experts: the next layer's can arrive while this layer's are in use.
        self.floor = min(2 * self.whole(1), self.total)

    def of_one_expert(self) -> tuple[int, ...]:
        """All parts of one expert of each layer, layers ascending."""
        return tuple(sum(slab for slab, _ in self._layers[layer]) for layer in sorted(self._layers))

    def in_slots(self, arena: int) -> bool:
        """Whether experts take turns in slots: slabs are whole pages, and not all have room."""
        return arena < self.total and not any(slab % page_size() for slab in self._slab_bytes)

    def spread(self, arena: int, n_ubatch: int) -> int:
        """Give what MUL_MAT_ID's tables take beyond page tables that are not needed, where experts are in slots.

        Negative where more page tables are not needed than those tables take.

        ggml-cpu.c, ggml_compute_forward_mul_mat_id: for each expert, here for each slot, a counter of 8 bytes, a cache
        line, and a place of 8 bytes for each row that a batch has (tokens times experts used), of which only those that
        chose the expert, one a token at most, are written to. In the course of time each slot's are. Where the kernel
        gives huge pages unasked, all of it is memory.
        """
        if not self.in_slots(arena):
            return 0
        n_slots = arena // min(self.of_one_expert())
        place = 8 * n_ubatch * max(self._used.values())
        written = place if huge_pages_unasked() else (-(-8 * n_ubatch // page_size()) + 1) * page_size()
        return n_slots * (72 + min(place, written)) + page_size() - (self.total - arena) // 512

    def whole(self, n_ubatch: int) -> int:
        """Worst case of one layer's experts for a batch, all parts at once."""
        return max(sum(self._for_batch(layer, n_ubatch)) for layer in self._layers)

    def one_tensor(self, n_ubatch: int) -> int:
        """Worst case of one expert tensor's share for a batch."""
        return max(max(self._for_batch(layer, n_ubatch)) for layer in self._layers)

    def _for_batch(self, layer: int, n_ubatch: int) -> Iterator[int]:
        for slab, span in self._layers[layer]:
            yield min(n_ubatch * self._used[layer] * slab, span)
