"""Writing into a folder so that it holds the old or the new at any moment, and nothing between."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError
from .folder import CONFIG

_BACKUP = f"{CONFIG}.bak"
_NEW = f".{CONFIG}.new"
_OLD = f".{CONFIG}.old"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else repairs this folder in the meantime.

    The lock is on the folder itself: there is no file that could be left behind, and it goes with
    the process that holds it.

    Raises:
        CheckpointError: somebody else does.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise CheckpointError(f"{folder} cannot be locked: {error.strerror}") from error
            raise CheckpointError(
                f"{folder} is being repaired by another process. Wait for it, then check again."
            ) from None
        yield
    finally:
        os.close(handle)


def replace_config(folder: Path, text: bytes) -> Path:
    """Put a new config.json into a folder, the old one beside it; the folder is locked.

    A link is replaced, what it leads to stays as it is.

    Returns:
        The old config's new place.

    Raises:
        OSError: the new one cannot be written; the folder is as it was.
    """
    target, new, old = folder / CONFIG, folder / _NEW, folder / _OLD
    backup = _free(folder)
    try:
        _write(old, target.read_bytes())
        _write(new, text)
        os.replace(old, backup)
        os.replace(new, target)
        _flush(folder)
    except BaseException:
        if os.path.lexists(new):  # config.json is still the old one
            _remove(backup)
        raise
    finally:
        _remove(new)
        _remove(old)
    return backup


def _free(folder: Path) -> Path:
    """The first name for a backup that is not taken."""
    count = 0
    while os.path.lexists(found := folder / (f"{_BACKUP}.{count}" if count else _BACKUP)):
        count += 1
    return found


def _write(path: Path, data: bytes) -> None:
    """Write a file of this name anew, down to the disk; what a link there leads to stays."""
    _remove(path)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        done = 0
        while done < len(data):
            done += os.write(handle, data[done:])
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush(folder: Path) -> None:
    """A rename is on the disk once its folder is; not every file system can say so."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()


@contextmanager
def new_folder(source: Path, out: Path, text: bytes) -> Iterator[tuple[Path, list[str]]]:
    """A copy of a folder with another config, under a name of its own until the block ends well.

    Weights are linked where the file system can, else copied.

    Yields:
        Where it is for now, and what was left out.

    Raises:
        CheckpointError: ``out`` is there already.
        OSError: it cannot be written; nothing of it is left.
    """
    check_new(out)
    place = out.parent / f".{out.name}.{os.getpid()}.new"
    try:
        left_out = _copy(source, place)
        _write(place / CONFIG, text)
        yield place, left_out
        if os.path.lexists(out):
            raise CheckpointError(f"{out} was made by somebody else meanwhile; it is left alone.")
        os.rename(place, out)
        _flush(out.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def check_new(out: Path) -> None:
    """Refuse to write where something is.

    Raises:
        CheckpointError: ``out`` is there already.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out} is there already. Say a folder that is not.")


def _copy(source: Path, place: Path) -> list[str]:
    """Copy what is in a folder but for its config; links to folders and odd files are left out."""
    left_out = []
    place.mkdir(parents=True)
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            left_out += [f"{entry.name}/{name}" for name in _copy(path, place / entry.name)]
        elif entry.name == CONFIG and not (place / CONFIG).exists():
            continue
        elif entry.is_file():
            _link(path, place / entry.name)
        else:
            left_out.append(entry.name)
    return left_out


def _link(source: Path, target: Path) -> None:
    if source.suffix in (".safetensors", ".bin"):  # never edited in place
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
    shutil.copy2(source, target)
