"""A dependency graph for Torch-Pruning, built from proved groups instead of a trace.

The pruner, importances, ranking and interactive steps remain Torch-Pruning's. The graph needs no
example inputs, forward pass or autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import _helpers, ops
from torch_pruning.dependency import Dependency, Node
from torch_pruning.pruner import function

from ..errors import UnsupportedModelError
from ..forward.run_recipe import MakeInputs
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.tensors import tensor
from .full_size import Group
from .sides import (
    UNITS,
    ConfigGroup,
    GraphGroup,
    ParameterView,
    Side,
    Units,
    channels_of,
    handler_of,
    is_output,
    is_vector,
    norms_of,
    owner_of,
    sides_of,
    units_of,
)

Place = tuple[str, int]  # name of a parameter or buffer, and a dimension


@dataclass
class _Prune:
    group: ConfigGroup  # as it was first pruned
    units: list[int]  # with their current indices
    in_history: bool  # True: add to Torch-Pruning's history


class RecordedPrunes:
    """The recorded prunes, one per dependency group."""

    def __init__(self, graph: ConfigGraph):
        self._graph = graph
        self._prunes: dict[int, _Prune] = {}  # by the id of the dependency group
        self._holding = 0
        self.settle: Callable[[], None] = self.refuse  # called after each prune; a hook cuts here

    def __bool__(self) -> bool:
        return bool(self._prunes)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Settle once at the end of ``with``: what is recorded inside is cut together."""
        self._holding += 1
        try:
            yield
        except BaseException:
            self.clear()
            raise
        finally:
            self._holding -= 1
        self._settle()

    def refuse(self) -> None:
        """Drop the recorded prunes and raise ``UnsupportedModelError``: no hook is attached."""
        self.clear()
        raise UnsupportedModelError(
            "this pruner uses the graph made from a config, but no HFConfigSyncHook is attached "
            "that would update the config. Call hook.register(pruner). Nothing was pruned."
        )

    def _settle(self) -> None:
        if self._prunes and not self._holding:
            self.settle()

    def add(self, group: ConfigGroup, in_history: bool) -> None:
        """Record a group and settle; raise ``ValueError`` if a unit is recorded already."""
        if not group.units:
            return
        graph_group = group.graph_group
        prune = self._prunes.get(id(graph_group)) or _Prune(group, [], in_history)
        again = sorted(set(prune.units).intersection(group.units))
        if again:
            raise ValueError(
                f"unit {again[0]} of {_name(graph_group)} is already recorded and not cut yet. "
                "Until it is cut, channels keep their present numbers. Prune other units, or first "
                "prune what hook.pending names"
            )
        prune.units += group.units
        self._prunes[id(graph_group)] = prune
        self._settle()

    def groups(self) -> list[ConfigGroup]:
        """Return one group per recorded prune, with current indices."""
        return [self._group(prune) for prune in self._prunes.values()]

    def clear(self) -> None:
        self._prunes.clear()

    def take(self) -> None:
        """Note each recorded group in the history, and remove its units from the graph."""
        prunes, self._prunes = [*self._prunes.values()], {}
        for prune in prunes:
            if prune.in_history:
                # with indices that are valid after the groups before it
                self._graph.note_in_history(self._group(prune))
            self._renumber(prune.group.graph_group, prune.units)

    def _renumber(self, graph_group: GraphGroup, units: list[int]) -> None:
        """Remove a group's units from the tables of its sides and of other groups' sides."""
        remaining = _others(torch.tensor(units), graph_group.units.count)
        tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for side in graph_group.sides:
            table = side.table
            if id(table) not in tables:  # most share one; stored, so that its id is not reused
                lost = table[units].flatten().sort().values
                tables[id(table)] = _moved_up(table[remaining], lost), lost, table
            side.table, lost, _ = tables[id(table)]
            for _, other in self._graph.sides_of(side.module):  # other channels of the same side
                if other is not side and other.module is side.module and other.out is side.out:
                    other.table = _moved_up(other.table, lost)
        graph_group.units.count -= len(units)

    def numbered_now(self, module: nn.Module, out: bool, channels: Sequence[int]) -> list[int]:
        """Convert channels that are numbered as after all recorded prunes to current indices."""
        sides = [
            (side, prune.units)
            for prune in self._prunes.values()
            for side in prune.group.graph_group.sides
            if side.module is module and side.out is out
        ]
        if not sides:
            return [*channels]
        lost = torch.cat([side.table[units].flatten() for side, units in sides])
        kept: list[int] = _others(lost, channels_of(sides[0][0]))[list(channels)].tolist()
        return kept

    def missing(self) -> list[str]:
        """Return the groups that lose a smaller share than another group of the same fields."""
        lost = {number: len(prune.units) for number, prune in self._prunes.items()}
        groups = self._graph.graph_groups
        shares = [(group, Fraction(lost.get(id(group), 0), group.units.count)) for group in groups]
        largest: dict[Any, Fraction] = {}
        for group, share in shares:
            largest[group.fields] = max(share, largest.get(group.fields, share))
        return [_name(group) for group, share in shares if share < largest[group.fields]]

    def _group(self, prune: _Prune) -> ConfigGroup:
        dep, graph = prune.group[0].dep, self._graph
        out = graph.is_out_channel_pruning_fn(dep.handler)
        return graph.group_from(prune.group.graph_group, prune.units, dep.target.module, out)


