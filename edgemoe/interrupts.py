"""Ctrl-C while C code or another thread computes: ask it to stop, wait for it, and only then raise."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["held_interrupts"]


@contextlib.contextmanager
def held_interrupts(stop: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold back what the SIGINT handler raises until the block is left.

    Without this, KeyboardInterrupt comes up wherever Python code happens to run: in a callback from C, which swallows
    it, or in the middle of waiting for a thread, whose work the caller would then free under it. Outside the main
    thread, which alone gets signals, the block just runs.

    Parameters
    ----------
    stop : callable, optional
        Called at once, to make the block end soon.

    Raises
    ------
    BaseException
        What the handler raised, KeyboardInterrupt as a rule; it replaces whatever the stopped block raises.
    """
    previous = signal.getsignal(signal.SIGINT)
    # Not callable: ignored, or installed by somebody else than Python.
    if not callable(previous) or threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[BaseException] = []

    def hold(number: int, frame: FrameType | None) -> None:
        try:
            previous(number, frame)
        except BaseException as error:
            raised.append(error)
            if stop is not None:
                stop()

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    except BaseException:
        if not raised:
            raise
    finally:
        signal.signal(signal.SIGINT, previous)
    if raised:
        raise raised[0]
