"""The disk under a model: how it is best read and how fast it is then, by a probe of two seconds, cached per disk.

The cache is ``disks.json`` in the user's cache folder, or in the folder that the environment variable EDGEMOE_CACHE
names.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from edgemoe.atomic_file import atomic_file
from edgemoe.errors import ModelFileError, StoreError

__all__ = ["DiskSpeed", "bandwidth", "disk_of", "huge_memory", "probe", "unmeasured"]

LANES = (8, 16, 4, 2, 1)
READ_BYTES = (1 << 20, 256 << 10, 4 << 20)
CANDIDATES = tuple((n, size) for size in READ_BYTES for n in LANES if n * size <= 16 << 20)
"""Lanes and read sizes to try, the best first where the disk does not mind; buffers hold 16 MiB at most.

A probe finds the processors idle. While a model computes, a lane waits for one after each read, and more lanes keep the
disk busy: a token took 252 ms with 8, 298 with 3 and 293 with 2, which the probe found equal.
"""

NEAR_BEST = 0.6
"""A way to read is as good as the best where it reaches this share of its bandwidth.

Tries of 50 ms of one way differ by up to twice on a shared disk. Where more lanes do harm, as on a disk that moves,
they are taken to do more than that.
"""

SECONDS = 2.0
"""What a probe takes; a disk that needs twice as long, because single reads are slow, is judged by what was tried."""

ROUNDS = 3
"""The median of three tries counts: others use the disk too, and caches below it answer some reads in no time."""

SMALL = 256 << 20
"""A model up to this many bytes is read sooner than measured."""

HUGE_PAGE = 2 << 20
"""Bytes of a huge page on x86-64 and most of aarch64; where they are larger, small pages do."""

KEPT_SECONDS = 30 * 24 * 3600
VERSION = 2

_SYSTEM = Path("/sys/dev/block")
# Of a mapped volume, an array, and a disk by NVMe, SCSI, virtio and MMC; a partition's are its disk's.
_IDENTITIES = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial", "device/cid", "device/model")


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """How a disk is best read.

    Attributes
    ----------
    lanes : int
        Reads at the same time.
    read_bytes : int
        Bytes of one read.
    bytes_per_s : float or None
        Bandwidth of O_DIRECT reads that way, bytes per second; None where it was not measured.
    reason : str
        Where this comes from, for printing.
    """

    lanes: int
    read_bytes: int
    bytes_per_s: float | None
    reason: str


def disk_of(path: str | os.PathLike[str]) -> str:
    """Name the disk that a file is on: the same at every start of the system where disk and file system tell.

    Disks are told apart by serial number or the like, partitions by their file system's number. What is no disk of
    this machine (a network, an overlay) has its device number.

    Raises
    ------
    ModelFileError
        If there is no such file.
    """
    try:
        device = os.stat(path).st_dev  # noqa: PTH116 (a path of any kind)
        file_system = os.statvfs(path).f_fsid
    except OSError as error:
        raise ModelFileError(f"{os.fspath(path)} cannot be found ({error.strerror}); check the path") from error
    number = f"{os.major(device)}:{os.minor(device)}"
    block = (_SYSTEM / number).resolve()
    disk = block.parent if (block / "partition").exists() else block
    for name in _IDENTITIES:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            identity = (disk / name).read_text().strip()
            if identity:
                return f"{identity} {file_system:x}"
    return f"{number} {file_system:x}"


def bandwidth(path: str | os.PathLike[str], lanes: int, read_bytes: int, seconds: float) -> float:
    """Measure O_DIRECT reads at places spread over a file.

    Parameters
    ----------
    path : path-like
        The file.
    lanes : int
        Threads that read at the same time, each into a buffer of its own; all are freed at the end.
    read_bytes : int
        Bytes of one read, whole pages.
    seconds : float
        When to begin no further read.

    Returns
    -------
    float
        Bytes per second.

    Raises
    ------
    StoreError
        If the file cannot be opened or read that way.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except AttributeError:
        raise StoreError("this system has no O_DIRECT; use Linux to measure disks") from None
    except OSError as error:
        raise StoreError(f"O_DIRECT refuses {path} ({error.strerror}); keep it on a local disk") from error
    try:
        places = max(os.fstat(file).st_size - read_bytes, 0) // mmap.PAGESIZE
        with _buffers(lanes, read_bytes) as buffers, ThreadPoolExecutor(lanes) as threads:
            begin = time.monotonic()

            def lane(buffer: memoryview) -> int:
                done = 0
                while True:
                    done += os.preadv(file, [buffer], random.randint(0, places) * mmap.PAGESIZE)
                    if time.monotonic() - begin >= seconds:
                        return done

            done = sum(threads.map(lane, buffers))
            took = time.monotonic() - begin
        if not done:
            raise StoreError(f"{path} is empty: there is no speed to measure; download or copy it again")
        return done / took
    except (OSError, RuntimeError) as error:  # RuntimeError: no more threads to be had
        raise StoreError(f"O_DIRECT reads of {path} fail ({error}); check the disk") from error
    finally:
        os.close(file)


