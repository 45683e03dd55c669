"""The Python face of the native expert store: one model's experts, their files and the statistics."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from edgemoe.disk import probe, unmeasured
from edgemoe.errors import StoreError, UnsupportedPlatformError
from edgemoe.index import ExpertIndex

if sys.platform == "win32":
    raise UnsupportedPlatformError("edgemoe runs on Linux, not on Windows itself; install it inside WSL 2")

try:
    from edgemoe import _native
except ImportError as error:
    raise StoreError(
        f"edgemoe's native core cannot be loaded ({error}); install edgemoe anew, in a clone with: pip install ."
    ) from error

RouteForcer = _native.RouteForcer
"""Forces what a plain llama.cpp context routes to: an eval callback, for measuring."""

IO_MODES = ("auto", "direct", "mmap", "pread")


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters of an `ExpertStore` since it was opened.

    A slab is one expert's share of one tensor (gate, up or down).

    Attributes
    ----------
    hits, misses, evictions : int
        Slabs found in memory or already on their way, read from disk, dropped for others.
    expected_hits : int
        Those of the hits that were read ahead.
    bytes_read : int
        Expert bytes read from disk.
    dense_bytes : int
        Bytes of all other tensors read so far, rows of the token embedding included.
    resident_bytes, peak_bytes, arena_bytes : int
        Memory that experts hold now, held at most, may hold at most.
    read_seconds, busy_seconds : float
        Wall time that computation waited for experts; in which at least one read was under way.
    prefetched_bytes, wasted_bytes : int
        Read because the next layer was likely to need them; left without having been used.
    retries : int
        Reads that failed and were repeated.
    staged_layers : int
        Times that a layer's experts did not fit at once and were served tensor by tensor.
    routed_slots, skipped_slots : int
        While skipping was on (`ExpertStore.skip`): experts that decoded tokens selected; those of them left out.
    routed_layers : int
        The same: layers that decoded tokens passed.
    skipped_mass : float
        Sum over these of the share of the router's weights, 0 to 1, that was left out.
    """

    hits: int
    misses: int
    expected_hits: int
    evictions: int
    bytes_read: int
    dense_bytes: int
    resident_bytes: int
    peak_bytes: int
    arena_bytes: int
    read_seconds: float
    busy_seconds: float
    prefetched_bytes: int
    wasted_bytes: int
    retries: int
    staged_layers: int
    routed_slots: int
    skipped_slots: int
    routed_layers: int
    skipped_mass: float

    @property
    def hit_rate(self) -> float:
        """Share of the slabs asked for that were in memory, 0 to 1 (1 when none was asked for)."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the store does beyond reading on demand; for measuring what each is worth.

    Attributes
    ----------
    recycle : bool
        Experts take turns in fixed places, or at least in the memory of those that leave, instead of giving it back to
        the system.
    overlap : bool
        A layer computes while its later parts are still arriving.
    look_ahead : bool
        Experts are read before they are asked for, while a layer computes: those that the next layers are likely to
        need or, where everything fits and the batch is long, the rest of this one's.
    forecast : bool
        Who is least likely to be used soon leaves, instead of the least recently used.
    """

    recycle: bool = True
    overlap: bool = True
    look_ahead: bool = True
    forecast: bool = True

    @classmethod
    def plain(cls) -> Tuning:
        """Give the control arm of measurements: the least recently used leaves, and nothing else."""
        return cls(recycle=False, overlap=False, look_ahead=False, forecast=False)


