"""Prunes that are recorded and not cut yet; the model is unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..model.config_json import field_name
from ..model.tensors import tensor
from .sides import ConfigGroup, GraphGroup, channels_of, is_output

Place = tuple[str, int]  # name of a parameter or buffer, and a dimension


@dataclass
class _Prune:
    graph_group: GraphGroup
    root: nn.Module  # the layer that was pruned
    out: bool  # True: the root's outputs
    units: list[int]  # with their current indices
    in_history: bool  # True: add to Torch-Pruning's history


class RecordedPrunes:
    """The recorded prunes, one per dependency group."""

    def __init__(self, graph: Any):
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
        dep, graph_group = group[0].dep, group.graph_group
        root = dep.target.module, self._graph.is_out_channel_pruning_fn(dep.handler)
        prune = self._prunes.get(id(graph_group)) or _Prune(graph_group, *root, [], in_history)
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
        sizes: dict[Place, int] = {}
        for prune in prunes:
            if prune.in_history:
                # with indices that are valid after the groups before it
                self._graph.note_in_history(self._group(prune))
            self._renumber(prune, sizes)

    def _renumber(self, prune: _Prune, sizes: dict[Place, int]) -> None:
        """Remove a group's units from the tables of its sides and of other groups' sides."""
        tables: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        graph_group, lost = prune.graph_group, prune.units
        for side in graph_group.sides:
            place, table = side.dims[0].place, side.table
            size = sizes.get(place) or _size(self._graph.pretrained, place)
            if (
                id(table),
                size,
            ) not in tables:  # most share one; stored, so that its id is not reused
                kept = _others(table[lost], size)
                units = _others(torch.tensor(lost), len(table))
                tables[id(table), size] = torch.searchsorted(kept, table[units]), kept, table
            side.table, kept, _ = tables[id(table), size]
            sizes[place] = len(kept)
            for other in self._graph.other_sides_of(side):
                other.table = torch.searchsorted(kept, other.table)
        graph_group.units.count -= len(lost)

    def numbered_now(self, module: nn.Module, out: bool, channels: Sequence[int]) -> list[int]:
        """Convert channels that are numbered as after all recorded prunes to current indices."""
        sides = [
            (side, prune.units)
            for prune in self._prunes.values()
            for side in prune.graph_group.sides
            if side.module is module and side.out is out
        ]
        if not sides:
            return [*channels]
        stays = torch.ones(channels_of(sides[0][0]), dtype=torch.bool)
        for side, units in sides:
            stays[side.table[units].flatten()] = False
        kept: list[int] = stays.nonzero().flatten()[list(channels)].tolist()
        return kept

    def missing(self) -> list[str]:
        """Return the groups that lose a smaller share than another group of the same fields."""
        largest: dict[Any, Fraction] = {}
        for prune in self._prunes.values():
            fields = prune.graph_group.fields
            largest[fields] = max(largest.get(fields, Fraction(0)), self._share(prune.graph_group))
        return [
            _name(graph_group)
            for graph_group in self._graph.graph_groups
            if self._share(graph_group) < largest.get(graph_group.fields, 0)
        ]

    def _share(self, graph_group: GraphGroup) -> Fraction:
        prune = self._prunes.get(id(graph_group))
        return Fraction(0 if prune is None else len(prune.units), graph_group.units.count)

    def _group(self, prune: _Prune) -> ConfigGroup:
        group: ConfigGroup = self._graph.group_from(
            prune.graph_group, prune.units, prune.root, prune.out
        )
        return group


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
        size = _size(model, place)
        key = (*sorted(lost), size)  # dimensions with equal positions share one tensor
        if key not in kept:
            kept[key] = _others(torch.cat([table.flatten() for table in lost.values()]), size)
        result[place] = kept[key]
    return result


def _size(model: nn.Module, place: Place) -> int:
    return tensor(model, place[0]).shape[place[1]]


def _others(positions: Tensor, size: int) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[positions.flatten()] = False
    return stays.nonzero().flatten()
