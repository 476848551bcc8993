"""Ctrl-C and a polite kill: both unwind, so that nothing half-written stays.

Libraries swallow what is raised while they are imported (a bare ``except`` around what they can do
without), so what was asked for is remembered, and raised again where it can do no harm.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.

    A kind of its own: a ``KeyboardInterrupt`` that passes through code run from C is remembered by
    Python, which then ends by the signal, in place of the exit code, although it was handled.
    """


class Terminated(BaseException):
    """Somebody asked the process to end."""


_asked: list[type[BaseException]] = []


@contextmanager
def stoppable() -> Iterator[None]:
    """Here both are raised as exceptions; a Ctrl-C that is ignored outside stays ignored."""
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    kinds: dict[int, type[BaseException]] = {signal.SIGTERM: Terminated}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        kinds[signal.SIGINT] = Interrupted

    def stop(number: int, frame: FrameType | None) -> None:
        _asked.append(kinds[number])
        raise kinds[number]

    before = {number: signal.signal(number, stop) for number in kinds}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(error: BaseException) -> BaseException | None:
    """What somebody asked for, whatever it was turned into on its way; ``None``: nothing."""
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        return error
    for kind in _asked[:1]:
        stop = kind()
        stop.__cause__ = error
        return stop
    return None


def stop_if_asked() -> None:
    """Raise what somebody asked for and something swallowed."""
    for kind in _asked[:1]:
        raise kind
