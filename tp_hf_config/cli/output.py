"""What every command has in common: its name, exit codes, messages and progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TextIO, TypeVar

from ..pipeline.job import Progress

T = TypeVar("T")
PROGRAM = "tp-hf-config"
DONE, FAILED, UNKNOWN, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141


def say(text: str) -> None:
    """Print a text on standard error, if possible."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # a full disk, a closed terminal
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Redirect a stream to /dev/null, with what it could not write."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Shown(Progress):
    """A progress display on standard error."""

    def say(self, what: object) -> None:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        with suppress(OSError):  # the work goes on
            tqdm.write(str(what), file=sys.stderr)
            sys.stderr.flush()

    def track(
        self, items: Iterable[T], total: int, what: str, unit: str = "windows"
    ) -> Iterator[T]:
        from tqdm.auto import tqdm

        self.say(f"{what}: {total} {unit}")
        yield from tqdm(items, what, total, leave=False, unit=unit, disable=None)
