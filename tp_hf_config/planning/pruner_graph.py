"""Make the graph that a pruner prunes by, and adapt the pruner's arguments to it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..arguments import check
from ..errors import UnsupportedModelError, closest, listed, warn
from ..fieldmap.model_view import ModelView, view_of
from ..forward.run_recipe import MakeInputs
from ..graph.config_graph import ConfigGraph
from ..graph.layer_fields import fields_named
from ..graph.prunable import Width, note_on_states, note_on_unobserved
from ..graph.pruner_access import family
from ..graph.sides import ParameterView, channels_of, is_output
from ..model.config_json import field_name
from .selection import Chosen, Wanted, check_apart, check_ratios, choose
from .settings import PruneSettings, Target


def graph_for(
    arguments: dict[str, Any],
    settings: PruneSettings,
    make_inputs: MakeInputs | None,
    cheapest: bool,
) -> tuple[ConfigGraph, str]:
    """Return the graph that a pruner is to prune by, and for reports how it was proved.

    The pruner's ``arguments`` are adapted to the graph. ``cheapest``: see :class:`Wanted`.
    """
    model: nn.Module = arguments["model"]
    view = view_of(model, make_inputs)
    check_values(arguments)
    settings = replace(settings, round_to=arguments.get("round_to"))
    settings = settings.in_every_layer(fields_named(view.field_map))
    heads = bool(arguments.get("prune_num_heads") or settings.prune_num_heads)
    arguments["prune_num_heads"] = heads
    chosen, staying = _chosen(view, arguments, settings, cheapest)
    for message in staying:
        warn(message)
    graph = _graph_of(view, chosen)
    left_out = (f"{name} is kept: {reason}" for name, reason in chosen.left_out.items())
    graph.notes = [*staying, *left_out]
    why = f"config graph: {len(graph.graph_groups)} groups, each proved by permutation"
    why += note_on_unobserved([n for width in chosen.widths for n in width.unobserved_parameters])
    why += note_on_states(name for width in chosen.widths for name in width.encoder_states)
    why += f"; heads: {chosen.how}" if chosen.how else ""
    check_ratios(chosen, settings.ratios)
    by_layer: dict[Any, float] = {}
    names = {field_name(field): field for fields in graph.fields for field in fields}
    for name, ratio in settings.ratios.items():
        by_layer.update(dict.fromkeys(graph.roots_of(names[name]), ratio))
    ignored = (*_layers_outside(model, view.model), *(arguments.get("ignored_layers") or ()))
    arguments |= {
        "ignored_layers": list({id(layer): layer for layer in ignored}.values()),
        "pruning_ratio_dict": by_layer | (arguments.get("pruning_ratio_dict") or {}),
    }
    _adapt_arguments(view, graph, arguments)
    return graph, why


def _chosen(
    view: ModelView, arguments: Mapping[str, Any], settings: PruneSettings, cheapest: bool
) -> tuple[Chosen, list[str]]:
    """Return the widths to prune, and messages on those that only the arguments keep.

    If head dims cannot be pruned, they are kept, with a warning.
    """
    wanted, head_dims = _wanted_by(arguments, settings, cheapest), ""
    kept: dict[Width, str] = {}
    while True:  # another width may take the place of one that is kept
        try:
            wanted = replace(wanted, stays=[width.fields for width in kept])
            chosen = choose(view, wanted)
            now_kept = _kept(view, chosen, arguments)
            if not now_kept:
                check_apart(view, chosen)
        except UnsupportedModelError as error:
            nothing_else = wanted.fields == () and not wanted.heads
            # prune_head_dims is true by default, so the user may not have asked for it
            if not wanted.head_dims or nothing_else:
                raise
            wanted, head_dims = replace(wanted, head_dims=False), str(error)
            continue
        if not now_kept:
            break
        kept |= now_kept
    if head_dims:
        graph = _graph_of(view, chosen)
        names = (name for group in graph.graph_groups for name in graph.outputs_of(group))
        if not any(map(view.field_map.splits_of, names)):
            warn(f"prune_head_dims=True, but head dims are kept: {head_dims}")
    going = {field for width in chosen.widths for field in width.fields}
    messages = []
    for width, reason in kept.items():
        if not going >= set(width.fields):
            values = " + ".join(str(view.field_map.values[field]) for field in width.fields)
            messages.append(f"{width.name} is kept at {values}: {reason}")
    return chosen, messages


def _graph_of(view: ModelView, chosen: Chosen) -> ConfigGraph:
    groups = [group for width in chosen.widths for group in width.groups]
    heads = {width.fields for width in chosen.heads}
    make_inputs = view.field_map.recipe.make_inputs
    return ConfigGraph(view.model, groups, view.prefix, heads, make_inputs)


def _layers_outside(model: nn.Module, pretrained: nn.Module) -> list[nn.Module]:
    """Return a wrapper's own layers, which no config describes."""
    inside = set(pretrained.modules())
    return [
        module
        for module in model.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]


