"""How much memory there is and how much of it we may use: sizes in text, RAM, cgroup limits, our own RSS."""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from edgemoe.errors import BudgetError
from edgemoe.own_cgroup import MEMBERSHIP, ROOT, own_cgroups, read_number, read_text

__all__ = [
    "Budget",
    "Machine",
    "current_rss",
    "format_bytes",
    "huge_pages_unasked",
    "machine",
    "page_size",
    "parse_budget",
    "parse_size",
    "peak_rss",
]

_EXAMPLES = "write a size such as 6GiB or 800MB, a share such as 50%, or auto"
_MAX_BYTES = 1 << 50
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    # A bare letter is binary, as for docker, systemd and java; "GB" is decimal, as on the box.
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_NUMBER = r"(\d{1,18}(?:\.\d{1,18})?)"
_SIZE = re.compile(rf"{_NUMBER}\s*({'|'.join(_UNITS)})", re.ASCII | re.IGNORECASE)
_PERCENT = re.compile(rf"{_NUMBER}\s*%", re.ASCII)

_RESERVE_MIN = 256 << 20
_STATUS = Path("/proc/self/status")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory of this machine as this process sees it, all in bytes.

    Attributes
    ----------
    total : int
        Installed RAM.
    available : int
        RAM that can be had without swapping (``MemAvailable``).
    cgroup_limit : int or None
        Limit of the tightest memory cgroup around this process (its own or an ancestor), None without one.
    cgroup_used : int or None
        What *other* processes of that cgroup hold: reclaimable page cache and our own RSS are not counted.
    """

    total: int
    available: int
    cgroup_limit: int | None = None
    cgroup_used: int | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """A memory budget for the whole process.

    Attributes
    ----------
    bytes : int
        The bound, in bytes.
    reason : str
        Where the number comes from, for printing ("ram=6GiB", "50% of 23.4 GiB RAM", ...).
    """

    bytes: int
    reason: str


def parse_size(text: str) -> int:
    """Read a size such as ``6GiB``, ``512 MiB``, ``1.5GB`` or ``800000000``.

    Parameters
    ----------
    text : str
        A positive number and a unit: none or ``B`` (bytes), ``KB``..``TB`` (powers of 1000), ``KiB``..``TiB``
        or the bare letter (powers of 1024). Case does not matter.

    Returns
    -------
    int
        Bytes, rounded down.

    Raises
    ------
    BudgetError
        If the text is not a size, or is not between 1 byte and 1 PiB.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BudgetError(f"{_quote(text)} is not a memory size; {_EXAMPLES}")
    number, unit = match[1], match[2].lower()
    if "." in number and _UNITS[unit] == 1:
        raise BudgetError(f"{_quote(text)} is not a whole number of bytes; {_EXAMPLES}")
    size = int(Fraction(number) * _UNITS[unit])
    if not 0 < size <= _MAX_BYTES:
        raise BudgetError(f"a memory size of {_quote(text)} is not between 1 byte and 1 PiB; {_EXAMPLES}")
    return size


def parse_budget(text: str | int, machine: Machine | None = None) -> Budget:
    """Turn what the user gave as ``--ram`` into a number of bytes and the reason for it.

    Parameters
    ----------
    text : str or int
        Bytes, a size (see `parse_size`), a share of RAM such as ``50%`` (of the cgroup's limit where that is
        lower), or ``auto``: the smaller of what the cgroup and the machine have left, minus a reserve of 5 %
        (at least 256 MiB, at most a quarter) for page cache and neighbours.
    machine : Machine, optional
        Measured now when not given; plain sizes do not need it.

    Returns
    -------
    Budget
        Bytes and their reason.

    Raises
    ------
    BudgetError
        If the text is not a budget, or the number is not sensible.
    """
    # Checked before it becomes text: Python refuses to write out a very long integer.
    if isinstance(text, int) and not 0 < text <= _MAX_BYTES:
        raise BudgetError(f"a number given as memory budget is not between 1 byte and 1 PiB; {_EXAMPLES}")
    words = str(text).strip()
    if words.lower() == "auto":
        return _auto_budget(machine or _machine())
    share = _PERCENT.fullmatch(words)
    if share is None:
        return Budget(parse_size(words), f"ram={words}")
    fraction = Fraction(share[1]) / 100
    if not 0 < fraction <= 1:
        raise BudgetError(f"{_quote(words)} of RAM is not above 0% and at most 100%; {_EXAMPLES}")
    here = machine or _machine()
    whole, of_what = here.total, "RAM"
    if here.cgroup_limit is not None and here.cgroup_limit < whole:
        whole, of_what = here.cgroup_limit, "cgroup limit"
    return Budget(max(1, int(whole * fraction)), f"{words} of {format_bytes(whole)} {of_what}")


