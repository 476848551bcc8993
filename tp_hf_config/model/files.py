"""Write files atomically: they get their name once they are on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_ON_WINDOWS = os.name == "nt"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it; this replaces links, not targets."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        write(part)
        flush(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot flush a folder, and so the rename
        flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file or a folder to the disk; Windows can flush only writable files."""
    try:
        handle = os.open(path, os.O_RDWR if _ON_WINDOWS else os.O_RDONLY)
    except PermissionError:
        if _ON_WINDOWS:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
