"""Write a config so that its folder holds either the old state or the new one at any moment."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .folder import CONFIG

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_BACKUP = f"{CONFIG}.bak"
_NEW = f".{CONFIG}.new"
_OLD = f".{CONFIG}.old"
_FICLONE = 0x40049409  # linux/fs.h
_ON_WINDOWS = os.name == "nt"
_BINARY = getattr(os, "O_BINARY", 0)  # else Windows changes line ends


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


def replace_config(folder: Path, text: bytes) -> Path:
    """Replace a folder's config.json and keep the old one beside it; the folder has to be locked.

    If config.json is a link, the link is replaced, and the file it leads to stays as it is.

    ``text``: the new config.json.

    Returns:
        The path that the old config has now.

    Raises:
        OSError: the new config cannot be written; the folder is as it was.
    """
    target, new, old = folder / CONFIG, folder / _NEW, folder / _OLD
    backup = _free(folder)
    try:
        _write(old, target.read_bytes())
        _write(new, text)
        os.replace(old, backup)
        os.replace(new, target)
        _flush_folder(folder)
    except BaseException:
        if os.path.lexists(new):  # config.json is still the old one
            _remove(backup)
        raise
    finally:
        _remove(new)
        _remove(old)
    return backup


def _free(folder: Path) -> Path:
    """Return the first path for a backup that does not exist yet."""
    count = 0
    while os.path.lexists(backup := folder / (f"{_BACKUP}.{count}" if count else _BACKUP)):
        count += 1
    return backup


def _write(path: Path, data: bytes) -> None:
    """Write a file down to the disk; if a link has its name, replace the link, not its target."""
    _remove(path)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        done = 0
        while done < len(data):
            done += os.write(handle, data[done:])
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_folder(folder: Path) -> None:
    """Flush a folder, and with it a rename in it, to the disk; some file systems cannot do this."""
    with suppress(OSError):
        flush(folder)


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


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under another name; it gets its own once it is on the disk.

    Args:
        path: the file; one that is there is replaced.
        write: writes the file that it is given.
    """
    part = path.with_name(f".{path.name}.part")
    write(part)
    flush(part)
    os.replace(part, path)
    _flush_folder(path.parent)


def write_config(folder: Path, data: dict[str, Any]) -> None:
    """Write a config's JSON into a folder that is not complete yet, as Transformers formats it."""
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    """Delete a file if it exists."""
    with suppress(FileNotFoundError):
        path.unlink()


@contextmanager
def new_folder(source: Path, out: Path, text: bytes) -> Iterator[tuple[Path, list[str]]]:
    """Copy a folder with another config; give the copy its name if the block raises nothing.

    Until then the copy has a hidden name beside ``out``. Weights are linked where the file system
    allows it, else copied.

    ``text``: the new config.json.

    Yields:
        The path that the copy has until then, and the names of what was left out.

    Raises:
        CheckpointError: ``out`` exists already.
        OSError: the copy cannot be written; nothing of it is left.
    """
    check_does_not_exist(out)
    work = out.parent / f".{out.name}.{os.getpid()}.new"
    try:
        left_out = _copy(source, work)
        _write(work / CONFIG, text)
        yield work, left_out
        if os.path.lexists(out):
            raise CheckpointError(f"{out} was made by somebody else meanwhile; it is left alone.")
        os.rename(work, out)
        _flush_folder(out.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_target(source: Path, out: Path) -> None:
    """Raise a CheckpointError if ``source`` cannot be copied to ``out``: it exists or is inside."""
    check_does_not_exist(out)
    if source.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out} is inside {source}, which is copied. Say a folder outside.")


def check_does_not_exist(out: Path) -> None:
    """Raise a CheckpointError if ``out`` exists already, so that nothing is overwritten."""
    if os.path.lexists(out):
        raise CheckpointError(f"{out} is there already. Say a folder that is not.")


def _copy(source: Path, work: Path, top: bool = True) -> list[str]:
    """Copy a folder but for its own config.json; leave out links to folders and special files.

    Returns:
        The names of what was left out, relative to the folder.
    """
    left_out = []
    work.mkdir(parents=True)
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            left_out += [f"{entry.name}/{name}" for name in _copy(path, work / entry.name, False)]
        elif entry.name == CONFIG and top:
            continue
        elif entry.is_file():
            _copy_file(path, work / entry.name)
        else:
            left_out.append(entry.name)
    return left_out


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file; where the file system can, both share what is on the disk until one changes.

    A hard link would not do: training may write into a file that is there (``torch.save``).
    """
    if _cloned(source, target):
        shutil.copystat(source, target)
    else:
        shutil.copy2(source, target)


def _cloned(source: Path, target: Path) -> bool:
    """True if the file system has made ``target`` a copy without room of its own (``FICLONE``)."""
    if fcntl is None:
        return False
    try:
        with source.open("rb") as read, target.open("wb") as written:
            fcntl.ioctl(written, _FICLONE, read.fileno())
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        return False
    return True
