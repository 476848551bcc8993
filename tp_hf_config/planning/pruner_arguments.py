"""Give a pruner's arguments their meaning on the config graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..arguments import check
from ..errors import closest, listed, warn
from ..fieldmap.model_view import ModelView
from ..graph.config_graph import ConfigGraph
from ..graph.pruner_classes import family
from ..graph.sides import ParameterView, channels_of, is_output
from ..model.config_json import field_name
from .requested import largest_head_ratio

_WITHOUT_EFFECT = {
    "customized_pruners": "it cuts the parameters of every layer by itself, and what a layer "
    "notes of its widths follows",
    "unwrapped_parameters": "it knows which dimensions of bare parameters follow a config field",
    "forward_fn": "no forward pass is run to make it",
}
# argument -> True if it is about what a layer puts out
_CONSTRAINTS = {"in_channel_groups": False, "out_channel_groups": True, "channel_groups": True}
MERGED = (
    "num_heads",
    "in_channel_groups",
    "out_channel_groups",
    "ignored_layers",
    "pruning_ratio_dict",
    "round_to",
    "root_module_types",
    "prune_num_heads",
    "prune_head_dims",
)
"""The arguments of a pruner that the model has a say in."""
NEEDED = ("prune_num_heads", "pruning_ratio_dict")
"""The arguments without which a pruner does not do what ``pruner_kwargs`` was asked for."""
_BY_LAYER = ("pruning_ratio_dict", "head_pruning_ratio_dict", "ch_sparsity_dict")
_VALUES = {
    **dict.fromkeys(("pruning_ratio", "head_pruning_ratio", "ch_sparsity"), "Share | None"),
    **dict.fromkeys(("max_pruning_ratio", "max_ch_sparsity"), "Share | None"),
    **dict.fromkeys(_BY_LAYER, "Mapping[Any, Share] | None"),
    **dict.fromkeys(("num_heads", *_CONSTRAINTS), "Mapping[Any, Count] | None"),
    **dict.fromkeys(("ignored_layers", "root_module_types"), "Iterable[Any] | None"),
    **dict.fromkeys(("global_pruning", "prune_num_heads", "prune_head_dims"), "bool"),
    "iterative_steps": "Count",
    "round_to": "Count | None",
    "importance": "Callable",
}
"""What the values of a pruner's arguments are, as annotations."""


def check_values(arguments: Mapping[str, Any]) -> None:
    """Raise if one of a pruner's arguments has a value that no pruner takes.

    Raises:
        TypeError: it is of another type.
        ValueError: it is a ratio that is not from 0 to 1, or a number that is too small.
    """
    for name, value in arguments.items():
        if name in _VALUES:
            check(name, value, _VALUES[name])


def check_names(arguments: Iterable[str]) -> None:
    """Raise if no pruner has one of these arguments.

    Raises:
        TypeError: no pruner has it.
    """
    names = {
        name
        for cls in family()
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    } | {"hooks"}
    for name in arguments:
        if name not in names - {"self", "model"}:
            raise TypeError(f"pruner_kwargs: no pruner takes {name}={closest(name, names)}")


