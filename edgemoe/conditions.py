"""What slows an answer down from outside: a process that is stopped, a processor or memory that goes to others.

The disk's part is counted by the store, and told beside this.
"""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Conditions", "Pace", "Pulse", "Reading", "Watch"]

BEAT = 0.25
"""Seconds from one beat of a `Pulse` to the next."""

LONGEST_PAUSE = 1.0
"""Seconds that a running process may be late: a cgroup's quota, say, takes the processor away for no longer."""

WINDOW_SECONDS, WINDOW_TOKENS = 1.0, 8
"""How much is computed, at least, before its speed is judged."""

NOTICEABLE_SLOWDOWN = 1.5
"""How many times as long a token takes to compute, from which on it is worth a word."""

NOTICEABLE_FAULTS = 32
"""Pages read back during an answer, from which on they are worth a word: a few come late in good times, too."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was done to this process so far.

    Attributes
    ----------
    stopped : float
        Seconds that it did not run while its clocks did, as between SIGSTOP and SIGCONT.
    asleep : float
        Seconds that the machine slept, and its clocks with it.
    faults : int
        Pages of its memory that had to be read from disk when they were used (major page faults).
    """

    stopped: float = 0.0
    asleep: float = 0.0
    faults: int = 0


class Pulse:
    """Tells how long this process was stopped: a thread that does next to nothing is late only then.

    Parameters
    ----------
    clock : callable, optional
        Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._latest = clock()
        self._stopped = 0.0

    @contextlib.contextmanager
    def felt(self) -> Iterator[None]:
        """Beat during the block."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT):
                self.beat()

        with self._lock:
            self._latest = self._clock()
        # Not joined: when an answer that nobody finished is dropped, the program may be ending, and such threads first.
        threading.Thread(target=beat, name="edgemoe-pulse", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def beat(self) -> float:
        """Show that the process runs; seconds that it was stopped so far."""
        with self._lock:
            now = self._clock()
            if now - self._latest > BEAT + LONGEST_PAUSE:
                self._stopped += now - self._latest
            self._latest = now
            return self._stopped


@dataclass(frozen=True, slots=True)
class _Window:
    """How long a token took to compute, mean over some, and of what the time consists."""

    seconds: float
    work: tuple[float, ...]

    def allows(self, work: tuple[float, ...]) -> float:
        """Seconds that other work takes at most at the same speed: no part grows more than its amount does."""
        return self.seconds * max(1.0, *(new / old for new, old in zip(work, self.work, strict=True)))

    def covers(self, other: _Window) -> bool:
        """Whether the other one never allows less."""
        return self.seconds <= other.seconds and all(
            self.seconds * theirs <= other.seconds * ours for ours, theirs in zip(self.work, other.work, strict=True)
        )


class Pace:
    """How long tokens take to compute, against the best seen before for such work."""

    def __init__(self) -> None:
        self._best: list[_Window] = []
        self._latest = 1.0
        self._begin()

    def _begin(self) -> None:
        self._seconds = 0.0
        self._n_tokens = 0
        self._amounts: list[int] = []

    def add(self, seconds: float, n_tokens: int, amounts: Sequence[int]) -> float:
        """Take tokens that were computed; how many times as long as they should they keep taking, 1 if that is unknown.

        Parameters
        ----------
        seconds : float
            Time of all of them.
        n_tokens : int
            How many.
        amounts : sequence of int
            In the same order each time, sums over the tokens: a part of a token's time grows with each, another is
            always the same. Then (a + bx) / (a + by) is at most the larger of 1 and x / y, whatever a and b are.
        """
        self._seconds += seconds
        self._n_tokens += n_tokens
        self._amounts = [old + new for old, new in zip(self._amounts or [0] * len(amounts), amounts, strict=True)]
        if self._seconds < WINDOW_SECONDS or self._n_tokens < WINDOW_TOKENS:
            return 1.0
        # One more of each, so that none is 0.
        work = tuple(1 + amount / self._n_tokens for amount in self._amounts)
        window = _Window(self._seconds / self._n_tokens, work)
        self._begin()
        before, self._latest = self._latest, self._slowdown(window)
        # A hiccup is over by the next window.
        return max(1.0, min(before, self._latest))

    def _slowdown(self, window: _Window) -> float:
        expected = min((best.allows(window.work) for best in self._best), default=window.seconds)
        if not any(best.covers(window) for best in self._best):
            self._best = [best for best in self._best if not window.covers(best)] + [window]
        return window.seconds / expected


class Conditions:
    """What is known of this process's circumstances, from one answer to the next.

    Parameters
    ----------
    faults_tell : bool
        Whether this process reads its model in other ways than by page faults, so that one means memory that was lost.

    Attributes
    ----------
    pace : Pace
        How fast tokens were computed so far.
    """

    def __init__(self, faults_tell: bool = True) -> None:
        self.pace = Pace()
        self._pulse = Pulse()
        self._faults_tell = faults_tell

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Take notice of stops during the block."""
        return self._pulse.felt()

    def read(self) -> Reading:
        """Say what was done to this process until now."""
        boot_clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        asleep = time.clock_gettime(boot_clock) - time.clock_gettime(time.CLOCK_MONOTONIC)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt if self._faults_tell else 0
        return Reading(self._pulse.beat(), asleep, faults)


class Watch:
    """Follows one answer and has words for what slowed it down from outside.

    Parameters
    ----------
    pace : Pace
        What tokens took to compute so far; this answer's are added.

    Attributes
    ----------
    suspended_seconds : float
        Time that the process was stopped, or the machine asleep.
    """

    def __init__(self, pace: Pace) -> None:
        self.suspended_seconds = 0.0
        self._pace = pace
        self._tokens = self._faults = 0
        self._slowdown = 1.0

    def passed(self, before: Reading, after: Reading) -> None:
        """Take the readings around any part of the answer."""
        self.suspended_seconds += after.stopped - before.stopped
        asleep = after.asleep - before.asleep
        # The two clocks that tell are read one after the other.
        if asleep > LONGEST_PAUSE:
            self.suspended_seconds += asleep

    def decoded(self, before: Reading, after: Reading, seconds: float, n_tokens: int, *amounts: int) -> None:
        """Take a step that decoded tokens.

        Parameters
        ----------
        before, after : Reading
            Around it.
        seconds : float
            Time that it computed, without waiting for experts.
        n_tokens : int
            Tokens decoded.
        *amounts : int
            What the time consists of, see `Pace.add`.
        """
        faults = after.faults - before.faults
        self._tokens += n_tokens
        self._faults += faults
        # The processor is not to blame for these.
        if faults or after.stopped > before.stopped:
            return
        self._slowdown = max(self._slowdown, self._pace.add(seconds, n_tokens, amounts))

    def words(self) -> list[str]:
        """Say what was bad enough: nothing as a rule."""
        words = []
        if self.suspended_seconds >= LONGEST_PAUSE:
            words.append(f"was suspended {self.suspended_seconds:.0f} s")
        if self._slowdown > NOTICEABLE_SLOWDOWN:
            words.append(
                f"computing took {self._slowdown:.1f} times as long as before: the processor is throttled, or busy"
                " with other programs"
            )
        if self._faults >= max(NOTICEABLE_FAULTS, self._tokens):
            words.append(f"memory is short: {self._faults:,} pages that were taken away had to be read again")
        return words
