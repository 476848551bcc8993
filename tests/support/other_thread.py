"""Ask a second thread what it sees, while the first one waits inside of something."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Answer = TypeVar("_Answer")
_MOST_SECONDS = 120


def in_another_thread(function: Callable[[], _Answer]) -> _Answer:
    """Return what a function returns, or raise what it raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result(_MOST_SECONDS)
