"""What people see: tables and progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any, TypeVar

from ..silence import quiet_transformers
from .outcome import Outcome
from .stopping import stop_if_asked

if TYPE_CHECKING:
    from ..pipeline.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn(Outcome):
    """An outcome with another form for a terminal: something that rich prints."""

    drawing: Any = None


def rich_on(stream: IO[str]) -> bool:
    """Whether this stream is a terminal, and rich is installed to draw on it."""
    return stream.isatty() and find_spec("rich") is not None


def show(outcome: Outcome) -> None:
    """The outcome on standard output."""
    drawing = getattr(outcome, "drawing", None)
    if drawing is not None and rich_on(sys.stdout):
        from rich.console import Console

        Console(file=sys.stdout).print(drawing)
    elif outcome.text:
        print(outcome.text)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Transformers says nothing but errors."""
    with quiet_transformers():  # their progress bars and ours would write over each other
        stop_if_asked()  # the import may have swallowed it
        yield


@contextmanager
def progress() -> Iterator[Progress]:
    """How far a job is, on standard error."""
    if not rich_on(sys.stderr):
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        yield Bar(bars)


class Lines:
    """A line for everything."""

    def say(self, what: object) -> None:
        """In lines."""
        stop_if_asked()
        print(what, file=sys.stderr, flush=True)

    def track(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """A line before the first."""
        self.say(f"{what}: {total} windows")
        yield from items


class Bar:
    """A bar for each loop; lines go above it."""

    def __init__(self, bars: Any):
        self._bars = bars

    def say(self, what: object) -> None:
        """As rich draws it; text without markup."""
        from rich.text import Text

        stop_if_asked()
        self._bars.console.print(Text(what) if isinstance(what, str) else what)

    def track(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """A bar that is gone at the end."""
        task = self._bars.add_task(what, total=total)
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