_WITHOUT_EFFECT = {
    "customized_pruners": "the graph cuts the parameters of every layer itself, and the hook "
    "updates the widths that a layer records",
    "unwrapped_parameters": "the graph knows which dimensions of bare parameters a config field "
    "sets",
    "forward_fn": "the graph is made without a forward pass",
}
# argument -> True if it constrains a layer's outputs, False for its inputs
_CONSTRAINTS = {"in_channel_groups": False, "out_channel_groups": True, "channel_groups": True}
_BY_LAYER = ("pruning_ratio_dict", "head_pruning_ratio_dict", "ch_sparsity_dict")
# the types of a pruner's arguments, as annotations
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


def check_values(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name in _VALUES:
            check(name, value, _VALUES[name])


def check_names(arguments: Iterable[str]) -> None:
    names = {
        name
        for cls in family()
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    } | {"hooks"}
    for name in arguments:
        if name not in names - {"self", "model"}:
            raise TypeError(f"no pruner takes {name}={closest(name, names)}")


def _adapt_arguments(view: ModelView, graph: ConfigGraph, arguments: dict[str, Any]) -> None:
    """Change a pruner's arguments so that they mean on a graph what they mean in Torch-Pruning."""
    for name, out in _CONSTRAINTS.items():
        _check_constraint(graph, name, arguments.get(name) or {}, out)
    unused = (message for name in _BY_LAYER for message in _adapt_ratios(graph, name, arguments))
    for message in (*_without_effect(graph, view, arguments), *unused):
        warn(message)
    _count_heads(view, arguments)


def _without_effect(
    graph: ConfigGraph, view: ModelView, arguments: Mapping[str, Any]
) -> Iterator[str]:
    for name, why in _WITHOUT_EFFECT.items():
        if arguments.get(name):
            yield f"{name}= has no effect on the graph made from the config: {why}. Leave it out."
    heads, ratio = bool(arguments.get("prune_num_heads")), _largest_head_ratio(arguments)
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
            + (
                f", and neither is {', '.join(others)}, which is pruned only with heads."
                if others
                else "."
            )
        )


def _check_constraint(
    graph: ConfigGraph, name: str, counts: Mapping[nn.Module, int], out: bool
) -> None:
    """Raise if the graph prunes apart what ``counts`` wants pruned together."""
    kinds = {
        type(layer).__name__
        for layer, count in counts.items()
        if not _together(graph, layer, count, out)
    }
    if kinds:
        layers = ", ".join(sorted(kinds))
        raise ValueError(
            f"{name}= (for {layers}) cannot be used with the graph made from the config: "
            "experiments find which channels of a layer have to be pruned together (fused layers, "
            "heads, grouped norms), and no others can be requested. Leave it out."
        )


def _together(graph: ConfigGraph, layer: nn.Module, count: int, out: bool) -> bool:
    """True if ``count`` equal runs of a layer's channels lose the same, or are one unit each."""
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


def _adapt_ratios(graph: ConfigGraph, name: str, arguments: dict[str, Any]) -> Iterator[str]:
    """Extend ratios by layer to the parameter views of these layers; yield what has no effect.

    Inside a named layer, Torch-Pruning finds only layers of types that it can prune. It would miss
    a ``Conv1D``, Transformers' own norms and stacked experts, which are views in the graph.
    """
    heads, given = name.startswith("head"), arguments.get(name) or {}
    groups = [graph_group for graph_group in graph.graph_groups if graph_group.heads is heads]
    ratios_of: list[dict[float, None]] = [{} for _ in groups]
    adapted: dict[Any, float] = {}
    idle: list[nn.Module] = []
    for key, ratio in given.items():
        named = key if isinstance(key, tuple) else (key,)
        inside = {module for layer in named for module in layer.modules()}
        sides = (side for module in inside for _, side in graph.sides_of(module))
        views = [s.module for s in sides if isinstance(s.module, ParameterView) and is_output(s)]
        layers = (*dict.fromkeys((*named, *views)),)
        # keys of head ratios are single layers, those of others may be tuples of layers
        adapted |= dict.fromkeys(layers if heads else [layers if layers != named else key], ratio)
        inside |= {*views}
        affected = [
            ratios
            for graph_group, ratios in zip(groups, ratios_of, strict=True)
            if graph_group.units in inside  # no outputs: ConfigGraph.roots_of names its units
            or any(side.module in inside and is_output(side) for side in graph_group.sides)
        ]
        for ratios in affected:
            ratios[ratio] = None
        if not affected:
            idle.append(named[0])
    if given:
        arguments[name] = adapted
    if idle:
        yield f"{name}= has no effect for {_names(graph, idle)}: {_why_idle(heads, arguments)}."
    for graph_group, ratios in zip(groups, ratios_of, strict=True):
        if len(ratios) > 1:
            fields = " + ".join(map(field_name, graph_group.fields))
            yield (
                f"{name}= has the ratios {', '.join(f'{ratio:g}' for ratio in ratios)} for layers "
                f"that lose the same channels ({fields}); Torch-Pruning uses the ratio of the "
                "first layer. Give them one ratio."
            )


