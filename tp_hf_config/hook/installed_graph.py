"""The config graph that a pruner gets, when it is constructed or in the place of its trace."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..fieldmap.model_view import view_of
from ..forward.run_recipe import MakeInputs
from ..graph.config_graph import ConfigGraph
from ..graph.pruner_access import (
    arguments_of,
    cannot_replace_trace,
    carried_inputs,
    replace_graph,
)
from ..planning.pruner_arguments import adapt_arguments, check_needed, check_values
from ..planning.pruner_kwargs import default_pruner_kwargs
from .registration import constructor_of


def graph_for(arguments: dict[str, Any], make_inputs: MakeInputs | None) -> tuple[ConfigGraph, str]:
    """Return the config graph to install, and for reports how it was proved.

    Args:
        arguments: those of the pruner's constructor; they are adapted to the graph.
        make_inputs: the hook's function that makes inputs, for arguments without a graph.

    Raises:
        UnsupportedModelError: the model cannot be followed, or no graph can prune it.
        ValueError: a ratio is outside 0 to 1, or the arguments were made for other heads.
    """
    model: nn.Module = arguments["model"]
    inputs = carried_inputs(arguments)
    view = view_of(model, make_inputs if inputs is None else inputs.graph.make_inputs)
    check_values(arguments)
    if inputs is None:
        arguments |= default_pruner_kwargs(model, view, arguments)
        inputs = carried_inputs(arguments)
        assert inputs is not None  # just made
    check_needed(inputs.needed, arguments)
    graph: ConfigGraph = inputs.graph
    adapt_arguments(view, graph, arguments)
    return graph, inputs.why


def replace_trace(pruner: Any, make_inputs: MakeInputs | None) -> str:
    """Put the config graph in the place of a pruner's trace; return how it was proved.

    Raises:
        ValueError: the trace cannot be replaced.
    """
    refusal = cannot_replace_trace(pruner, constructor_of(type(pruner)))
    if refusal is not None:
        name = type(pruner).__name__
        raise ValueError(
            f"this {name} has traced its model by itself, and nothing proves what its groups "
            f"cut. The graph made from the config cannot take their place any more: "
            f"{refusal.reason}. "
            f"Construct the pruner with the hook: {name}(model, ..., "
            "hooks=[HFConfigSyncHook()])."
        )
    arguments = arguments_of(pruner)
    graph, why = graph_for(arguments, make_inputs)
    replace_graph(pruner, graph, arguments)
    return why
