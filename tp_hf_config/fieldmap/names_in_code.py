"""Find the names in the code of a model's classes: no code reads a field that is not one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator
from types import CellType, CodeType
from typing import Any

from torch import nn


def names_in_code(model: nn.Module, without: Collection[str] = ()) -> frozenset[str]:
    """Return every name and string in the code that a model's own classes run.

    The search starts at the classes of the model's modules, and goes on to what their code calls in
    the same packages or in ``transformers``. Functions whose name is in ``without`` are skipped.
    """
    classes = frozenset(type(module) for module in model.modules())
    return _names_in_code_of(classes, frozenset(without))


@functools.lru_cache(maxsize=16)
def _names_in_code_of(classes: frozenset[type], without: frozenset[str]) -> frozenset[str]:
    from transformers import PretrainedConfig, PreTrainedModel

    generic = {*PreTrainedModel.__mro__, *nn.Sequential.__mro__, *nn.ModuleList.__mro__}
    waiting: list[Any] = list(classes)
    packages = {_package(kind) for kind in waiting} | {"transformers"}
    words: set[str] = set()
    visited: set[int] = set()
    while waiting:
        item = waiting.pop()
        item = getattr(item, "fget", None) or getattr(item, "__func__", None) or item
        if id(item) in visited or _package(item) not in packages - {"torch"}:
            continue
        visited.add(id(item))
        if isinstance(item, type) and not issubclass(item, PretrainedConfig):
            bases = [base for base in item.__mro__ if base not in generic]
            waiting += [value for base in bases for value in vars(base).values()]
        elif type(item) is dict:  # functions by name, as for rotary positions
            waiting += item.values()
        elif inspect.isfunction(item) and item.__name__ not in without:
            names = set(_names_of(item.__code__))
            words |= names
            cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
            called = [item.__globals__[name] for name in names if name in item.__globals__]
            waiting += [x for x in (*cells, *called) if isinstance(x, type | dict) or callable(x)]
    return frozenset(words)


def _package(item: Any) -> str:
    """Return the package of a class or function; ``transformers`` if it has none."""
    return str(getattr(item, "__module__", "transformers")).partition(".")[0]


def _names_of(code: CodeType) -> Iterator[str]:
    """Yield every name and string in a code object, and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names_of(constant)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
