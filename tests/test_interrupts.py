from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

from edgemoe.interrupts import exiting_on, held_interrupts


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def press_ctrl_c() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def after(work: Callable[[], None], error: Exception | None = None) -> Callable[[], None]:
    """Work that presses Ctrl-C, goes on until it is stopped, and ends with an error or without."""

    def pressed() -> None:
        press_ctrl_c()
        work()
        if error is not None:
            raise error

    return pressed


def test_raises_when_the_thread_is_done(pool: ThreadPoolExecutor) -> None:
    stopped = threading.Event()
    done: list[bool] = []

    def work() -> None:
        done.append(stopped.wait(10))
        time.sleep(0.05)
        done.append(True)

    with pytest.raises(KeyboardInterrupt), held_interrupts(stopped.set):
        pool.submit(after(work)).result()
    assert done == [True, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_error_of_the_stopped_work_is_dropped(pool: ThreadPoolExecutor) -> None:
    stopped = threading.Event()
    with pytest.raises(KeyboardInterrupt), held_interrupts(stopped.set):
        pool.submit(after(lambda: stopped.wait(10) and None, RuntimeError("aborted"))).result()


def test_other_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="broken"), held_interrupts():
        raise RuntimeError("broken")


def test_many_interrupts_are_one(pool: ThreadPoolExecutor) -> None:
    def work() -> None:
        for _ in range(200):
            press_ctrl_c()
            time.sleep(0.0002)

    count = []
    with pytest.raises(KeyboardInterrupt), held_interrupts(lambda: count.append(1)):
        pool.submit(work).result()
    assert count


def test_handler_that_does_not_raise_stops_nothing(pool: ThreadPoolExecutor) -> None:
    heard = []

    def handler(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    stopped: list[int] = []
    before = signal.signal(signal.SIGINT, handler)
    try:
        with held_interrupts(lambda: stopped.append(1)):
            pool.submit(after(lambda: time.sleep(0.01))).result()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (heard, stopped) == ([signal.SIGINT], [])


def test_other_threads_just_run(pool: ThreadPoolExecutor) -> None:
    def work() -> str:
        with held_interrupts():
            return "done"

    assert pool.submit(work).result() == "done"


def test_ignored_interrupts_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_interrupts():
            press_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_that_exit() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have had it ignored
    try:
        with pytest.raises(SystemExit) as left, exiting_on(signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(signal.SIGHUP)
        assert left.value.code == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_that_exit_are_held_too() -> None:
    stopped: list[int] = []
    with pytest.raises(SystemExit), exiting_on(signal.SIGTERM), held_interrupts(lambda: stopped.append(1)):
        signal.raise_signal(signal.SIGTERM)
        assert stopped == [1]
        stopped.append(2)
    assert stopped == [1, 2]


def test_ignored_signals_do_not_exit() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with exiting_on(signal.SIGHUP):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_exit_on_nothing(pool: ThreadPoolExecutor) -> None:
    def work() -> str:
        with exiting_on(signal.SIGTERM):
            return "done"

    assert pool.submit(work).result() == "done"
