"""Ctrl-C while another thread computes: stop it, wait for it, and only then raise."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["held_interrupts"]


@contextlib.contextmanager
def held_interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Hold back what the SIGINT handler raises until the block is left; the main thread only.

    Without this, KeyboardInterrupt comes up in the middle of waiting for the thread: the caller would free what the
    thread still uses, and a lock of the standard library may be left in a state that it reports as RuntimeError.

    Parameters
    ----------
    stop : callable
        Called at once, to make the block end soon. A RuntimeError of the block that follows is its doing, and dropped.

    Raises
    ------
    BaseException
        What the handler raised, KeyboardInterrupt as a rule.
    """
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):  # ignored, or not Python's
        yield
        return
    raised: list[BaseException] = []

    def hold(number: int, frame: FrameType | None) -> None:
        try:
            previous(number, frame)
        except BaseException as error:
            raised.append(error)
            stop()

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    except RuntimeError:
        if not raised:
            raise
    finally:
        signal.signal(signal.SIGINT, previous)
    if raised:
        raise raised[0]
