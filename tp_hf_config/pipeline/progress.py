"""How far a long job is: what it calls, and the silent form of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Somewhere to say how far a job is."""

    def say(self, what: object) -> None:
        """Something was done, or found."""
        ...

    def track(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Pass on ``total`` items, and show how many are done."""
        ...


class Silent:
    """Says nothing."""

    def say(self, what: object) -> None:
        """Nothing."""

    def track(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """The items alone."""
        yield from items