def _why_idle(heads: bool, arguments: Mapping[str, Any]) -> str:
    if heads:
        return "its output is not split into attention heads that are being pruned"
    way = (
        " by pruning_ratio (heads have head_pruning_ratio)" if arguments["prune_num_heads"] else ""
    )
    return f"none of its output channels is pruned{way}"


def _names(graph: ConfigGraph, layers: Sequence[nn.Module]) -> str:
    names = {module: name for name, module in graph.pretrained.named_modules()}
    shown = [names.get(layer, type(layer).__name__) or type(layer).__name__ for layer in layers]
    return listed(shown)


def _count_heads(view: ModelView, arguments: dict[str, Any]) -> None:
    """Set ``num_heads`` to the heads that the model splits layers into; warn of other counts."""
    given = arguments.get("num_heads") or {}
    counts = {module: count for _, module, count in view.head_layers()}
    names = {module: name for name, module, _ in view.head_layers()}
    for module, count in given.items():
        if count != (own := counts.setdefault(module, count)):
            warn(
                f"num_heads= says {count} heads for {names[module]}, but it has {own}; {own} is "
                "used."
            )
    arguments["num_heads"] = counts


def _largest_head_ratio(arguments: Mapping[str, Any]) -> float:
    by_layer = (arguments.get("head_pruning_ratio_dict") or {}).values()
    return float(max([arguments.get("head_pruning_ratio") or 0.0, *by_layer]))


def _wanted_by(arguments: Mapping[str, Any], settings: PruneSettings, cheapest: bool) -> Wanted:
    named = cheapest or settings.prune is not None or settings.gqa is not None
    heads = bool(arguments.get("prune_num_heads"))
    # as in Torch-Pruning, heads need a ratio
    heads = heads and (named or _largest_head_ratio(arguments) > 0)
    # as in Torch-Pruning, head dims need layers in num_heads=
    dims = bool(arguments.get("prune_head_dims") and arguments.get("num_heads"))
    target = Target.of(settings.target)
    return Wanted(settings.prune, heads, settings.gqa, dims, cheapest=cheapest, target=target)


def _kept(view: ModelView, chosen: Chosen, arguments: Mapping[str, Any]) -> dict[Width, str]:
    """Return the widths that the pruner's arguments keep -> the reason."""
    types = tuple(arguments.get("root_module_types") or ())
    ignored = list(arguments.get("ignored_layers") or ())
    modules = [m for item in ignored if isinstance(item, nn.Module) for m in item.modules()]
    parameters = [item for item in ignored if isinstance(item, nn.Parameter)]
    graph = ConfigGraph(view.model, [group for width in chosen.widths for group in width.groups])
    graph.build_dependency(view.model, ignored_params=parameters)
    groups = iter(graph.graph_groups)
    result: dict[Width, str] = {}
    for width in chosen.widths:
        of_width = [next(groups) for _ in width.groups]
        every = [graph.refusal_of(graph_group, modules, types) for graph_group in of_width]
        # one field sets all groups of a width, so one kept group keeps all
        if refusals := [refusal for refusal in every if refusal is not None]:
            others = (
                ", and one config field sets this width everywhere"
                if len(refusals) < len(of_width)
                else ""
            )
            result[width] = f"{refusals[0].reason}{others}."
            continue
        layers = [graph.outputs_of(graph_group) for graph_group in of_width]
        reason = _why_heads_stay(view, width, layers, arguments)
        if reason is not None:
            result[width] = reason
    return result


def _why_heads_stay(
    view: ModelView, width: Width, layers: list[dict[str, nn.Module]], arguments: Mapping[str, Any]
) -> str | None:
    """Return why a width that changes attention heads is kept; ``None``: it may be pruned."""
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
        return f"pruning it would make the heads of {name} smaller, but prune_head_dims=False."
    named = arguments.get("num_heads") or {}
    missing = [group for group in split if group and not any(m in named for m in group.values())]
    if named and missing:
        return f"num_heads= does not name {next(iter(missing[0]))}."
    return None
