"""What a pruner's arguments mean on the graph made from the config, which is not traced."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .asked import some_head_ratio
from .choice import check_share, closest
from .errors import PrunerSettingsWarning
from .graph import ConfigGraph
from .pruners import family
from .reference import field_name
from .views import ParameterView, channels_of, is_output
from .widths import WidthView

_NO_TRACE = (
    "Leave it out, or have Torch-Pruning trace the model: pruner_kwargs(model, graph='trace')."
)
_WITHOUT_EFFECT = {
    "customized_pruners": "it cuts the parameters of every layer by itself, and what a layer "
    "notes of its widths follows",
    "unwrapped_parameters": "it knows which dimensions of bare parameters follow a config field",
    "forward_fn": "no forward pass is run to make it",
}
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
    "output_transform",
)
"""The arguments of a pruner that the model has a say in, where the graph is not traced."""
NEEDED = (
    "prune_num_heads",
    "prune_head_dims",
    "num_heads",
    "out_channel_groups",
    "ignored_layers",
    "unwrapped_parameters",
    "pruning_ratio_dict",
    "round_to",
    "iterative_pruning_ratio_scheduler",
)
"""The arguments without which a pruner does something else than ``pruner_kwargs`` was asked for."""
_RATIOS = ("pruning_ratio", "head_pruning_ratio", "max_pruning_ratio", "ch_sparsity")
_LISTED = 3
_BY_LAYER = ("pruning_ratio_dict", "head_pruning_ratio_dict", "ch_sparsity_dict")


def warn(message: str) -> None:
    """Warn whoever called into the package, through Torch-Pruning's constructor or not."""
    package, depth, frame = __name__.partition(".")[0], 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        package,
        "contextlib",
        "functools",
        "torch_pruning",
    ):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, PrunerSettingsWarning, stacklevel=depth)


def check_ratios(arguments: Mapping[str, Any]) -> None:
    """Every ratio is a share.

    Raises:
        ValueError: one is not.
    """
    for name in _RATIOS:
        check_share(name, arguments.get(name))
    for name in _BY_LAYER:
        for ratio in (arguments.get(name) or {}).values():
            check_share(name, ratio)


def check_names(arguments: Iterable[str]) -> None:
    """Refuse arguments that no pruner has.

    Raises:
        TypeError: there is one.
    """
    known = {
        name
        for cls in family()
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    } | {"hooks"}
    for name in arguments:
        if name not in known - {"self", "model"}:
            raise TypeError(f"pruner_kwargs: no pruner takes {name}={closest(name, known)}")


def check_handed(handed: Mapping[str, Any], arguments: Mapping[str, Any], traced: bool) -> None:
    """Compare what a pruner gets with what ``pruner_kwargs`` handed out for it; warn of less.

    Raises:
        ValueError: heads are to be pruned that the graph was not made for, or the reverse.
    """
    got, made_for = arguments.get("prune_num_heads"), handed.get("prune_num_heads")
    if made_for is not None and bool(got) is not bool(made_for):
        raise ValueError(
            f"prune_num_heads={got}, but pruner_kwargs made its arguments for "
            f"prune_num_heads={made_for}. Tell it: pruner_kwargs(model, prune_num_heads={got})"
        )
    names = NEEDED if traced else ("pruning_ratio_dict", "round_to")
    lost = [name for name in names if name in handed and _less(handed[name], arguments.get(name))]
    for name in lost:
        warn(
            f"{name}= is not what pruner_kwargs gave, and keeps less of what the model needs. Give "
            f"yours to it, which puts both together: pruner_kwargs(model, {name}=...)"
        )


def _less(handed: Any, got: Any) -> bool:
    """Whether an argument holds less than one that was handed out."""
    if isinstance(handed, Mapping):
        mine = got if isinstance(got, Mapping) else {}
        return any(key not in mine or mine[key] != value for key, value in handed.items())
    if isinstance(handed, list):  # of layers, or of parameters with a dimension each
        held = {id(one[0] if isinstance(one, tuple) else one) for one in got or ()}
        return any(id(one[0] if isinstance(one, tuple) else one) not in held for one in handed)
    if isinstance(handed, int) and not isinstance(handed, bool):
        return not got or got % handed != 0
    return bool(handed is not None and got != handed)


def unwrapped_in(given: Any) -> list[tuple[nn.Parameter, int]]:
    """Bare parameters and their dimensions: Torch-Pruning takes a list and a dict of them."""
    return list(given.items() if isinstance(given, Mapping) else given or ())


def settle(view: WidthView, graph: ConfigGraph, arguments: dict[str, Any]) -> None:
    """Make a pruner's arguments mean on a graph what they mean in Torch-Pruning; warn where not.

    Raises:
        ValueError: channels shall go together that the graph has apart.
    """
    for name, out in _CONSTRAINTS.items():
        _check_constraint(graph, name, arguments.get(name) or {}, out)
    for name in _BY_LAYER:
        if arguments.get(name):
            arguments[name] = _with_views(graph, arguments[name], name.startswith("head"))
    for message in (*_without_effect(arguments), *_unused(graph, arguments)):
        warn(message)
    _count_heads(view, arguments)


