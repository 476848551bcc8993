"""Torch-Pruning's pruner classes, and a way to construct one with another dependency graph."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any

import torch_pruning as tp

BasePruner: Any = tp.pruner.BasePruner
_of_thread = threading.local()


def family(cls: Any = BasePruner) -> Iterator[Any]:
    """Yield a pruner class and all its subclasses."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from family(subclass)


@contextmanager
def constructing_with(graph: Any) -> Iterator[None]:
    """Make the first pruner that this thread constructs inside ``with`` use ``graph``."""
    before, _of_thread.graph = awaited_graph(), graph
    try:
        yield
    finally:
        _of_thread.graph = before


def awaited_graph() -> Any:
    return getattr(_of_thread, "graph", None)


def with_awaited_graph(constructor: Callable[..., None]) -> Callable[..., None]:
    """Return ``BasePruner``'s constructor, changed to use the awaited graph if there is one."""
    graph, _of_thread.graph = awaited_graph(), None  # for one pruner
    if graph is None:
        return constructor
    # the constructor reads dependency.DependencyGraph from its module's globals, as do other
    # threads: this copy gets globals of its own
    own: Any = inspect.unwrap(constructor)
    names = {**own.__globals__, "dependency": SimpleNamespace(DependencyGraph=lambda: graph)}
    taking = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    taking.__kwdefaults__ = own.__kwdefaults__
    return taking
