"""Private parts of Torch-Pruning's pruners that this library uses, and pruners' constructors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch_pruning as tp
from torch import Tensor, nn

if TYPE_CHECKING:  # importing torch_pruning imports this module, and should stay fast
    from .config_graph import ConfigGraph
    from .sides import ConfigGroup

BasePruner: Any = tp.pruner.BasePruner


class Graph(Protocol):
    """The private members of ``DependencyGraph`` that are used; public ones are ``Any``."""

    _module2name: dict[nn.Module, str]  # names in messages, and of scopes

    def __getattr__(self, name: str) -> Any: ...


class Pruner(Protocol):
    """The private members of ``BasePruner`` that are used; public ones are ``Any``."""

    DG: Graph
    _layer_to_scope: dict[nn.Module, tuple[str, Any]]  # from ``pruning_ratio_dict``
    _scope_initial_channels: dict[str, int]  # ratios are relative to these

    def _check_pruning_ratio(self, group: Any) -> bool: ...  # applies max_pruning_ratio

    def _prune(self) -> Iterator[Any]: ...  # replaced: units are chosen instead of channels

    def __getattr__(self, name: str) -> Any: ...


class Importance(Protocol):
    """The private members of an importance of groups that are used; public ones are ``Any``."""

    def _reduce(self, values: list[Tensor], roots: list[Any]) -> Tensor: ...  # of several layers

    def _normalize(self, values: Tensor, normalizer: Any) -> Tensor: ...  # of a group

    def __getattr__(self, name: str) -> Any: ...


# arguments of ``BasePruner`` that a pruner stores unchanged
_KEPT = (
    "model",
    "importance",
    "global_pruning",
    "pruning_ratio",
    "max_pruning_ratio",
    "iterative_steps",
    "round_to",
    "isomorphic",
    "prune_num_heads",
    "prune_head_dims",
    "head_pruning_ratio",
    "root_module_types",
)
_SCOPE = "_User_Defined_Scope_"


def family(cls: Any = BasePruner) -> Iterator[Any]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from family(subclass)


def scope_of(pruner: Pruner, group: ConfigGroup) -> tuple[str, tuple[float, ...]]:
    """Return a group's ranking scope and its ratios from step 0 on."""
    graph_group = group.graph_group
    # as in BasePruner._prune (base_pruner.py, 1.6.1), except for whole heads
    if graph_group.heads:
        return f"heads: {pruner.DG._module2name[graph_group.units]}", _head_ratios(pruner, group)
    for dep, _ in group:
        for node, function in ((dep.source, dep.trigger), (dep.target, dep.handler)):
            scope = pruner._layer_to_scope.get(node.module)
            if scope is not None and pruner.DG.is_out_channel_pruning_fn(function):
                given = pruner.pruning_ratio_dict.get(node.module, pruner.per_step_pruning_ratio)
                return scope[0], _at_most(given, pruner.max_pruning_ratio)
    ratios = tuple(pruner.per_step_pruning_ratio)
    if pruner.isomorphic:
        kinds = (
            f"{type(item.dep.source.module).__name__} {type(item.dep.target.module).__name__} "
            f"{pruner.DG.is_out_channel_pruning_fn(item.dep.handler)}"
            for item in group
        )
        return "isomorphic: " + ", ".join(kinds), ratios
    if pruner.global_pruning:
        return "global", ratios
    return pruner.DG._module2name[group[0].dep.source.module], ratios


def _head_ratios(pruner: Pruner, group: ConfigGroup) -> tuple[float, ...]:
    if not pruner.prune_num_heads:
        return (0.0,) * len(pruner.per_step_head_pruning_ratio)
    by_module = pruner.head_pruning_ratio_dict
    modules = (side.module for side in group.graph_group.sides)
    # an entry of head_pruning_ratio_dict has priority
    own = next((by_module[m] for m in modules if m in by_module), None)
    return _at_most(own or pruner.per_step_head_pruning_ratio, pruner.max_pruning_ratio)


def _at_most(ratios: Sequence[float], most: float) -> tuple[float, ...]:
    return tuple(min(ratio, most) for ratio in ratios)