def _without_effect(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, why in _WITHOUT_EFFECT.items():
        if arguments.get(name):
            yield f"{name}= has no effect on the graph made from the config: {why}. {_NO_TRACE}"
    heads, ratio = bool(arguments.get("prune_num_heads")), some_head_ratio(arguments)
    if ratio and not heads:
        yield (
            f"head_pruning_ratio={ratio:g} has no effect without prune_num_heads=True, as in "
            "Torch-Pruning: no heads are pruned."
        )
    elif heads and not ratio:
        yield (
            "prune_num_heads=True has no effect without head_pruning_ratio=, as in Torch-Pruning: "
            "no heads are pruned."
        )


def _check_constraint(
    graph: ConfigGraph, name: str, counts: Mapping[nn.Module, int], out: bool
) -> None:
    """Channels that shall go together do, or none of them goes."""
    odd = {layer for layer, count in counts.items() if not _together(graph, layer, count, out)}
    if odd:
        layers = ", ".join(sorted({type(layer).__name__ for layer in odd}))
        raise ValueError(
            f"{name}= (for {layers}) on the graph made from the config: which channels of a "
            "layer go together (fused layers, heads, grouped norms) it knows by experiment, "
            f"and others cannot be asked for. {_NO_TRACE}"
        )


def _together(graph: ConfigGraph, layer: nn.Module, count: int, out: bool) -> bool:
    """Whether a layer loses the same channels of each of so many equal runs, or whole runs."""
    for coupled, side in graph.sides_of(layer):
        channels, table = channels_of(side), side.table
        if is_output(side) is not out or channels == count * table.shape[1]:
            continue
        if channels % count:
            return False
        units = torch.arange(len(table)) % (coupled.units.count // coupled.classes)
        labels = torch.full((channels,), -1)  # the same units go of every class
        labels[table] = units[:, None].expand_as(table)
        runs = labels.view(count, -1)
        if not (runs == runs[0]).all():
            return False
    return True


def _with_views(graph: ConfigGraph, ratios: Mapping[Any, float], single: bool) -> dict[Any, float]:
    """Ratios by layer, that count as well for what Torch-Pruning does not know as layers.

    It looks for the layers of types that it can prune inside those that are named; a ``Conv1D``, a
    norm of Transformers' own or stacked experts the graph shows it as views.

    Args:
        graph: the graph.
        ratios: by layers, or tuples of them, which are ranked together.
        single: only layers may be keys.
    """
    result: dict[Any, float] = {}
    for key, ratio in ratios.items():
        named = key if isinstance(key, tuple) else (key,)
        inside = {module for one in named for module in one.modules()}
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
    """Ratios of layers that decide nothing, and those of which only one can."""
    for name in _BY_LAYER:
        heads = name.startswith("head")
        mine = [coupled for coupled in graph.coupled if coupled.heads is heads]
        taken: dict[int, list[float]] = {}
        idle: list[Any] = []
        for key, ratio in (arguments.get(name) or {}).items():
            named = key if isinstance(key, tuple) else (key,)
            inside = {module for one in named for module in one.modules()}
            found = [
                coupled
                for coupled in mine
                if coupled.units in inside  # inputs alone: the library's own ratios name them so
                or any(side.module in inside and is_output(side) for side in coupled.sides)
            ]
            for coupled in found:
                taken.setdefault(id(coupled), []).append(ratio)
            if not found:
                idle.append(named[0])
        if idle:
            yield f"{name}= has no effect for {_some(graph, idle)}: {_why_idle(heads, arguments)}."
        for coupled in mine:
            several = list(dict.fromkeys(taken.get(id(coupled), ())))
            if len(several) > 1:
                fields = " + ".join(map(field_name, coupled.fields))
                yield (
                    f"{name}= has the ratios {', '.join(f'{one:g}' for one in several)} for layers "
                    f"that lose the same channels ({fields}); Torch-Pruning takes that of the "
                    "first of them. Give them one ratio."
                )


def _why_idle(heads: bool, arguments: Mapping[str, Any]) -> str:
    if heads:
        return "no heads that are pruned are split out of what it puts out"
    along = (
        " by pruning_ratio (heads follow the head ratios)" if arguments["prune_num_heads"] else ""
    )
    return f"nothing that it puts out is pruned{along}"


def _some(graph: ConfigGraph, layers: Sequence[nn.Module]) -> str:
    names = {module: name for name, module in graph.pretrained.named_modules()}
    shown = [names.get(layer, type(layer).__name__) or type(layer).__name__ for layer in layers]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more


def _count_heads(view: WidthView, arguments: dict[str, Any]) -> None:
    """Numbers of heads are what the model splits its layers into."""
    given = arguments.get("num_heads") or {}
    own = {module: (name, count) for name, module, count in view.head_layers()}
    for module, count in given.items():
        name, right = own.get(module, ("", count))
        if count != right:
            warn(f"num_heads= says {count} heads for {name}, which has {right}: that is taken.")
    arguments["num_heads"] = {module: count for module, (_, count) in own.items()} | {
        module: own.get(module, ("", count))[1] for module, count in given.items()
    }
