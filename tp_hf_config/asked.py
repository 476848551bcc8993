"""What a pruner's own arguments ask for: which widths go, and which stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch_pruning import ops

from .chosen import Wanted
from .graph import ConfigGraph
from .offers import Width, widths_of
from .reference import FieldPath
from .widths import WidthView


def some_head_ratio(arguments: Mapping[str, Any]) -> float:
    """The largest ratio that heads shall go by; 0: none is given."""
    by_layer = (arguments.get("head_pruning_ratio_dict") or {}).values()
    return float(max([arguments.get("head_pruning_ratio") or 0.0, *by_layer]))


def wanted_by(arguments: Mapping[str, Any], wrapped: bool) -> Wanted:
    """What a pruner's arguments ask for, where no field is named.

    As in Torch-Pruning, heads go where there is a ratio for them, and head dims of the layers that
    ``num_heads=`` names.
    """
    heads = bool(arguments.get("prune_num_heads")) and some_head_ratio(arguments) > 0
    dims = bool(arguments.get("prune_head_dims") and arguments.get("num_heads"))
    return Wanted(heads=heads, head_dims=dims, wrapped=wrapped)


def staying(view: WidthView, arguments: Mapping[str, Any]) -> dict[tuple[FieldPath, ...], str]:
    """The widths that cannot go because of layers that a pruner's arguments keep, and why.

    One field sets all groups of a width: where one of them stays, all of them have to.
    """
    types = tuple(arguments.get("root_module_types") or ())
    if (
        not arguments.get("ignored_layers")
        and (not types or {ops.TORCH_CONV, ops.TORCH_LINEAR} <= set(types))
        and not (arguments.get("num_heads") and arguments.get("prune_num_heads"))
        and arguments.get("prune_head_dims", True)
    ):
        return {}
    offered = [w for w in widths_of(view.model, view.known) if w.reason is None]
    ignored = list(arguments.get("ignored_layers") or ())
    modules = [m for one in ignored if isinstance(one, nn.Module) for m in one.modules()]
    parameters = [one for one in ignored if isinstance(one, nn.Parameter)]
    graph = ConfigGraph(view.model, [group for width in offered for group in width.groups])
    graph.build_dependency(view.model, ignored_params=parameters)
    groups = iter(graph.coupled)
    result: dict[tuple[FieldPath, ...], str] = {}
    for width in offered:
        mine = [next(groups) for _ in width.groups]
        found = [graph.why_kept(one, modules, types) for one in mine]
        reasons = [reason for reason in found if reason is not None]
        if reasons:
            others = ", and one config field sets them all" if len(reasons) < len(mine) else ""
            result[width.fields] = f"{reasons[0]}{others}."
            continue
        layers = [graph.outputs_of(one) for one in mine]
        reason = _kept_heads(view, width, layers, arguments)
        if reason is not None:
            result[width.fields] = reason
    return result


def _kept_heads(
    view: WidthView,
    width: Width,
    layers: list[dict[str, nn.Module]],
    arguments: Mapping[str, Any],
) -> str | None:
    """Why a width that changes heads stays: they are not asked for."""
    split = [
        {name: layer for name, layer in group.items() if view.known.splits_of(name)}
        for group in layers
    ]
    if not any(split):
        return None
    if not set(width.fields) & view.known.count_fields():
        if arguments.get("prune_head_dims", True):
            return None
        name = next(name for group in split for name in group)
        return f"heads of {name} become smaller with it, and prune_head_dims=False."
    named = arguments.get("num_heads") or {}
    missing = [group for group in split if group and not any(m in named for m in group.values())]
    if named and missing:
        return f"num_heads= does not name {next(iter(missing[0]))}."
    return None
