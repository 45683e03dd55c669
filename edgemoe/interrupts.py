"""Signals that end a program: how it leaves in good order, and how it waits for C code or a thread to stop first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

__all__ = ["exiting_on", "held_interrupts"]

_HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def exiting_on(*numbers: signal.Signals) -> Iterator[None]:
    """Have these signals raise SystemExit, with 128 and their number as exit status; one that is ignored stays so.

    Outside the main thread, which alone gets signals, the block just runs.

    Raises
    ------
    SystemExit
        When one of the signals comes.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    with contextlib.ExitStack() as stack:
        for number in numbers if threading.current_thread() is threading.main_thread() else ():
            previous = signal.getsignal(number)
            if previous is not signal.SIG_IGN:
                signal.signal(number, leave)
                stack.callback(signal.signal, number, previous)
        yield


@contextlib.contextmanager
def held_interrupts(stop: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold back what the handlers of SIGINT, SIGTERM and SIGHUP raise until the block is left.

    Without this, their exception comes up wherever Python code happens to run: in a callback from C, which swallows
    it, or in the middle of waiting for a thread, whose work the caller would then free under it. Outside the main
    thread, which alone gets signals, the block just runs.

    Parameters
    ----------
    stop : callable, optional
        Called at once, to make the block end soon.

    Raises
    ------
    BaseException
        What a handler raised first, KeyboardInterrupt as a rule; it replaces whatever the stopped block raises.
    """
    in_main = threading.current_thread() is threading.main_thread()
    # Not callable: ignored, left to the system, or installed by somebody else than Python.
    previous = {int(n): handler for n in _HELD if in_main and callable(handler := signal.getsignal(n))}
    raised: list[BaseException] = []

    def hold(number: int, frame: FrameType | None) -> None:
        try:
            previous[number](number, frame)
        except BaseException as error:
            raised.append(error)
            if stop is not None:
                stop()

    for number in previous:
        signal.signal(number, hold)
    try:
        yield
    except BaseException:
        if not raised:
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if raised:
        raise raised[0]
