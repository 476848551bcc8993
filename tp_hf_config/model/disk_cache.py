"""Keep what was learned about a class on disk, so that other processes need not learn it again.

Entries are JSON files in the user's cache folder. Each is written atomically, so processes can
share the folder. An entry that cannot be read counts as missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

from ..reports import versions
from .build import Builder
from .config_json import OF_NO_EFFECT, without_names
from .surroundings import shortage_noted

VARIABLE = "TP_HF_CONFIG_CACHE"  # environment variable: another cache folder, or "off"
_PACKAGE = __name__.partition(".")[0]
_VERSIONED = sys.stdlib_module_names | {"torch"}  # packages keyed by version, not by files
_SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}

_suspended: ContextVar[bool] = ContextVar("_suspended", default=False)


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)


def folder() -> Path | None:
    """The cache folder, which need not exist; ``None`` if the cache is switched off."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    usual = os.path.join(base, _PACKAGE) if os.path.isabs(base) else "off"  # no home folder
    given = os.environ.get(VARIABLE, usual)
    return None if _suspended.get() or given.lower() in ("off", "") else Path(given)


def load(key: str) -> Any:
    """Return what was stored under a key; ``None`` if nothing was, or if it cannot be read."""
    place = folder()
    with contextlib.suppress(Exception):  # damaged, or of another library
        return None if place is None else _decoded(json.loads((place / key).read_text()))


def store(key: str, value: Any) -> None:
    """Store plain values and this package's dataclasses; values of other types are skipped."""
    place = folder()
    if place is None or shortage_noted():  # short of memory, so the results may be incomplete
        return
    new = place / f".new-{uuid.uuid4()}"
    with contextlib.suppress(OSError, TypeError):  # a full disk; a type without an encoding
        try:
            place.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(_encoded(value)))
            new.replace(place / key)
        finally:
            new.unlink(missing_ok=True)


def _encoded(value: Any) -> Any:
    """Return a value as JSON; types that JSON lacks become ``{type: content}``."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in _SEQUENCES.values():
        return {kind.__name__: [*map(_encoded, value)]}
    if kind is dict:
        return {"dict": [[_encoded(key), _encoded(item)] for key, item in value.items()]}
    if kind is Fraction:
        return {"Fraction": str(value)}
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {f"{kind.__module__}:{kind.__name__}": _encoded(fields)}


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](map(_decoded, content))
    if kind == "dict":
        return {_decoded(key): _decoded(item) for key, item in content}
    if kind == "Fraction":
        return Fraction(content)
    module, _, name = kind.partition(":")
    ours = module.startswith(f"{_PACKAGE}.")
    made: Any = getattr(importlib.import_module(module), name) if ours else None
    if not (isinstance(made, type) and dataclasses.is_dataclass(made)):
        raise LookupError(kind)
    return made(**_decoded(content))


def class_digest(builder: Builder, model: nn.Module) -> str | None:
    """Digest of the code of a class and its config class, and of the class's options.

    Covers the files of all classes in ``model`` (a build), and of what these files import or were
    patched with at run time (kernels of another library). ``None`` if a class has no file (typed
    into a shell).
    """
    kinds: set[type] = {type(module) for module in model.modules()}
    kinds |= {type(vars(module).get("config")) for module in model.modules()}
    classes = {base for kind in kinds | {builder.config_class} for base in kind.__mro__}
    names = {cls.__module__ for cls in classes}
    spaces = [vars(sys.modules[name]) for name in names & sys.modules.keys()]
    parts = [part for space in (*spaces, *map(vars, classes)) for part in list(space.values())]
    imported = {str(part.__module__) for part in parts if isinstance(part, (FunctionType, type))}
    files: dict[str, str] = {}
    for name in sorted(names | imported & sys.modules.keys()):
        if name.partition(".")[0] in _VERSIONED:
            continue
        file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        if not file.is_file():
            return None
        files[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    key = [versions(), sys.version_info[:2], files, builder.model_class, builder.options.items()]
    return hashlib.sha256(_own_code() + repr(key).encode()).hexdigest()


@cache
def _own_code() -> bytes:
    """This package's source: it changes between releases, the version does not."""
    return b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))


def entry_key(digest: str, *parts: Any) -> str:
    """Return the key of an entry; config fields without effect (names) are left out."""
    values = without_names([digest, *parts], OF_NO_EFFECT)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
