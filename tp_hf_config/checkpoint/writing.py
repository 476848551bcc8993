"""Write files and folders whole or not at all: they get their name once they are on the disk."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .folder import CONFIG

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ON_WINDOWS = os.name == "nt"
_REPAIRED = "is being repaired by another process. Wait for it, then check again."


@contextmanager
def locked(folder: Path, busy: str = _REPAIRED, needed: bool = True) -> Iterator[None]:
    """Lock a folder, so that no other process writes to it in the meantime.

    The lock is on the folder itself: there is no lock file that could be left behind, and the lock
    ends with the process that holds it. On Windows, which locks no folders, it is a file beside the
    folder, which the system removes with the handle or the process that holds it.

    Args:
        folder: the folder.
        busy: what another process does that holds the lock.
        needed: False: go on without a lock on a file system that has none.

    Raises:
        CheckpointError: another process holds the lock, or the folder cannot be locked.
    """
    handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        try:
            if handle is None:
                folder = folder.resolve()
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_TEMPORARY", 0)
                handle = os.open(folder.with_name(f".{folder.name}.lock"), flags)
            else:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EEXIST):
                raise CheckpointError(f"{folder} {busy}") from None
            if needed:
                raise CheckpointError(f"{folder} cannot be locked: {error.strerror}") from error
        yield
    finally:
        if handle is not None:
            os.close(handle)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under another name; it gets its own once it is on the disk.

    If a link has one of these names, the link is replaced, and not what it leads to.

    Args:
        path: the file; one that is there is replaced.
        write: writes the file that it is given.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        write(part)
        flush(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _flush_folder(path.parent)


def flush(path: Path) -> None:
    """Flush a file or a folder to the disk.

    Windows flushes only files that may be written; others it writes when it likes.
    """
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


def _flush_folder(folder: Path) -> None:
    """Flush a folder, and with it a rename in it, to the disk; some file systems cannot do this."""
    with suppress(OSError):
        flush(folder)


def replace_config(folder: Path, text: bytes) -> Path:
    """Replace a folder's config.json and keep the old one beside it; the folder has to be locked.

    If config.json is a link, the link is replaced, and the file it leads to stays as it is.

    ``text``: the new config.json.

    Returns:
        The path that the old config has now.

    Raises:
        OSError: the new config cannot be written; the folder is as it was.
    """
    target = folder / CONFIG
    old, count = target.read_bytes(), 0
    while os.path.lexists(backup := folder / f"{CONFIG}.bak{f'.{count}' if count else ''}"):
        count += 1
    try:
        write_whole(backup, lambda part: part.write_bytes(old))
        write_whole(target, lambda part: part.write_bytes(text))
    except BaseException:
        if target.read_bytes() == old:
            backup.unlink(missing_ok=True)
        raise
    return backup


def write_config(folder: Path, data: dict[str, Any]) -> None:
    """Write a config's JSON into a folder that is not complete yet, as Transformers formats it."""
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


@contextmanager
def new_folder(target: Path, check: Callable[[], object]) -> Iterator[Path]:
    """Yield a hidden folder beside ``target``; it gets that name at the end, or is removed.

    Args:
        target: the final folder; one that is there is replaced.
        check: raises if ``target`` may not be written; asked first, and again at the end, as
            somebody may have written to it meanwhile.
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
    """Return the path of a hidden folder beside a folder, with a name that no other run takes."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{ending}")


def _rename_into_place(work: Path, target: Path, aside: Path) -> None:
    """Rename ``work`` to ``target``, and remove the folder that had this name.

    That folder is renamed to ``aside`` first; after a failure it gets its name back.
    """
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
        yield  # only the main thread gets signals
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


@contextmanager
def copied_folder(source: Path, out: Path, text: bytes) -> Iterator[tuple[Path, list[str]]]:
    """Copy a folder with another config; give the copy its name if the block raises nothing.

    Links to folders and special files are left out.

    ``text``: the new config.json.

    Yields:
        The path that the copy has until then, and the names of what was left out.

    Raises:
        CheckpointError: ``out`` exists already.
        OSError: the copy cannot be written; nothing of it is left.
    """
    with new_folder(out, partial(check_does_not_exist, out)) as work:
        left_out = _copy(source, work)
        write_whole(work / CONFIG, lambda part: part.write_bytes(text))
        yield work, left_out


def _copy(source: Path, work: Path) -> list[str]:
    """Copy a folder but for its own config.json; return the names of what was left out."""

    def fail(error: OSError) -> None:
        raise error

    left_out = []
    for where, folders, files in os.walk(source, onerror=fail):
        (work / Path(where).relative_to(source)).mkdir(exist_ok=True)
        for path in (Path(where, name) for name in sorted((*folders, *files))):
            if path.is_file():
                if path != source / CONFIG:
                    shutil.copy2(path, work / path.relative_to(source))
            elif path.is_symlink() or not path.is_dir():
                left_out.append(str(path.relative_to(source)))
    return left_out


def check_target(source: Path, out: Path) -> None:
    """Raise a CheckpointError if ``source`` cannot be copied to ``out``: it exists or is inside."""
    check_does_not_exist(out)
    if source.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out} is inside {source}, which is copied. Say a folder outside.")


def check_does_not_exist(out: Path) -> None:
    """Raise a CheckpointError if ``out`` exists already, so that nothing is overwritten."""
    if os.path.lexists(out):
        raise CheckpointError(f"{out} is there already. Say a folder that is not.")