def cannot_replace_trace(pruner: Any, constructor: Callable[..., Any]) -> str | None:
    """Return why the graph of a pruner with a trace cannot be replaced; None if it can."""
    if pruner.current_step or pruner.DG.pruning_history():
        return "the pruner has already pruned with that trace"
    written_in = getattr(constructor, "__globals__", {}).get("__name__", "")
    if written_in.partition(".")[0] != tp.__name__:
        return f"the constructor of {type(pruner).__name__} may have stored groups of that trace"
    return None


def arguments_of(pruner: Any) -> dict[str, Any]:
    """Return the arguments that an unused pruner got, without those that only a trace reads."""
    inside = set(pruner.model.modules())

    # without values that the constructor adds, and layers of other pruners (shared default dicts)
    def own(counts: Mapping[Any, int], method: str, added: Mapping[Any, int]) -> dict[Any, int]:
        return {
            layer: count
            for layer, count in counts.items()
            if layer in inside
            and added.get(layer) != count
            and getattr(pruner.DG.get_pruner_of_module(layer), method)(layer) != count
        }

    return {
        **{name: getattr(pruner, name) for name in _KEPT},
        "example_inputs": None,
        "ignored_layers": [*pruner.ignored_layers, *pruner.ignored_params],
        "num_heads": {m: n for m, n in pruner.num_heads.items() if m in inside},
        "in_channel_groups": own(pruner.in_channel_groups, "get_in_channel_groups", {}),
        "out_channel_groups": own(
            pruner.out_channel_groups, "get_out_channel_groups", pruner.num_heads
        ),
        "pruning_ratio_dict": _ratios_by_layer(pruner),
        "head_pruning_ratio_dict": {
            layer: steps[-1] for layer, steps in pruner.head_pruning_ratio_dict.items()
        },
        "customized_pruners": dict(pruner.DG.CUSTOMIZED_PRUNERS),
    }


def _ratios_by_layer(pruner: Pruner) -> dict[Any, float]:
    """Return ``pruning_ratio_dict`` as the user gave it: layers, or tuples of layers, as keys."""
    scopes: dict[int, tuple[Any, float]] = {}
    for layer, (name, scope) in pruner._layer_to_scope.items():
        number = int(name.removeprefix(_SCOPE).partition("_")[0])
        key = scope if isinstance(scope, tuple) else scope[0]
        scopes[number] = key, pruner.pruning_ratio_dict[layer][-1]
    return dict(scopes[number] for number in sorted(scopes))


def constructor_with(graph: Any) -> Callable[..., None]:
    """Return ``BasePruner``'s constructor, changed to use ``graph`` instead of a trace."""
    # the constructor reads dependency.DependencyGraph from its module's globals, as do other
    # threads: this copy gets globals of its own
    own: Any = inspect.unwrap(BasePruner.__init__)
    names = {**own.__globals__, "dependency": SimpleNamespace(DependencyGraph=lambda: graph)}
    taking = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    taking.__kwdefaults__ = own.__kwdefaults__
    return taking


def replace_graph(pruner: Any, graph: ConfigGraph, arguments: Mapping[str, Any]) -> None:
    """Construct a pruner again with ``graph`` instead of its trace, and :func:`arguments_of`."""
    before = dict(vars(pruner))
    try:
        schedule = pruner.iterative_pruning_ratio_scheduler
        constructor_with(graph)(pruner, **arguments, iterative_pruning_ratio_scheduler=schedule)
        for name in ("per_step_pruning_ratio", "per_step_head_pruning_ratio"):
            setattr(pruner, name, before[name])
        for name in ("pruning_ratio_dict", "head_pruning_ratio_dict"):
            # layer -> ratio after each step; the constructor takes the last
            getattr(pruner, name).update(before[name])
        if hasattr(pruner, "update_regularizer"):  # GroupNormPruner and others store groups
            pruner.update_regularizer()
    except BaseException:
        vars(pruner).update(before)
        raise
    graph.replaced = {
        name: value for name, value in before.items() if vars(pruner)[name] is not value
    }


def restore_trace(pruner: Any) -> None:
    """Undo :func:`replace_graph`, unless the pruner has pruned since."""
    if not pruner.current_step and not pruner.DG.pruning_history():
        vars(pruner).update(pruner.DG.replaced)
