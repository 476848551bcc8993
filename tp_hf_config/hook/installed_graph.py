"""Gives the config graph to a pruner that has already traced its model."""

from __future__ import annotations

from typing import Any

from ..forward.run_recipe import MakeInputs
from ..graph.pruner_access import arguments_of, cannot_replace_trace, replace_graph
from ..planning.pruner_graph import graph_for
from ..planning.settings import PruneSettings
from .registration import constructor_of


def replace_trace(
    pruner: Any, settings: PruneSettings, make_inputs: MakeInputs | None, cheapest: bool
) -> str:
    """Replace a pruner's trace by the config graph; return how that was proved, or raise."""
    refusal = cannot_replace_trace(pruner, constructor_of(type(pruner)))
    if refusal is not None:
        name = type(pruner).__name__
        raise ValueError(
            f"this {name} has already traced its model, and the groups of that trace are not "
            f"proved. They cannot be replaced by the graph made from the config: {refusal.reason}. "
            f"Pass the hook to the pruner's constructor: {name}(model, ..., "
            "hooks=[HFConfigSyncHook()])."
        )
    arguments = arguments_of(pruner)
    graph, why = graph_for(arguments, settings, make_inputs, cheapest)
    replace_graph(pruner, graph, arguments)
    return why
