"""How far a long loop is: a bar on a terminal, elsewhere a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as bar

T = TypeVar("T")
EVERY = 10.0  # seconds between two lines: nobody takes a job for dead within them


def track(items: Sequence[T], name: str, console: Console) -> Iterator[T]:
    """Pass the items on, and show how many are done; the last line says how long all took."""
    if console.is_terminal:
        yield from bar(items, name, console=console, transient=True)
        return
    started = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= EVERY or done == len(items):
            line = f"{name}: {done} of {len(items)}, {now - started:.0f} s"
            console.print(line, soft_wrap=True, markup=False, highlight=False)
            said = now
