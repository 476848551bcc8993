"""Undocumented, private parts of Torch-Pruning's pruners that this library relies on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch_pruning.pruner.algorithms.base_pruner as tp_base

from .config_graph import ConfigGraph


class GraphInputs(dict[str, Any]):
    """Example inputs that carry the graph to prune by; ``pruner_kwargs`` makes them.

    Torch-Pruning hands ``example_inputs`` to the graph untouched, and a graph that is not traced
    does not read them.

    Attributes:
        graph: the graph made from the config; ``None``: trace.
        why: text for reports: which graph it is, and why.
        handed: other arguments that a pruner needs, by name, as ``pruner_kwargs`` returned them.
    """

    def __init__(self, inputs: dict[str, Any], graph: ConfigGraph | None, why: str):
        super().__init__(inputs)
        self.graph, self.why = graph, why
        self.handed: dict[str, Any] = {}


@contextmanager
def building(graph: ConfigGraph) -> Iterator[None]:
    """Make a pruner that is constructed inside ``with`` take ``graph`` as its dependency graph."""
    original = tp_base.dependency
    try:
        tp_base.dependency = SimpleNamespace(DependencyGraph=lambda: graph)
        graph.awaited = True
        yield
    finally:
        tp_base.dependency = original
        graph.awaited = False


def given_ratios(pruner: Any, group: Any) -> tuple[str, Sequence[float]] | None:
    """Return the scope and the ratios that a pruner was given for a layer of a group, or None.

    Looks them up as ``BasePruner._prune`` does (base_pruner.py, 1.6.1).

    Returns:
        The scope's name and one ratio for each step; ``None`` if no layer of the group has any.
    """
    for dep, _ in group:
        for node, function in ((dep.source, dep.trigger), (dep.target, dep.handler)):
            scope = pruner._layer_to_scope.get(node.module)
            if scope is not None and pruner.DG.is_out_channel_pruning_fn(function):
                ratios = pruner.pruning_ratio_dict.get(node.module, pruner.per_step_pruning_ratio)
                return scope[0], ratios
    return None