def check_needed(needed: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Warn if a pruner gets fewer ratios than ``pruner_kwargs`` returned for it.

    ``needed``: the ``NEEDED`` arguments that ``pruner_kwargs`` returned.

    Raises:
        ValueError: the arguments were made for another ``prune_num_heads``.
    """
    heads, expected = arguments.get("prune_num_heads"), needed.get("prune_num_heads")
    if expected is not None and bool(heads) is not bool(expected):
        raise ValueError(
            f"prune_num_heads={heads}, but pruner_kwargs made its arguments for "
            f"prune_num_heads={expected}. Tell it: pruner_kwargs(model, prune_num_heads={heads})"
        )
    ratios = arguments.get("pruning_ratio_dict") or {}
    if not (needed.get("pruning_ratio_dict") or {}).items() <= ratios.items():
        warn(
            "pruning_ratio_dict= is not what pruner_kwargs gave, and keeps less of what the model "
            "needs. Give yours to it, which puts both together: "
            "pruner_kwargs(model, pruning_ratio_dict=...)"
        )


def adapt_arguments(view: ModelView, graph: ConfigGraph, arguments: dict[str, Any]) -> None:
    """Change a pruner's arguments so that they do on a graph what they do in Torch-Pruning.

    A warning says where they cannot.

    Raises:
        ValueError: channels are to go together that the graph prunes one by one.
    """
    for name, out in _CONSTRAINTS.items():
        _check_constraint(graph, name, arguments.get(name) or {}, out)
    for name in _BY_LAYER:
        if arguments.get(name):
            arguments[name] = _with_views(graph, arguments[name], name.startswith("head"))
    for message in (*_without_effect(graph, view, arguments), *_unused(graph, arguments)):
        warn(message)
    _count_heads(view, arguments)


def _without_effect(
    graph: ConfigGraph, view: ModelView, arguments: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a warning for each argument that has no effect on the config graph."""
    for name, why in _WITHOUT_EFFECT.items():
        if arguments.get(name):
            yield f"{name}= has no effect on the graph made from the config: {why}. Leave it out."
    heads, ratio = bool(arguments.get("prune_num_heads")), largest_head_ratio(arguments)
    if ratio and not heads:
        yield (
            f"head_pruning_ratio={ratio:g} has no effect without prune_num_heads=True, as in "
            "Torch-Pruning: no heads are pruned."
        )
    elif heads and not ratio:
        with_heads = {f for group in graph.graph_groups if group.heads for f in group.fields}
        others = sorted(map(field_name, with_heads - view.field_map.count_fields()))
        yield (
            "prune_num_heads=True has no effect without head_pruning_ratio=, as in Torch-Pruning: "
            "no heads are pruned"
            + (f", nor {', '.join(others)}, which goes with them alone." if others else ".")
        )


def _check_constraint(
    graph: ConfigGraph, name: str, counts: Mapping[nn.Module, int], out: bool
) -> None:
    """Raise if channels of a layer are to go together but the graph prunes them otherwise.

    Args:
        graph: the graph.
        name: the argument's name.
        counts: layer -> number of equal runs of its channels that have to lose the same ones.
        out: the argument is about a layer's outputs, else about its inputs.

    Raises:
        ValueError: the graph prunes some layer otherwise.
    """
    kinds = {
        type(layer).__name__
        for layer, count in counts.items()
        if not _together(graph, layer, count, out)
    }
    if kinds:
        layers = ", ".join(sorted(kinds))
        raise ValueError(
            f"{name}= (for {layers}) on the graph made from the config: which channels of a "
            "layer go together (fused layers, heads, grouped norms) it knows by experiment, "
            "and others cannot be asked for. Leave it out."
        )


def _together(graph: ConfigGraph, layer: nn.Module, count: int, out: bool) -> bool:
    """True if each of ``count`` equal runs of a layer's channels loses the same, or goes whole.

    A layer that loses no channels passes too.
    """
    for graph_group, side in graph.sides_of(layer):
        channels, table = channels_of(side), side.table
        if is_output(side) is not out or channels == count * table.shape[1]:
            continue
        if channels % count:
            return False
        units = torch.arange(len(table)) % (
            graph_group.units.count // graph_group.count.channel_groups
        )
        labels = torch.full((channels,), -1)  # every channel group loses the same units
        labels[table] = units[:, None].expand_as(table)
        runs = labels.view(count, -1)
        if not (runs == runs[0]).all():
            return False
    return True


def _with_views(graph: ConfigGraph, ratios: Mapping[Any, float], single: bool) -> dict[Any, float]:
    """Return the ratios by layer, extended to the parameter views of these layers.

    Inside a named layer, Torch-Pruning looks for layers of types that it can prune. It would miss a
    ``Conv1D``, a norm of Transformers' own or stacked experts, which the graph shows it as views.

    Args:
        graph: the graph.
        ratios: layer -> ratio; a tuple of layers is ranked together.
        single: only single layers may be keys.
    """
    result: dict[Any, float] = {}
    for key, ratio in ratios.items():
        named = key if isinstance(key, tuple) else (key,)
        inside = {module for layer in named for module in layer.modules()}
        views = [
            side.module
            for module in inside
            for _, side in graph.sides_of(module)
            if isinstance(side.module, ParameterView) and is_output(side)
        ]
        views = [view for view in dict.fromkeys(views) if view not in named]
        if single:
            result |= dict.fromkeys((*named, *views), ratio)
        else:
            result[(*named, *views) if views else key] = ratio
    return result


def _unused(graph: ConfigGraph, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning for ratios of layers that decide nothing, or of which only one can decide."""
    for name in _BY_LAYER:
        heads = name.startswith("head")
        groups = [graph_group for graph_group in graph.graph_groups if graph_group.heads is heads]
        ratios_of: dict[int, list[float]] = {}  # by the id of a group
        idle: list[nn.Module] = []
        for key, ratio in (arguments.get(name) or {}).items():
            named = key if isinstance(key, tuple) else (key,)
            inside = {module for layer in named for module in layer.modules()}
            affected = [
                graph_group
                for graph_group in groups
                if graph_group.units in inside  # no outputs: ConfigGraph.roots_of names its units
                or any(side.module in inside and is_output(side) for side in graph_group.sides)
            ]
            for graph_group in affected:
                ratios_of.setdefault(id(graph_group), []).append(ratio)
            if not affected:
                idle.append(named[0])
        if idle:
            yield f"{name}= has no effect for {_names(graph, idle)}: {_why_idle(heads, arguments)}."
        for graph_group in groups:
            ratios = list(dict.fromkeys(ratios_of.get(id(graph_group), ())))
            if len(ratios) > 1:
                fields = " + ".join(map(field_name, graph_group.fields))
                listed = ", ".join(f"{ratio:g}" for ratio in ratios)
                yield (
                    f"{name}= has the ratios {listed} for layers that lose the same channels "
                    f"({fields}); Torch-Pruning takes that of the first of them. Give them one "
                    "ratio."
                )


def _why_idle(heads: bool, arguments: Mapping[str, Any]) -> str:
    """Return why the ratio of a layer decides nothing."""
    if heads:
        return "no heads that are pruned are split out of what it puts out"
    way = " by pruning_ratio (heads follow the head ratios)" if arguments["prune_num_heads"] else ""
    return f"nothing that it puts out is pruned{way}"


def _names(graph: ConfigGraph, layers: Sequence[nn.Module]) -> str:
    """Return the names of up to three layers and how many more there are."""
    names = {module: name for name, module in graph.pretrained.named_modules()}
    shown = [names.get(layer, type(layer).__name__) or type(layer).__name__ for layer in layers]
    return listed(shown)


def _count_heads(view: ModelView, arguments: dict[str, Any]) -> None:
    """Set ``num_heads`` to what the model splits its layers into; warn of other counts."""
    given = arguments.get("num_heads") or {}
    counts = {module: count for _, module, count in view.head_layers()}
    names = {module: name for name, module, _ in view.head_layers()}
    for module, count in given.items():
        if count != (own := counts.setdefault(module, count)):
            warn(
                f"num_heads= says {count} heads for {names[module]}, which has {own}: that is "
                "taken."
            )
    arguments["num_heads"] = counts
