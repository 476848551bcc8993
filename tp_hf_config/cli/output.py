"""What every command has in common: its name, exit codes and messages."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

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
