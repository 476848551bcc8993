"""Show outcomes and progress: tables and bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any, TypeVar

from ..model.surroundings import quiet_transformers
from .outcome import Outcome
from .stopping import stop_if_asked

if TYPE_CHECKING:
    from ..pipeline.progress import Progress

T = TypeVar("T")


def rich_on(stream: IO[str]) -> bool:
    """True if the stream is a terminal and rich is installed."""
    return stream.isatty() and find_spec("rich") is not None


def show(outcome: Outcome) -> None:
    """Print an outcome on standard output: its drawing on a terminal, else its text."""
    if outcome.drawing is not None and rich_on(sys.stdout):
        from rich.console import Console

        Console(file=sys.stdout).print(outcome.drawing)
    elif outcome.text:
        print(outcome.text)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let Transformers show nothing but errors inside the block."""
    with quiet_transformers():  # its progress bars and ours would overwrite each other
        stop_if_asked()  # importing Transformers may have swallowed a Ctrl-C
        yield


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a progress display on standard error: bars on a terminal, else plain lines."""
    if not rich_on(sys.stderr):
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        yield Bar(bars)


class Lines:
    """A progress display of plain lines; it shows nothing where they cannot be written."""

    def say(self, what: object) -> None:
        """Print it as a line."""
        stop_if_asked()
        with suppress(OSError):  # a full disk, a reader that is gone: the work goes on
            print(what, file=sys.stderr, flush=True)

    def track(
        self, items: Iterable[T], total: int, what: str, unit: str = "windows"
    ) -> Iterator[T]:
        """Print one line, then yield the items."""
        self.say(f"{what}: {total} {unit}")
        yield from items


class Bar:
    """A progress display with a rich bar for each loop; texts appear above the bar."""

    def __init__(self, bars: Any):
        self._bars = bars

    def say(self, what: object) -> None:
        """Print it as rich draws it; print a text as it is, without markup."""
        from rich.text import Text

        stop_if_asked()
        self._bars.console.print(Text(what) if isinstance(what, str) else what)

    def track(
        self, items: Iterable[T], total: int, what: str, unit: str = "windows"
    ) -> Iterator[T]:
        """Yield the items; show a bar, and remove it at the end."""
        task = self._bars.add_task(what, total=total)
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
