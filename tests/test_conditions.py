"""What slows answers down besides the disk: told when it is so, and not when it is not."""

from __future__ import annotations

import itertools
import mmap
import os
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edgemoe import conditions
from edgemoe.conditions import Conditions, Pace, Pulse, Reading, Watch

GOOD = Reading()


def paces(milliseconds: Sequence[float], amounts: Sequence[Sequence[int]] = ((100, 0, 64),)) -> list[float]:
    """What `Pace` says of windows of 200 tokens that took as long each."""
    pace = Pace()
    work = itertools.chain(amounts, itertools.repeat(amounts[-1]))
    return [
        pace.add(0.2 * ms, 200, [200 * amount for amount in of]) for ms, of in zip(milliseconds, work, strict=False)
    ]


def waiting() -> int:
    """How many threads beat."""
    return sum(thread.name == "edgemoe-pulse" for thread in threading.enumerate())


# ---------------------------------------------------------------- the processor


def test_speed_is_compared_with_the_best_before() -> None:
    assert paces([10, 10, 24, 30, 20, 10]) == pytest.approx([1, 1, 1, 2.4, 2, 1])
    assert paces([30, 20, 10, 10]) == [1, 1, 1, 1], "it became faster"


def test_a_hiccup_is_not_told() -> None:
    assert paces([10, 40, 10, 40, 10]) == [1, 1, 1, 1, 1]


def test_nothing_is_said_before_enough_was_computed() -> None:
    pace = Pace()
    assert [pace.add(0.01, 1, [100]) for _ in range(99)] == [1.0] * 99, "too short a time"
    assert [pace.add(3.0, 1, [100]) for _ in range(7)] == [1.0] * 7, "one window, and 7 tokens of the next"


@pytest.mark.parametrize("constant", [0, 1, 20])
@pytest.mark.parametrize("grows", [0, 1, 2], ids=["context", "experts read", "experts computed"])
def test_work_that_grows_is_no_slower_processor(constant: float, grows: int) -> None:
    amounts = [[100, 5, 64] for _ in range(40)]
    for step, work in enumerate(amounts):
        work[grows] *= 1 + step
    times = [constant + 0.1 * work[0] + work[1] + 0.2 * work[2] for work in amounts]
    assert max(paces(times, amounts)) == 1
    assert max(paces(times[::-1], amounts[::-1])) == 1
    slow = [*times[:30], *(3 * ms for ms in times[30:])]
    assert max(paces(slow, amounts)) > 2


def test_what_is_remembered_stays_small() -> None:
    pace = Pace()
    for step in range(5000):
        pace.add(1 + step % 7 / 100, 50, [50 * (100 + step), step % 11, 3200])
    assert len(pace._best) < 100


# ---------------------------------------------------------------- suspended


def test_a_late_beat_is_a_stop() -> None:
    times = iter([0.0, 0.25, 1.4, 1.65, 14.0, 14.25])
    pulse = Pulse(lambda: next(times))
    assert [pulse.beat() for _ in range(5)] == pytest.approx([0, 0, 0, 12.35, 12.35])


def test_time_between_answers_is_nobody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    pulse = Pulse(lambda: clock[0])
    clock[0] = 100.0
    before = waiting()
    with pulse.felt():
        assert pulse.beat() == 0
        assert waiting() == before + 1
    deadline = time.monotonic() + 5
    while waiting() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert waiting() == before


def test_it_beats_by_itself() -> None:
    beats = []

    def clock() -> float:
        beats.append(threading.current_thread().name)
        return time.monotonic()

    pulse = Pulse(clock)
    with pulse.felt():
        time.sleep(2 * conditions.BEAT + conditions.LONGEST_PAUSE)
        assert pulse.beat() == 0
    assert "edgemoe-pulse" in beats


def test_suspended_time_is_a_sum() -> None:
    watch = Watch(Pace())
    watch.passed(GOOD, Reading(stopped=2.5))
    watch.passed(Reading(stopped=2.5, asleep=7), Reading(stopped=2.5, asleep=7.01))
    assert watch.words() == ["was suspended 2 s"]
    watch.passed(Reading(asleep=7), Reading(asleep=3607))
    assert watch.suspended_seconds == 3602.5
    assert watch.words() == ["was suspended 3602 s"]


# ---------------------------------------------------------------- an answer


def decode(watch: Watch, seconds: float, n: int, readings: Iterator[Reading] | None = None) -> None:
    before = GOOD
    for _ in range(n):
        after = next(readings) if readings else GOOD
        watch.decoded(before, after, seconds, 1, 100, 0, 64)
        before = after


def test_good_conditions_need_no_words() -> None:
    watch = Watch(Pace())
    decode(watch, 0.1, 100, (Reading(faults=i // 4) for i in range(100)))
    assert watch.words() == []


def test_slow_processor_is_told_until_it_is_fast_again() -> None:
    pace, told = Pace(), []
    for seconds in (0.1, 0.3, 0.1):
        watch = Watch(pace)
        decode(watch, seconds, 50)
        told.append(watch.words())
    slow = "computing took 3.0 times as long as before: the processor is throttled, or busy with other programs"
    assert told == [[], [slow], []]


@pytest.mark.parametrize(
    "readings",
    [(Reading(stopped=i) for i in range(1, 51)), (Reading(faults=i) for i in range(1, 51))],
    ids=["stopped", "faults"],
)
def test_processor_is_not_blamed_for_what_others_did(readings: Iterator[Reading]) -> None:
    pace = Pace()
    decode(Watch(pace), 0.1, 50)
    watch = Watch(pace)
    decode(watch, 2, 50, readings)
    assert not any("computing" in words for words in watch.words())


def test_memory_that_is_taken_away_is_told() -> None:
    watch = Watch(Pace())
    decode(watch, 0.1, 20, (Reading(faults=60 * i) for i in range(1, 21)))
    assert watch.words() == ["memory is short: 1,200 pages that were taken away had to be read again"]


# ---------------------------------------------------------------- the readings themselves


def test_reading_of_this_process() -> None:
    first, second = (Conditions().read() for _ in range(2))
    assert first.stopped == 0
    assert second.faults >= first.faults >= 0
    assert abs(second.asleep - first.asleep) < 1
    assert first.asleep > -1


def test_page_faults_are_read_unless_files_are_read_by_them(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(64 * mmap.PAGESIZE))
    telling, silent = Conditions(), Conditions(faults_tell=False)
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    before = telling.read().faults
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert len(set(mapped[:: mmap.PAGESIZE])) > 1
    if resource.getrusage(resource.RUSAGE_SELF).ru_majflt == begin:
        pytest.skip("the file stayed in memory")
    assert telling.read().faults > before
    assert silent.read().faults == 0
