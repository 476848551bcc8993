"""Raise requests to stop as exceptions, so that clean-up removes everything half-written.

Libraries swallow what is raised while they are imported (a bare ``except`` around an optional
import). So this module remembers a request to stop, and raises it again where that does no harm.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.

    A class of its own, because Python remembers a plain ``KeyboardInterrupt`` that passes through
    code run from C. Python then ends by the signal and not with the exit code, although the
    exception was handled.
    """


class Terminated(BaseException):
    """Somebody asked the process to end (SIGTERM)."""


class HungUp(Terminated):
    """The terminal is gone: its window was closed, or a connection dropped (SIGHUP)."""


_requests: list[type[BaseException]] = []


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Ctrl-C, SIGTERM and SIGHUP as exceptions inside the block.

    A Ctrl-C or SIGHUP that is ignored (``nohup``), or handled by others, outside the block stays
    so.
    """
    _requests.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    kinds: dict[int, type[BaseException]] = {signal.SIGTERM: Terminated}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        kinds[signal.SIGINT] = Interrupted
    hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
    if hang_up is not None and signal.getsignal(hang_up) is signal.SIG_DFL:
        kinds[hang_up] = HungUp

    def stop(number: int, frame: FrameType | None) -> None:
        _requests.append(kinds[number])
        raise kinds[number]

    before = {number: signal.signal(number, stop) for number in kinds}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop(error: BaseException) -> BaseException | None:
    """Return the request to stop that led to an error, or ``None`` if nobody asked to stop.

    Some library may have turned the request into another exception on its way.
    """
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        return error
    if not _requests:
        return None
    stop = _requests[0]()
    stop.__cause__ = error
    return stop


def stop_if_asked() -> None:
    """Raise a request to stop that some library swallowed, if there was one."""
    if _requests:
        raise _requests[0]