def _name(graph_group: GraphGroup) -> str:
    """Return a group's fields and the first layer whose outputs it cuts."""
    fields = " + ".join(map(field_name, graph_group.fields))
    sides = graph_group.sides
    return f"{fields} in {next(filter(is_output, sides), sides[0]).layer}"


def kept_positions(model: nn.Module, groups: Iterable[ConfigGroup]) -> dict[Place, Tensor]:
    """Return the kept positions (1-D) of every dimension that the groups cut."""
    tables: dict[Place, dict[tuple[int, int], Tensor]] = {}
    for group in groups:
        for side in group.graph_group.sides:
            for dim in side.dims:
                lost = tables.setdefault(dim.place, {})
                lost[id(group), id(side.table)] = side.table[group.units]
    kept: dict[Any, Tensor] = {}
    result: dict[Place, Tensor] = {}
    for place, lost in tables.items():
        size = tensor(model, place[0]).shape[place[1]]
        key = (*sorted(lost), size)  # dimensions with equal positions share one tensor
        if key not in kept:
            kept[key] = _others(torch.cat([table.flatten() for table in lost.values()]), size)
        result[place] = kept[key]
    return result


def _others(positions: Tensor, size: int) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[positions.flatten()] = False
    return stays.nonzero().flatten()


def _moved_up(positions: Tensor, lost: Tensor) -> Tensor:
    """Renumber positions after others, in increasing order, are removed."""
    return positions - torch.searchsorted(lost, positions)


