from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import BudgetError, EdgemoeError
from edgemoe.memory import (
    Budget,
    Machine,
    current_rss,
    format_bytes,
    huge_pages_unasked,
    machine,
    page_size,
    parse_budget,
    parse_size,
    peak_rss,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BIG = Machine(total=64 * GIB, available=40 * GIB)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 * GIB),
        ("512 MiB", 512 * MIB),
        ("1.5GB", 1_500_000_000),
        ("800000000", 800_000_000),
        ("800000000 B", 800_000_000),
        ("  4kib ", 4096),
        ("4KB", 4000),
        ("0.5tib", 1 << 39),
        ("2TB", 2 * 10**12),
        ("6g", 6 * GIB),
        ("1M", MIB),
        ("1", 1),
        ("1024TiB", 1 << 50),
        ("0.1GiB", GIB // 10),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected
    assert parse_budget(text) == Budget(expected, f"ram={text.strip()}")


JUNK = [
    "", " ", "lots", "GiB", "6 G iB", "6XB", "6GiBs", "-6GiB", "-1", "+1", "0", "0GiB", "0.0", "0.4", "1.5", "1.5B",
    "nan", "inf", "NaN GiB", "1e9", "1_000", "1,5GB", ".5GB", "5.GB", "1.5.2GB", "0x10", "٣GiB", "6GiB\n7",
    "1" * 19, "1" * 5000, "1024.1TiB", "9999999TB", "None", "6GiB 1", "50 %%", "%", "auto 5", "6\x00GiB",
]  # fmt: skip


@pytest.mark.parametrize("text", JUNK)
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    for read in (parse_size, parse_budget):
        with pytest.raises(BudgetError) as caught:
            read(text)
        message = str(caught.value)
        assert "6GiB" in message and "50%" in message and "auto" in message
        assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize("text", ["0%", "-5%", "100.0001%", "101%", "1e2%", "nan%", "%50", "5,5%"])
def test_a_share_is_above_0_and_at_most_100(text: str) -> None:
    with pytest.raises(BudgetError, match="50%"):
        parse_budget(text, BIG)


@pytest.mark.parametrize(
    "number",
    [0, -1, (1 << 50) + 1, 10**5000, True, 1.5, float("nan"), None],
    ids=lambda n: str(n)[:9] if n != 10**5000 else "huge",
)
def test_numbers_that_are_no_budget(number: int) -> None:
    with pytest.raises(BudgetError):
        parse_budget(number)


def test_a_number_is_bytes() -> None:
    assert parse_budget(123_456_789) == Budget(123_456_789, "ram=123456789")


def test_a_share_is_of_ram_or_of_a_lower_cgroup_limit() -> None:
    assert parse_budget("50%", BIG) == Budget(32 * GIB, "50% of 64.0 GiB RAM")
    assert parse_budget("12.5 %", BIG).bytes == 8 * GIB
    assert parse_budget("100%", BIG).bytes == 64 * GIB
    boxed = Machine(total=64 * GIB, available=40 * GIB, cgroup_limit=2 * GIB, cgroup_used=GIB)
    assert parse_budget("50%", boxed) == Budget(GIB, "50% of 2.00 GiB cgroup limit")
    loose = Machine(total=64 * GIB, available=40 * GIB, cgroup_limit=100 * GIB, cgroup_used=0)
    assert parse_budget("50%", loose).bytes == 32 * GIB


@pytest.mark.parametrize(
    ("here", "expected", "reason"),
    [
        (BIG, 38 * GIB, "auto: 40.0 GiB available RAM minus a reserve of 2.00 GiB"),
        (Machine(8 * GIB, 4 * GIB), 3840 * MIB, "auto: 4.00 GiB available RAM minus a reserve of 256 MiB"),
        (Machine(8 * GIB, 400 * MIB), 300 * MIB, "auto: 400 MiB available RAM minus a reserve of 100 MiB"),
        (
            Machine(64 * GIB, 40 * GIB, 2 * GIB, 0),
            2 * GIB - 256 * MIB,
            "auto: cgroup limit 2.00 GiB minus a reserve of 256 MiB",
        ),
        (
            Machine(64 * GIB, 40 * GIB, 2 * GIB, 512 * MIB),
            1536 * MIB - 256 * MIB,
            "auto: cgroup limit 2.00 GiB minus 512 MiB used by others minus a reserve of 256 MiB",
        ),
        (
            Machine(64 * GIB, 4 * GIB, 60 * GIB, 0),
            4 * GIB - 256 * MIB,
            "auto: 4.00 GiB available RAM minus a reserve of 256 MiB",
        ),
    ],
)  # fmt: skip
def test_auto(here: Machine, expected: int, reason: str) -> None:
    assert parse_budget("auto", here) == Budget(expected, reason)
    assert parse_budget(" AUTO ", here).bytes == expected


@pytest.mark.parametrize("here", [Machine(GIB, 0), Machine(GIB, GIB, GIB, GIB), Machine(GIB, GIB, GIB, 2 * GIB)])
def test_auto_without_memory_left(here: Machine) -> None:
    with pytest.raises(BudgetError, match=r"no memory is left.*2GiB"):
        parse_budget("auto", here)


@given(
    st.integers(1, 1 << 46),
    st.integers(1, 1 << 46),
    st.none() | st.integers(1, 1 << 46),
    st.integers(0, 1 << 46),
)
def test_auto_never_gives_more_than_is_left(total: int, available: int, limit: int | None, used: int) -> None:
    here = Machine(total, available, limit, None if limit is None else used)
    room = available if limit is None else min(available, limit - used)
    try:
        budget = parse_budget("auto", here)
    except BudgetError:
        assert room <= 0
    else:
        assert room * 3 // 4 <= budget.bytes <= room


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10 * KIB - 1, "10.0 KiB"),
        (38 * MIB + 100 * KIB, "38.1 MiB"),
        (256 * MIB, "256 MiB"),
        (MIB - 1, "1.00 MiB"),
        (1023 * MIB, "1023 MiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (25_276_502_016, "23.5 GiB"),
        (1 << 50, "1.00 PiB"),
        (5000 << 50, "5000 PiB"),
        (-3 * MIB // 2, "-1.50 MiB"),
    ],
)
def test_format_bytes(n: int, text: str) -> None:
    assert format_bytes(n) == text


