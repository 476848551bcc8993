"""Keep what was learned and proved of a class on disk, so that another process need not ask again.

Entries lie in the user's cache folder, or where ``TP_HF_CONFIG_CACHE`` says; ``off`` switches the
cache off. An entry is written whole or not at all, so several processes may share the folder. A
damaged entry counts as missing, and is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from .shortage import shortage_noted

VARIABLE = "TP_HF_CONFIG_CACHE"
"""The environment variable that moves the cache to another folder, or switches it off."""
_OFF = {"", "0", "off", "false", "no"}
_MOST = 2000
"""Entries; of more, the oldest quarter is removed."""
_DIGEST = 32
"""Bytes of the checksum in front of an entry's data."""
_BUILTINS = {"frozenset", "set", "complex", "range", "slice"}


_suspended: ContextVar[bool] = ContextVar("_suspended", default=False)


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """While open, nothing is read from the cache, and nothing is written to it."""
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)


def folder() -> Path | None:
    """Return the folder of the cache, which need not exist; None if the cache is switched off."""
    if _suspended.get():
        return None
    given = os.environ.get(VARIABLE)
    if given is not None:
        return None if given.strip().lower() in _OFF else Path(given)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # there is no home folder
        return None
    return Path(base) / "tp_hf_config"


def load(key: str) -> Any:
    """Return what was stored under a key; None if nothing was, or if it is damaged."""
    place = folder()
    if place is None:
        return None
    path = place / key
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
            return _Reader(io.BytesIO(data[_DIGEST:])).load()
    except FileNotFoundError:
        return None
    except Exception:  # whatever a damaged or foreign entry makes pickle raise
        pass
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def store(key: str, value: Any) -> None:
    """Store a value under a key; do nothing if it cannot be written.

    Once a tensor did not fit into memory, nothing is stored: what was learned may be too little.

    Args:
        key: a file name.
        value: made of plain values and this package's dataclasses; a class that cannot be read
            back is not stored.
    """
    place = folder()
    if place is None or shortage_noted():
        return
    try:
        data = pickle.dumps(value, protocol=4)
        _Reader(io.BytesIO(data)).load()
        place.mkdir(parents=True, exist_ok=True)
        _write(place / key, hashlib.sha256(data).digest() + data)
        _trim(place)
    except (OSError, pickle.PicklingError, pickle.UnpicklingError, TypeError, AttributeError):
        return


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: under another name first."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.replace(file.name, path)
        except OSError:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def _trim(place: Path) -> None:
    """Remove the oldest entries of a folder that has too many; also what was never finished."""
    entries = [path for path in place.iterdir() if path.is_file()]
    if len(entries) <= _MOST:
        return
    for path in sorted(entries, key=lambda path: path.stat().st_mtime)[: _MOST // 4]:
        with contextlib.suppress(OSError):
            path.unlink()


class _Reader(pickle.Unpickler):
    """Reads plain values and this package's own classes; refuses whatever else an entry names."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that entries may hold.

        Raises:
            pickle.UnpicklingError: it is another one.
        """
        if module == "builtins" and name in _BUILTINS:
            return super().find_class(module, name)
        if (module, name) == ("fractions", "Fraction"):
            return Fraction
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] == __name__.partition(".")[0]:
            value = super().find_class(module, name)
            if isinstance(value, type) and value.__module__ == module:
                return value
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an entry")