class ConfigGraph(tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's dependency graph with the proved groups of a Hugging Face model."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        prefix: str = "",  # name of ``model`` inside the module that the pruner prunes
        heads: Collection[Any] = (),  # fields whose groups use the pruner's head ratios
        make_inputs: MakeInputs | None = None,
    ):
        super().__init__()
        self.make_inputs = make_inputs
        self.pretrained, self.prefix = model, prefix
        self.notes: list[str] = []  # for the first report
        self.replaced: dict[str, Any] = {}  # a pruner's attributes before it took this graph
        self.register_customized_layer(Units, UNITS)
        self.recorded = RecordedPrunes(self)
        self.choose: Callable[[], Any] = self.recorded.refuse  # a hook's choice of units
        self._views: dict[tuple[str, int], ParameterView] = {}
        self.graph_groups = [
            GraphGroup(
                group.fields,
                sides_of(model, group, self._views),
                group.count,
                Units(group.count.units),
                group.fields in heads,
            )
            for group in groups
        ]
        self._sides_of: dict[nn.Module, list[tuple[GraphGroup, Side]]] = {}
        for graph_group in self.graph_groups:
            for side in [*graph_group.ranked, *graph_group.sides]:
                for module in {side.module, owner_of(side.module)}:
                    self._sides_of.setdefault(module, []).append((graph_group, side))

    def build_dependency(self, model: nn.Module, *args: Any, **kwargs: Any) -> ConfigGraph:
        """Set up nodes and names for the groups. Torch-Pruning's constructor calls this."""
        self.model, self.verbose = model, False
        self.ignored_params: list[Any] = list(kwargs.get("ignored_params") or ())
        self._module2name = {module: name for name, module in model.named_modules()}
        self._param_to_name: dict[nn.Parameter, str] = {}
        self.unwrapped_parameters: list[Any] = []
        for (name, _), view in self._views.items():
            layer = name.rpartition(".")[0]
            self._module2name[view] = f"{self.prefix}.{layer}".strip(".")
        self.module2node = {
            side.module: Node(side.module, None, self._module2name.get(side.module))
            for graph_group in self.graph_groups
            for side in graph_group.sides
        }
        for number, graph_group in enumerate(self.graph_groups):
            units, fields = graph_group.units, " + ".join(map(field_name, graph_group.fields))
            self._module2name[units] = f"{fields}, group {number}"
            node = self.module2node[units] = Node(units, None, self._module2name[units])
            node.type = ops.OPTYPE.CUSTOMIZED
        return self

    def get_all_groups(
        self, ignored_layers: Sequence[nn.Module] = (), root_module_types: Any = None
    ) -> Iterator[ConfigGroup]:
        """Yield every group without ignored layers, with all of its units."""
        for graph_group in self.groups_to_prune(ignored_layers, root_module_types):
            yield self.group_at(graph_group, range(graph_group.units.count))

    def group_at(self, graph_group: GraphGroup, units: Iterable[int]) -> ConfigGroup:
        root = graph_group.root
        module, out = (graph_group.units, True) if root is None else (root.module, root.out)
        return self.group_from(graph_group, list(units), module, out)

    def groups_to_prune(
        self, ignored_layers: Sequence[nn.Module], root_module_types: Any = None
    ) -> Iterator[GraphGroup]:
        for graph_group in self.graph_groups:
            if self.refusal_of(graph_group, ignored_layers, root_module_types) is None:
                yield graph_group

    def refusal_of(
        self,
        graph_group: GraphGroup,
        ignored_layers: Sequence[nn.Module],
        root_module_types: Any = None,
    ) -> Refusal | None:
        """Return which argument of the pruner excludes a group; None if none does."""
        types = tuple(root_module_types or ())
        ignored = set(ignored_layers) | set(self.IGNORED_LAYERS_IN_TRACING)
        ignored_params = set(map(id, self.ignored_params))
        for side in graph_group.sides:
            if owner_of(side.module) in ignored and is_output(side):
                return Refusal(f"ignored_layers= keeps the outputs of {side.layer}")
            for name in (dim.name for dim in side.dims):
                if id(tensor(self.pretrained, name)) in ignored_params:
                    return Refusal(f"ignored_layers= keeps {name}")
        # Torch-Pruning's default types mean any type
        any_type = not types or {ops.TORCH_CONV, ops.TORCH_LINEAR} <= set(types)
        reads = graph_group.inward and any(isinstance(s.module, types) for s in graph_group.sides)
        if any_type or reads or any(self._is_root(side, types) for side in graph_group.sides):
            return None
        names = ", ".join(kind.__name__ for kind in types)
        layer = graph_group.sides[0].layer
        return Refusal(f"root_module_types= ({names}) does not include the type of {layer}")

    def sides_of(self, module: nn.Module) -> list[tuple[GraphGroup, Side]]:
        # a view is listed under itself and under its owner
        return list({id(pair[1]): pair for pair in self._sides_of.get(module, ())}.values())

    def outputs_of(self, graph_group: GraphGroup) -> dict[str, nn.Module]:
        sides = [side for side in graph_group.sides if is_output(side)]
        return {side.layer: owner_of(side.module) for side in sides}

    @property
    def fields(self) -> list[tuple[FieldPath, ...]]:
        return list(dict.fromkeys(graph_group.fields for graph_group in self.graph_groups))

    def roots_of(self, field: FieldPath) -> list[nn.Module]:
        """Return one key of ``pruning_ratio_dict`` per group: a layer with outputs, or units."""
        return [
            next((side.module for side in graph_group.sides if side.out), graph_group.units)
            for graph_group in self.graph_groups
            if field in graph_group.fields
        ]

    def _is_root(self, side: Side, types: tuple[type, ...]) -> bool:
        """True if a side is the output of a layer of these types; a view counts as linear."""
        reported = self.side_of(side.module, side.out)
        outputs = reported is not None and reported[1]
        plain = isinstance(side.module, types) and not is_vector(side.module)
        return outputs and (plain or isinstance(owner_of(side.module), types))

    def get_pruning_group(
        self, module: nn.Module, pruning_fn: Any, idxs: int | Sequence[int]
    ) -> ConfigGroup:
        """Return the group of a layer's or view's channels; of :class:`Units`: of the units."""
        channels = [int(idxs)] if isinstance(idxs, int) else [int(index) for index in idxs]
        out = self.is_out_channel_pruning_fn(pruning_fn)
        for graph_group in self.graph_groups:
            if graph_group.units is module:
                return self.group_from(graph_group, channels, module, True)
        both = out and self.is_in_channel_pruning_fn(pruning_fn)  # norms: one function for both
        for graph_group, side in self._sides_of.get(module, ()):
            reported = self.side_of(side.module, side.out) if side.module is not module else None
            fits = both or (side.out if reported is None else reported[1]) is out
            units = units_of(side, channels) if fits else None
            if units is not None:
                return self.group_from(graph_group, units, side.module, side.out)
        name = self._module2name.get(module, type(module).__name__)
        raise ValueError(
            f"{name}: these {'output' if out else 'input'} channels are not whole units of a group "
            "that a config can describe. tp_hf_config.prunable(model) lists the widths and their "
            "units."
        )

    def check_pruning_group(self, group: ConfigGroup) -> bool:
        """True if units remain and every channel group loses the same number."""
        graph_group = group.graph_group
        count, channel_groups = graph_group.units.count, graph_group.count.channel_groups
        if not group.units or len(group.units) >= count:
            return False
        size = count // channel_groups
        lost = [sum(unit // size == c for unit in group.units) for c in range(channel_groups)]
        return len(set(lost)) == 1

    def get_pruner_of_module(self, module: Any) -> Any:
        """Return Torch-Pruning's pruner of a layer; an unknown layer with a view is linear."""
        if isinstance(module, Units):
            return UNITS
        layer_pruner = super().get_pruner_of_module(module)
        if ops.module2type(module) == ops.OPTYPE.ELEMENTWISE and any(
            view.owner is module for view in self._views.values()
        ):
            return function.PrunerBox[ops.OPTYPE.LINEAR]
        return layer_pruner

    def load_pruning_history(self, pruning_history: Any) -> None:
        """Replay a history, which may name views as ``parameter#dimension``."""
        named = {self.history_name(view): view for view in self._views.values()}
        with self.recorded.held():
            for name, is_out, idxs in pruning_history:
                module = named[name] if name in named else self.model.get_submodule(name)
                channels = self.recorded.numbered_now(module, is_out, idxs)
                group = self.get_pruning_group(module, handler_of(module, is_out), channels)
                group.prune(record_history=False)
            self._pruning_history = pruning_history

    def side_of(self, module: nn.Module, out: bool) -> tuple[str, bool] | None:
        """Return a side's name for reports and whether it is an output; None for :class:`Units`."""
        if isinstance(module, Units):
            return None
        if not isinstance(module, ParameterView):
            return self._module2name[module], out
        if type(module.owner).__name__ == "Conv1D" and module.key == "weight":
            return self._module2name[module], module.dim == 1  # a transposed linear layer
        return self.history_name(module), True

    def note_in_history(self, group: ConfigGroup) -> None:
        """Append a group to Torch-Pruning's history, under one of its layers."""
        item = min(group, key=lambda item: _history_rank(item.dep.target.module))
        out = self.is_out_channel_pruning_fn(item.dep.handler)
        self._pruning_history.append(
            [self.history_name(item.dep.target.module), out, list(item.idxs)]
        )

    def layer_name(self, module: nn.Module) -> str:
        """Return the name of a layer, or of the layer behind a view; ``""`` for :class:`Units`."""
        return "" if isinstance(module, Units) else self._module2name[module]

    def history_name(self, module: nn.Module) -> str:
        name: str = self._module2name[module]
        if isinstance(module, ParameterView):
            return f"{name}.{module.key}#{module.dim}"
        return name

    def importance_of(self, group: ConfigGroup, importance: Any) -> Any:
        """Return the importance of a group's units, ``(units,)``; None if it has none."""
        if group.graph_group.root is not None:
            return importance(group)
        if not group.graph_group.ranked:  # an embedding whose output no layer reads
            return norms_of(group.graph_group, self.pretrained)
        side = group.graph_group.ranked[0]
        values = importance(self._channel_group(group.graph_group, side))
        # a unit of several channels (a head) gets their mean, as in Torch-Pruning
        return None if values is None else values.view(side.table.shape).mean(1)

    def _channel_group(self, graph_group: GraphGroup, root: Side) -> ConfigGroup:
        """Return all units of a group, with every channel of the root as an index of its own."""
        group = ConfigGroup(self, graph_group, range(graph_group.units.count), by_channel=True)
        width = root.table.shape[1]
        first = torch.tensor(group.units)[:, None] * width
        return self._fill(group, root, lambda n: first + torch.arange(n) * width // n)

    def group_from(
        self, graph_group: GraphGroup, units: Sequence[int], root: nn.Module, out: bool
    ) -> ConfigGroup:
        """Return the pruning group of some units; its first item is the side ``(root, out)``."""
        group = ConfigGroup(self, graph_group, units)
        of_units = Side(graph_group.units, True, torch.arange(graph_group.units.count)[:, None])
        sides = (of_units, *graph_group.sides)
        first = next(side for side in sides if side.module is root and side.out is out)
        labels = first.table[group.units, :1]
        return self._fill(group, first, lambda n: labels.expand(-1, n))

    def _fill(
        self, group: ConfigGroup, first: Side, roots: Callable[[int], torch.Tensor]
    ) -> ConfigGroup:
        """Add all sides; ``roots(n)``: root channels, ``(units, n)``, of ``n`` positions a unit."""
        rest = [side for side in group.graph_group.sides if side is not first]
        rest.sort(key=lambda side: is_vector(side.module))  # reports name the first one: a layer
        # the pruner ranks groups by their first item's source: each has a node of its own
        source = self.module2node[group.graph_group.units]
        indices: dict[int, tuple[list[int], list[int]]] = {}
        for side in (first, *rest):
            if id(side.table) not in indices:  # most sides of a group share one
                sorted_idxs, order = side.table[group.units].flatten().sort()
                # sorted here: some importances sort the indices, but not the roots beside them
                of_root = roots(side.table.shape[1]).flatten()[order]
                indices[id(side.table)] = sorted_idxs.tolist(), of_root.tolist()
            idxs, root_idxs = indices[id(side.table)]
            handler = handler_of(side.module, side.out)
            trigger = group[0].dep.handler if len(group) else handler
            dep = Dependency(trigger, handler, source, self.module2node[side.module])
            group._group.append(_helpers.GroupItem(dep, list(idxs)))
            group._group[-1].root_idxs = list(root_idxs)
        return group


def _history_rank(module: nn.Module) -> int:  # plain Torch-Pruning can replay layers only
    return 2 if isinstance(module, Units) else int(isinstance(module, ParameterView))
