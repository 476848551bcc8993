"""A digest of all code that decides what a class builds and computes: the key of what is cached."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from ..schema import versions
from .build import Builder
from .config_json import OF_NO_EFFECT, without_names

_VERSIONED = sys.stdlib_module_names | {"torch"}
"""Packages that their versions stand for."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
"""Constants whose text is the same in every process."""


def class_digest(builder: Builder, model: nn.Module) -> str | None:
    """Return a digest of a class with its options, but without its config and dtype.

    It changes with the source of every class in the model and of the functions that their modules
    import, with functions that were put in their place at run time (kernels from another library),
    and with the versions of this library, torch and Transformers.

    ``model``: the class built from its config, without data.

    Returns:
        Hexadecimal digits; None if some class or function has no source file, as those typed into
        a shell.
    """
    classes = {type(module) for module in model.modules()}
    configs = {
        type(config)
        for module in model.modules()
        if (config := vars(module).get("config")) is not None
    }
    families = {base for cls in (*classes, *configs, builder.config_class) for base in cls.__mro__}
    own = {cls.__module__ for cls in classes | configs}
    defining = {cls.__module__ for cls in families}
    for name in filter(_is_read, own & sys.modules.keys()):
        # the module of a named tuple's functions, as of other made ones, is none
        modules = {str(function.__module__) for _, function in _functions(sys.modules[name])}
        defining |= modules & sys.modules.keys()
    sources = []
    for name in filter(_is_read, sorted(defining)):
        module = sys.modules.get(name)
        state = None if module is None else _file_state(module)
        if module is None or state is None:
            return None
        sources.append((name, state, *(_namespace(module) if name in own else ())))
    text = json.dumps(
        [
            versions(),
            sys.version_info[:2],
            _package_state(),
            f"{builder.model_class.__module__}.{builder.model_class.__qualname__}",
            repr(sorted(builder.options.items())),
            sources,
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _is_read(name: str) -> bool:
    """True if the source of a module counts, and no version stands for it."""
    return name.partition(".")[0] not in _VERSIONED


def _file_state(module: ModuleType) -> str | None:
    """Return what tells whether a module's file changed; None if it has none.

    Files of Transformers are told by size and time, others by what is in them.
    """
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        return None
    if module.__name__.partition(".")[0] == "transformers":
        state = Path(file).stat()
        return f"{state.st_size}-{state.st_mtime_ns}"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _namespace(module: ModuleType) -> Iterator[str]:
    """Yield what a module's functions, and the methods of its classes, are now."""
    for name, function in _functions(module):
        text = f"{_text(function.__code__)}{_text(function.__defaults__ or ())}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        yield f"{name}={function.__module__}.{function.__qualname__}:{digest}"
    for name, value in sorted(vars(module).items()):
        if isinstance(value, type) and value.__module__ != module.__name__:
            yield f"{name}={value.__module__}.{value.__qualname__}"


def _functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """Yield the functions that a module has or imports, and its classes' methods, by name."""
    for name, value in sorted(vars(module).items()):
        if isinstance(value, FunctionType):
            yield name, value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for key, method in sorted(vars(value).items()):
                method = getattr(method, "__func__", method)
                if isinstance(method, FunctionType):
                    yield f"{name}.{key}", method


def _text(value: Any) -> str:
    """Return a text of code, or of a constant in it, that is the same in every process.

    Of other objects (defaults of arguments) it is only the name of their class.
    """
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {_text(value.co_consts)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__


@functools.cache
def _package_state() -> str:
    """Return a digest of the sizes and times of this package's own files."""
    root = Path(__file__).parents[1]
    states = [
        (path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*.py"))
    ]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def entry_key(digest: str, *parts: Any) -> str:
    """Return the key of one entry: a class's digest together with JSON values.

    Configs among these count without what has no effect: where a model comes from, its precision.
    """
    values = without_names([digest, *parts], OF_NO_EFFECT)
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
