"""Layers that a class has and that none of its code reads: they stand in checkpoints, no more."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

_MAKERS = ("__init__",)
_ACCESSORS = ("get_input_embeddings", "set_input_embeddings")
"""What hands a layer over runs nothing, as long as nobody asks for it (MBart's ``shared``)."""


def is_unread(model: nn.Module, layer: str) -> bool:
    """Whether a layer's attribute is named where it is made or handed over, and nowhere else.

    Looked for in all code of the Python modules that the model's classes are defined in.
    """
    named = [part for part in layer.split(".") if not part.isdigit()]
    sources = {type(module).__module__ for module in model.modules()}
    return bool(named) and not any(named[-1] in _named_in(source) for source in sources)


@cache
def _named_in(source: str) -> frozenset[str]:
    """All that the code of a Python module names, without what makes its objects."""
    functions = [f for f in _functions(sys.modules[source], source) if f.__name__ not in _MAKERS]
    named = _names([f for f in functions if f.__name__ not in _ACCESSORS])
    return named | _names([f for f in functions if f.__name__ in named.intersection(_ACCESSORS)])


def _names(functions: Iterable[FunctionType]) -> frozenset[str]:
    return frozenset(
        name
        for function in functions
        for code in _codes(function.__code__)
        for name in (*code.co_names, *(c for c in code.co_consts if isinstance(c, str)))
    )


def _functions(source: ModuleType, defined_in: str) -> Iterator[FunctionType]:
    values = list(vars(source).values())
    for one in [value for value in values if inspect.isclass(value)]:
        if one.__module__ == defined_in:
            values += vars(one).values()
    for value in values:
        yield from _unwrapped(value)


def _unwrapped(value: Any) -> Iterator[FunctionType]:
    """The functions behind a method, a property, a decorator."""
    if isinstance(value, property):
        values = [value.fget, value.fset]
    else:
        values = [getattr(value, "__func__", value)]
    for one in values:
        while isinstance(one, FunctionType):
            yield one
            one = getattr(one, "__wrapped__", None)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