def huge_memory(n_bytes: int) -> mmap.mmap:
    """Reserve anonymous memory of this process, in huge pages where there are any; it is taken as it is touched."""
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


@contextlib.contextmanager
def _buffers(n: int, n_bytes: int) -> Iterator[list[memoryview]]:
    """Give so many buffers of whole pages, in huge pages where there are any.

    As the experts' slots are: reads to scattered small pages may take three times as long.
    """
    n_whole = -(-n * n_bytes // HUGE_PAGE) * HUGE_PAGE
    pages = huge_memory(n_whole + HUGE_PAGE)
    first = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % HUGE_PAGE
    for at in range(first, first + n_whole, mmap.PAGESIZE):
        pages[at] = 0  # lest the first reads be charged for the memory
    with pages, memoryview(pages) as whole, contextlib.ExitStack() as parts:
        yield [parts.enter_context(whole[at : at + n_bytes]) for at in range(first, first + n * n_bytes, n_bytes)]


def probe(path: str | os.PathLike[str]) -> DiskSpeed:
    """Give the best way to read a file's disk, measured on the file itself unless that was done in the last 30 days.

    It takes 2 seconds and at most 16 MiB, which are given back. Where nothing can be measured, and for a small model,
    whose short reads would never come near, the result is 8 lanes of 1 MiB and says why.

    Raises
    ------
    ModelFileError
        If there is no such file.
    """
    disk = disk_of(path)
    size = Path(path).stat().st_size
    if size <= SMALL:
        return unmeasured(f"a model of {size >> 20} MiB is not worth measuring")
    cache = Path(os.environ.get("EDGEMOE_CACHE") or platformdirs.user_cache_path("edgemoe")) / "disks.json"
    known = _read(cache)
    if disk not in known:
        try:
            known[disk] = _measured(lambda lanes, read_bytes, seconds: bandwidth(path, lanes, read_bytes, seconds))
        except StoreError as error:
            return unmeasured(str(error))
        with contextlib.suppress(OSError):  # without a cache the next start measures again
            _write(cache, known)
    best = known[disk]
    day = time.strftime("%Y-%m-%d", time.localtime(best.measured))
    return DiskSpeed(best.lanes, best.read_bytes, best.bytes_per_s, f"measured on {day}")


def unmeasured(reason: str) -> DiskSpeed:
    """Give what suits most disks: 8 lanes of 1 MiB."""
    return DiskSpeed(lanes=8, read_bytes=1 << 20, bytes_per_s=None, reason=reason)


@dataclass(frozen=True, slots=True)
class _Measured:
    """What the cache holds of a disk: as `DiskSpeed`, and when it was measured (Unix time, seconds)."""

    lanes: int
    read_bytes: int
    bytes_per_s: float
    measured: float

    def __post_init__(self) -> None:
        whole = isinstance(self.lanes, int) and isinstance(self.read_bytes, int)
        if not whole or (self.lanes, self.read_bytes) not in CANDIDATES or not 0 < self.bytes_per_s < math.inf:
            raise ValueError("not what a probe finds")


def _measured(measure: Callable[[int, int, float], float]) -> _Measured:
    """Try the candidates; `measure(lanes, read_bytes, seconds)` gives bytes per second."""
    begin = time.monotonic()
    tries: dict[tuple[int, int], list[float]] = {}
    for candidate in CANDIDATES * ROUNDS:
        if time.monotonic() - begin < 2 * SECONDS:
            tries.setdefault(candidate, []).append(measure(*candidate, SECONDS / len(CANDIDATES) / ROUNDS))
    found = {candidate: statistics.median(speeds) for candidate, speeds in tries.items()}
    enough = NEAR_BEST * max(found.values())
    (lanes, read_bytes), speed = next(item for item in found.items() if item[1] >= enough)
    return _Measured(lanes, read_bytes, speed, time.time())


def _read(cache: Path) -> dict[str, _Measured]:
    """Read the cache without what is too old; empty where it is missing or damaged, for it is only a cache."""
    try:
        document = json.loads(cache.read_bytes())
        if document["version"] != VERSION:
            return {}
        known = {disk: _Measured(**entry) for disk, entry in document["disks"].items()}
        now = time.time()
        return {disk: entry for disk, entry in known.items() if 0 <= now - entry.measured < KEPT_SECONDS}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _write(cache: Path, known: dict[str, _Measured]) -> None:
    document = {"version": VERSION, "disks": {disk: asdict(entry) for disk, entry in known.items()}}
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(cache) as file:
        file.write(json.dumps(document, indent=2).encode())