@given(st.integers(1, (1 << 50) - (1 << 42)))
def test_what_is_formatted_can_be_read_again(n: int) -> None:
    text = format_bytes(n)
    assert math.isclose(parse_size(text), n, rel_tol=0.006)
    assert sum(c.isdigit() for c in text) <= 4


@given(st.text(max_size=30) | st.from_regex(r"\s*-?\d{0,22}(\.\d{0,4})?\s*[kKmMgGtTpP]?i?[bB%]?\s*", fullmatch=True))
def test_any_text_is_a_budget_or_a_budget_error(text: str) -> None:
    try:
        assert 0 < parse_budget(text, BIG).bytes <= 1 << 50
    except BudgetError as error:
        assert error.needed is None


@given(st.integers(1, 10**6), st.sampled_from(["KiB", "MiB", "GiB"]), st.integers(0, 3))
def test_units_case_and_space_do_not_matter(n: int, unit: str, blanks: int) -> None:
    expected = n << {"KiB": 10, "MiB": 20, "GiB": 30}[unit]
    for variant in (unit, unit.lower(), unit.upper(), unit[0]):
        assert parse_size(f"{n}{' ' * blanks}{variant}") == expected


def test_a_budget_error_says_what_would_do() -> None:
    error = BudgetError("too small", needed=5)
    assert error.needed == 5 and isinstance(error, EdgemoeError)


def write(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)


