"""Torch-Pruning's pruner classes, their subclasses, and how one gets another dependency graph."""

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
    """Yield a pruner class and all its subclasses, recursively; by default every pruner class."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from family(subclass)


@contextmanager
def constructing_with(graph: Any) -> Iterator[None]:
    """Make the pruner that this thread constructs inside ``with`` take a dependency graph."""
    before, _of_thread.graph = awaited_graph(), graph
    try:
        yield
    finally:
        _of_thread.graph = before


def awaited_graph() -> Any:
    """Return the graph that the next pruner constructed by this thread takes; ``None``: its own."""
    return getattr(_of_thread, "graph", None)


def with_awaited_graph(constructor: Callable[..., None]) -> Callable[..., None]:
    """Return ``BasePruner``'s constructor such that it takes the awaited graph, if there is one.

    It looks ``dependency.DependencyGraph`` up among the globals of its module, which other threads
    read too. So the constructor runs with globals of its own. One pruner takes the graph.
    """
    graph, _of_thread.graph = awaited_graph(), None
    if graph is None:
        return constructor
    own: Any = inspect.unwrap(constructor)
    names = {**own.__globals__, "dependency": SimpleNamespace(DependencyGraph=lambda: graph)}
    taking = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    taking.__kwdefaults__ = own.__kwdefaults__
    return taking