def _auto_budget(here: Machine) -> Budget:
    room, source = here.available, f"{format_bytes(here.available)} available RAM"
    if here.cgroup_limit is not None:
        others = here.cgroup_used or 0
        if here.cgroup_limit - others < room:
            room = here.cgroup_limit - others
            source = f"cgroup limit {format_bytes(here.cgroup_limit)}"
            source += f" minus {format_bytes(others)} used by others" if others else ""
    reserve = min(max(_RESERVE_MIN, room // 20), room // 4)
    if room - reserve <= 0:
        raise BudgetError(f"no memory is left for ram=auto ({source}); stop other programs or give a size such as 2GiB")
    return Budget(room - reserve, f"auto: {source} minus a reserve of {format_bytes(reserve)}")


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def format_bytes(n: int) -> str:
    """Write a number of bytes with three significant digits in binary units.

    Parameters
    ----------
    n : int
        Bytes; negative numbers keep their sign.

    Returns
    -------
    str
        For example ``"512 B"``, ``"38.1 MiB"`` or ``"1.50 GiB"``.
    """
    if abs(n) < 1024:
        return f"{n} B"
    value = float(n)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        # 1023.5 would print as "1024 KiB": that is one of the next unit.
        if abs(value) < 1023.5 or unit == "PiB":
            break
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def page_size() -> int:
    """Size of a memory page in bytes."""
    return mmap.PAGESIZE


def huge_pages_unasked(setting: Path = _HUGE_PAGES) -> bool:
    """Whether the kernel gives huge pages to whoever does not refuse them: then a page used brings its neighbours."""
    return "[always]" in read_text(setting)


def current_rss() -> int:
    """Resident set size of this process now, in bytes (``VmRSS``)."""
    rss = _status_bytes("VmRSS")
    if rss is not None:
        return rss
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Largest resident set size this process has had, in bytes (``VmHWM``)."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def _status_bytes(field: str) -> int | None:
    for line in read_text(_STATUS).splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def machine(cgroup_root: Path = ROOT, self_cgroup: Path = MEMBERSHIP) -> Machine:
    """Measure the memory of this machine and of the cgroups around this process; arguments as `own_cgroups`."""
    import psutil

    memory = psutil.virtual_memory()
    tightest: tuple[int, int] | None = None
    for limit, used in _limits(*own_cgroups("memory", cgroup_root, self_cgroup)):
        if tightest is None or limit - used < tightest[0] - tightest[1]:
            tightest = limit, used
    if tightest is None:
        return Machine(int(memory.total), int(memory.available))
    return Machine(int(memory.total), int(memory.available), tightest[0], max(0, tightest[1] - current_rss()))


_machine = machine  # parse_budget has an argument of that name


def _limits(version: int, directories: list[Path]) -> Iterator[tuple[int, int]]:
    """Yield (limit, unreclaimable use) of every memory cgroup that is limited."""
    if version == 1:
        limit_name, used_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        reclaimable_names = ("total_inactive_file", "total_active_file")
    else:
        limit_name, used_name = "memory.max", "memory.current"
        reclaimable_names = ("inactive_file", "active_file")
    for directory in directories:
        limit = read_number(read_text(directory / limit_name))
        # Version 1 says "no limit" with the largest multiple of a page below 2**63, version 2 with "max".
        if limit is None or limit >= 1 << 60:
            continue
        used = read_number(read_text(directory / used_name)) or 0
        reclaimable = 0
        for line in read_text(directory / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name in reclaimable_names:
                reclaimable += read_number(value) or 0
        yield limit, max(0, used - reclaimable)
