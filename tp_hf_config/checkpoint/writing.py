"""Write folders atomically: they get their name once they are on the disk."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ..model.files import flush


@contextmanager
def new_folder(target: Path, check: Callable[[], object]) -> Iterator[Path]:
    """Yield a hidden folder beside ``target``, renamed to it at the end, or removed on errors.

    An existing ``target`` is replaced. ``check`` raises if it may not be written; it is called
    again at the end, because another process may have written to ``target``.
    """
    check()
    work = hidden_beside(target)
    try:
        work.mkdir(parents=True)
        yield work
        for path in [*work.rglob("*"), work]:  # to the disk, before the folder gets its final name
            # some file systems cannot flush a folder
            with suppress(OSError) if path.is_dir() else nullcontext():
                flush(path)
        check()
        _rename_into_place(work, target, hidden_beside(target, ".old"))
    finally:
        with uninterrupted():
            shutil.rmtree(work, ignore_errors=True)


def hidden_beside(target: Path, ending: str = ".unfinished") -> Path:
    """A hidden path beside a folder, with a name that no other run uses."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{ending}")


def _rename_into_place(work: Path, target: Path, aside: Path) -> None:
    """Rename ``work`` to ``target``; a folder of that name is kept in ``aside`` meanwhile."""
    with uninterrupted():
        try:
            if target.exists():
                os.rename(target, aside)
            os.rename(work, target)
        except BaseException:
            if aside.exists() and not target.exists():
                os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and SIGHUP until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    waiting: list[int] = []

    def wait(number: int, frame: Any) -> None:
        waiting.append(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, wait) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for waited in waiting:
            signal.raise_signal(waited)