class ExpertStore:
    """Experts of one model, read on demand into an arena of fixed size.

    Parameters
    ----------
    index : ExpertIndex
        Which bytes of which file belong to which expert.
    arena_bytes : int
        Memory for experts.
    io : str
        ``direct`` (O_DIRECT), ``mmap``, ``pread``, or ``auto``: direct where a probe on the file shows that it works,
        else mmap.
    tuning : Tuning
        Everything on by default.
    rows_bytes : int
        Memory for rows of the token embedding, which are then read when tokens need them; 0 holds all of it.

    Attributes
    ----------
    io, io_reason : str
        The mode in use and why.
    disk : DiskSpeed
        How the disk is best read, and how fast it is then.
    load_bytes : int
        What a model reads while it loads: all that is neither an expert nor read by rows.

    Raises
    ------
    StoreError
        When a file cannot be opened or does not support the asked mode.
    """

    def __init__(
        self,
        index: ExpertIndex,
        arena_bytes: int,
        io: str = "auto",
        tuning: Tuning | None = None,
        rows_bytes: int = 0,
    ) -> None:
        self.arena_bytes = arena_bytes
        table = index.token_table if rows_bytes else None
        self.load_bytes = index.dense_bytes - (table.n_bytes if table else 0)
        self.io, self.io_reason = choose_io(index, io)
        if self.io == "direct":
            self.disk = probe(index.largest_file)
        else:
            self.disk = unmeasured(f"reads by {self.io} are not measured")
        self.n_lanes = max(2, self.disk.lanes)  # one to read ahead while the caller waits for another
        self._paths = index.files
        with _as_store_error():
            session = _native.Session(
                self.io, self.n_lanes, self.disk.read_bytes, arena_bytes, **asdict(tuning or Tuning())
            )
            for path in index.files:
                session.add_file(os.fspath(path))
            for tensor in index.tensors:
                rows = {"row_bytes": tensor.row_bytes, "most_bytes": rows_bytes} if tensor is table else {}
                session.add_tensor(tensor.name, tensor.file, tensor.offset, tensor.n_bytes, **rows)
            for expert in index.experts:
                session.add_tensor(
                    expert.name, expert.file, expert.offset, expert.n_bytes, expert.layer, expert.n_expert
                )
        self._session: _native.Session | None = session

    @property
    def session(self) -> _native.Session:
        """The native object, for the backend.

        Raises
        ------
        StoreError
            After `close`.
        """
        if self._session is None:
            raise StoreError("the expert store is closed; open the model again")
        return self._session

    def attach(self, symbols: Mapping[str, int]) -> None:
        """Connect to the loaded libllama, given the addresses of its functions."""
        self.session.attach(dict(symbols))

    def begin(self, position: int, n_tokens: int) -> None:
        """Prepare for the evaluation of so many tokens that start there.

        Raises
        ------
        StoreError
            If what is still being read cannot be had.
        """
        with _as_store_error():
            self.session.begin(position, n_tokens)

    def use_slots(self, spared_bytes: int, lent_bytes: int) -> None:
        """Settle where experts will be, once all tensors are placed: parameters as in `edgemoe.plan.ExpertPlan`.

        Raises
        ------
        StoreError
            If there is no address space for them.
        """
        with _as_store_error():
            self.session.use_slots(spared_bytes, lent_bytes)

    def raise_failure(self) -> None:
        """Raise what the native hook could not serve since the last decode began, if anything.

        Raises
        ------
        StoreError
            Names the file and what the system said.
        """
        failure = self.session.take_failure()
        if failure:
            raise StoreError(f"{failure}; the answer so far is good, the rest was not computed")

    def stats(self) -> StoreStats:
        """Counters so far; may be called from any thread while the model runs."""
        session = self.session
        native, skips = session.stats(), session.skip_counts()
        return StoreStats(
            hits=native.hits,
            misses=native.misses,
            expected_hits=native.expected_hits,
            evictions=native.evictions,
            bytes_read=native.bytes_read,
            dense_bytes=native.dense_bytes,
            resident_bytes=native.resident_bytes,
            peak_bytes=native.peak_bytes,
            arena_bytes=native.arena_bytes,
            read_seconds=native.read_ns / 1e9,
            busy_seconds=native.busy_ns / 1e9,
            prefetched_bytes=native.expected_bytes,
            wasted_bytes=native.wasted_bytes,
            retries=native.retries,
            staged_layers=session.staged_layers(),
            routed_slots=skips.routed_slots,
            skipped_slots=skips.skipped_slots,
            routed_layers=skips.routed_layers,
            skipped_mass=skips.skipped_mass,
        )

    def warm(self, layer: int, experts: Sequence[int]) -> None:
        """Read those of a layer's experts that are not in memory, ahead of their use.

        Raises
        ------
        StoreError
            If they cannot be read, or are more than the arena holds.
        """
        with _as_store_error():
            self.session.warm(layer, list(experts))

    def residents(self) -> dict[int, tuple[int, ...]]:
        """Give the experts of each layer that are in memory, those first that are likeliest to be used.

        Where all experts fit nobody has to leave, so that nothing is known of how likely they are.
        """
        return {layer: tuple(ids) for layer, ids in enumerate(self.session.residents()) if ids}

    def skip(self, mass: float, cache_bytes: int) -> None:
        """Leave out experts of low weight that are misses, while tokens are decoded one by one.

        Parameters
        ----------
        mass : float
            Largest share of a token's router weights to leave out in a layer, 0 (nothing) to 0.5.
        cache_bytes : int
            Experts that a virtual cache holds which sees routing alone: what it does not hold is a miss.
        """
        self.session.skip(mass, cache_bytes)

    def forget_page_cache(self) -> None:
        """Drop the model files' pages from the page cache: what was read through it is now held in memory."""
        for path in self._paths:
            _native.forget_file(os.fspath(path))

    def close(self) -> None:
        """Join the reading threads and close the files. The model that uses the store must be freed before."""
        self._session = None

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def return_freed_memory() -> None:
    """Have the C allocator hand freed memory back to the system, now and for large blocks from now on."""
    _native.return_freed_memory()


def forget_libraries() -> None:
    """Drop what loading our own libraries and modules left in the page cache beyond the pages in use.

    Only a memory cgroup counts it, and there it is 40 MiB at a cold start: most of a library is read ahead.
    """
    maps = Path("/proc/self/maps")
    files = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()} if maps.exists() else set()
    files |= {str(getattr(module, "__cached__", None)) for module in list(sys.modules.values())}
    for path in files:
        if path.startswith("/"):
            with contextlib.suppress(OSError):  # deleted since, or not a file
                _native.forget_file(path)


def memory_use(symbols: Mapping[str, int], llama_context: int) -> tuple[int, int, int]:
    """Ask what the llama_context at that address allocates: bytes of model, caches and compute buffers."""
    return _native.memory_use(dict(symbols), llama_context)


def choose_io(index: ExpertIndex, io: str) -> tuple[str, str]:
    """Settle the I/O mode by a probe on each part of the model: ``(mode, reason)``."""
    if io not in IO_MODES:
        raise StoreError(f"io={io} is unknown; give one of {', '.join(IO_MODES)}")
    if io in ("mmap", "pread"):
        return io, "asked for"
    for number, path in enumerate(index.files):
        offset = next((tensor.offset for tensor in index.experts if tensor.file == number), 0)
        with _as_store_error():
            works, why = _native.probe_direct(os.fspath(path), offset)
        if not works:
            if io == "direct":
                raise StoreError(f"io=direct cannot read {path}: {why}; use io=auto")
            return "mmap", why
    return "direct", "O_DIRECT reads of the file give its own bytes"


@contextlib.contextmanager
def _as_store_error() -> Iterator[None]:
    """Turn the native core's OSError into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{error}; check the file and the disk") from error