def membership(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "self_cgroup"
    path.write_text(text)
    return path


OTHERS = 10 * GIB  # far more than this process has, so that taking our own RSS away does not reach 0


def others_of(here: Machine) -> int:
    """What `machine` should have found, give or take the growth of this process."""
    assert here.cgroup_used is not None
    return here.cgroup_used + current_rss()


def test_cgroup_v2_with_the_tightest_level_above(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    stat = f"anon 1\ninactive_file {GIB}\nactive_file {GIB}\nfile 77\n"
    write(root)
    write(root / "a", memory__max=f"{30 * GIB}\n", memory__current=f"{OTHERS + 2 * GIB}\n", memory__stat=stat)
    write(root / "a" / "b", memory__max="max\n", memory__current="5\n", memory__stat="")
    # A lower limit, but more room below it.
    write(root / "a" / "b" / "c", memory__max=f"{25 * GIB}\n", memory__current=f"{GIB}\n", memory__stat="")
    here = machine(root, membership(tmp_path, "0::/a/b/c\n"))
    assert here.cgroup_limit == 30 * GIB
    assert abs(others_of(here) - OTHERS) < 64 * MIB
    assert here.total >= here.available > 0


def test_cgroup_v1(tmp_path: Path) -> None:
    memory = tmp_path / "cgroup" / "memory"
    stat = f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
    unlimited = "9223372036854771712\n"
    write(memory, memory__limit_in_bytes=unlimited, memory__usage_in_bytes="1\n")
    write(
        memory / "box",
        memory__limit_in_bytes=f"{16 * GIB}",
        memory__usage_in_bytes=f"{OTHERS + 2 * GIB}",
        memory__stat=stat,
    )
    text = "9:name=systemd:/\n4:cpu,memory:/box\n0::/elsewhere\n"
    here = machine(tmp_path / "cgroup", membership(tmp_path, text))
    assert here.cgroup_limit == 16 * GIB
    assert abs(others_of(here) - OTHERS) < 64 * MIB
    nowhere = machine(tmp_path / "cgroup", membership(tmp_path, "4:memory:/\n"))
    assert nowhere.cgroup_limit is None and nowhere.cgroup_used is None


def test_in_a_container_the_mount_itself_is_our_cgroup(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root, memory__max=f"{GIB}", memory__current="0")
    write(tmp_path, memory__max="1")  # outside of the mount
    for path in ("/docker/0123", "/../../pod", "/"):
        assert machine(root, membership(tmp_path, f"0::{path}\n")).cgroup_limit == GIB


def test_our_own_memory_is_not_used_by_others(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root, memory__max=f"{GIB}", memory__current=f"{4096}")
    assert machine(root, membership(tmp_path, "0::/\n")).cgroup_used == 0


@pytest.mark.parametrize("text", ["", "\n", "junk\n", "0:\n", ":::::\n", "1:cpu:/x\n", "0::/gone\n"])
def test_no_cgroup_to_be_found(text: str, tmp_path: Path) -> None:
    assert machine(tmp_path / "cgroup", membership(tmp_path, text)).cgroup_limit is None
    assert machine(tmp_path / "cgroup", tmp_path / "no_such_file").cgroup_limit is None


@pytest.mark.parametrize("junk", ["", "junk", "-1", "1 2", "12.5", "٣"])
def test_unreadable_cgroup_numbers_are_no_limit(junk: str, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root, memory__max=junk, memory__current=junk, memory__stat=f"inactive_file {junk}")
    assert machine(root, membership(tmp_path, "0::/\n")).cgroup_limit is None
    write(root, memory__max=f"{GIB}")
    here = machine(root, membership(tmp_path, "0::/\n"))
    assert (here.cgroup_limit, here.cgroup_used) == (GIB, 0)


def test_rss_follows_what_this_process_holds() -> None:
    page = page_size()
    before = current_rss()
    block = bytearray(64 * MIB)
    for start in range(0, len(block), page):
        block[start] = 1
    assert current_rss() - before > 60 * MIB
    assert peak_rss() >= before + 60 * MIB
    assert current_rss() <= peak_rss()
    assert page & (page - 1) == 0 and page >= 4096


def test_rss_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_proc = current_rss(), peak_rss()
    monkeypatch.setattr("edgemoe.memory._STATUS", tmp_path / "status")
    assert current_rss() == pytest.approx(with_proc[0], rel=0.2)
    assert peak_rss() == pytest.approx(with_proc[1], rel=0.2)


def test_importing_memory_is_cheap() -> None:
    heavy = "numpy psutil gguf llama_cpp"
    code = f"import sys, edgemoe.memory; sys.exit(any(m in sys.modules for m in {heavy.split()!r}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "unasked"), [("[always] madvise never", True), ("always [madvise] never", False), (None, False)]
)
def test_who_gets_huge_pages(text: str | None, unasked: bool, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    if text is not None:
        setting.write_text(text + "\n")
    assert huge_pages_unasked(setting) == unasked
