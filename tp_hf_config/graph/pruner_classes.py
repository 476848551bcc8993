"""Torch-Pruning's pruner classes, and a way to construct one with another dependency graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import torch_pruning as tp

BasePruner: Any = tp.pruner.BasePruner


def family(cls: Any = BasePruner) -> Iterator[Any]:
    """Yield a pruner class and all its subclasses."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from family(subclass)


def constructor_with(graph: Any) -> Callable[..., None]:
    """Return ``BasePruner``'s constructor, changed to use ``graph`` instead of a trace."""
    # the constructor reads dependency.DependencyGraph from its module's globals, as do other
    # threads: this copy gets globals of its own
    own: Any = inspect.unwrap(BasePruner.__init__)
    names = {**own.__globals__, "dependency": SimpleNamespace(DependencyGraph=lambda: graph)}
    taking = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    taking.__kwdefaults__ = own.__kwdefaults__
    return taking
