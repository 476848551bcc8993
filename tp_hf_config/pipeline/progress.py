"""Show how far a long job is: the interface, and an implementation that shows nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """A display of how far a job is."""

    def say(self, what: object) -> None:
        """Show that something was done or found."""
        ...

    def track(
        self, items: Iterable[T], total: int, what: str, unit: str = "windows"
    ) -> Iterator[T]:
        """Yield the items, ``total`` of them, and show how many are done."""
        ...


class Silent:
    """A progress display that shows nothing."""

    def say(self, what: object) -> None:
        """Do nothing."""

    def track(
        self, items: Iterable[T], total: int, what: str, unit: str = "windows"
    ) -> Iterator[T]:
        """Yield the items."""
        yield from items
