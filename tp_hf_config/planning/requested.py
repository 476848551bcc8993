"""Read from a pruner's own arguments which widths are pruned and which stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch_pruning import ops

from ..fieldmap.model_view import ModelView
from ..graph.config_graph import ConfigGraph
from ..graph.prunable import Width, widths_of
from ..model.config_json import FieldPath
from .selection import Wanted


def largest_head_ratio(arguments: Mapping[str, Any]) -> float:
    """Return the largest head ratio among a pruner's arguments; 0 if none is given."""
    by_layer = (arguments.get("head_pruning_ratio_dict") or {}).values()
    return float(max([arguments.get("head_pruning_ratio") or 0.0, *by_layer]))


def wanted_by(arguments: Mapping[str, Any], wrapped: bool) -> Wanted:
    """Return what a pruner's arguments ask for when no field is named.

    As in Torch-Pruning, every width inside the model is pruned, heads if there is a ratio for them,
    and head dims if ``num_heads=`` names layers.

    ``wrapped``: another module reads the model's outputs.
    """
    heads = bool(arguments.get("prune_num_heads")) and largest_head_ratio(arguments) > 0
    dims = bool(arguments.get("prune_head_dims") and arguments.get("num_heads"))
    return Wanted(heads=heads, head_dims=dims, wrapped=wrapped, cheapest=False)


def staying(view: ModelView, arguments: Mapping[str, Any]) -> dict[tuple[FieldPath, ...], str]:
    """Return the widths that stay because a pruner's arguments keep one of their layers.

    One field sets all groups of a width: if one group has to stay, all of them have to.

    Returns:
        The fields of each such width -> the reason.
    """
    types = tuple(arguments.get("root_module_types") or ())
    if (
        not arguments.get("ignored_layers")
        and (not types or {ops.TORCH_CONV, ops.TORCH_LINEAR} <= set(types))
        and not (arguments.get("num_heads") and arguments.get("prune_num_heads"))
        and arguments.get("prune_head_dims", True)
    ):
        return {}
    offered = [w for w in widths_of(view.model, view.field_map) if w.reason is None]
    ignored = list(arguments.get("ignored_layers") or ())
    modules = [m for item in ignored if isinstance(item, nn.Module) for m in item.modules()]
    parameters = [item for item in ignored if isinstance(item, nn.Parameter)]
    graph = ConfigGraph(view.model, [group for width in offered for group in width.groups])
    graph.build_dependency(view.model, ignored_params=parameters)
    groups = iter(graph.graph_groups)
    result: dict[tuple[FieldPath, ...], str] = {}
    for width in offered:
        of_width = [next(groups) for _ in width.groups]
        every = [graph.refusal_of(graph_group, modules, types) for graph_group in of_width]
        if refusals := [refusal for refusal in every if refusal is not None]:
            others = ", and one config field sets them all" if len(refusals) < len(of_width) else ""
            result[width.fields] = f"{refusals[0].reason}{others}."
            continue
        layers = [graph.outputs_of(graph_group) for graph_group in of_width]
        reason = _why_heads_stay(view, width, layers, arguments)
        if reason is not None:
            result[width.fields] = reason
    return result


def with_ratios(view: ModelView, arguments: Mapping[str, Any]) -> list[tuple[FieldPath, ...]]:
    """Return the fields of the widths that layers in ``pruning_ratio_dict`` have as their outputs.

    A module with parts names none of them: it reads and writes the residual stream too.
    """
    keys = arguments.get("pruning_ratio_dict") or {}
    named = {layer for key in keys for layer in (key if isinstance(key, tuple) else (key,))}
    if not named:
        return []
    offered = [w for w in widths_of(view.model, view.field_map) if w.reason is None]
    graph = ConfigGraph(view.model, [group for width in offered for group in width.groups])
    graph.build_dependency(view.model)
    return list(
        dict.fromkeys(
            group.fields
            for group in graph.graph_groups
            if named & {*graph.outputs_of(group).values()}
        )
    )


def _why_heads_stay(
    view: ModelView, width: Width, layers: list[dict[str, nn.Module]], arguments: Mapping[str, Any]
) -> str | None:
    """Return why a width that changes attention heads stays; ``None``: it may be pruned.

    ``layers``: for each group of the width, the layers that lose outputs, by name.
    """
    split = [
        {name: layer for name, layer in group.items() if view.field_map.splits_of(name)}
        for group in layers
    ]
    if not any(split):
        return None
    if not set(width.fields) & view.field_map.count_fields():
        if arguments.get("prune_head_dims", True):
            return None
        name = next(name for group in split for name in group)
        return f"heads of {name} become smaller with it, and prune_head_dims=False."
    named = arguments.get("num_heads") or {}
    missing = [group for group in split if group and not any(m in named for m in group.values())]
    if named and missing:
        return f"num_heads= does not name {next(iter(missing[0]))}."
    return None
