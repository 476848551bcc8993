"""The positions of a group's units along dimensions of tensors, and a tiny model's groups.

Groups are made equal in layers that are alike. In a first layer all values may be equal (X-CLIP's
messages between frames), so that the weights on them do not matter. Then units seem interchangeable
that are not in later layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from ..fieldmap.layer_kinds import ModuleFacts
from ..model.config_json import FieldPath
from ..model.shapes import named_modules


@dataclass(frozen=True)
class UnitLayout:
    """Where the units of a width are along one tensor dim.

    The dimension consists of ``blocks`` equal blocks, and the units are divided among them. A block
    holds all of its units ``parts`` times, one part after the other. "Gate, then up" is one block
    of two parts. "Query, key and value of head 0, of head 1, ..." is one block per head, of three
    parts. "Value dims of head 0, its key dims, value dims of head 1, ..." has a gap behind every
    part.
    """

    parts: int = 1
    run: int = 1  # neighbouring positions that a unit takes in each part
    blocks: int = 1
    offset: int = 0  # positions before the first unit, which belong to something else
    gap: int = 0  # positions behind every part, which belong to something else

    def positions(self, unit: int, units: int) -> list[int]:
        block, place = divmod(unit, units // self.blocks)
        per_part = units // self.blocks * self.run + self.gap
        start = self.offset + block * self.parts * per_part + place * self.run
        return [start + part * per_part + i for part in range(self.parts) for i in range(self.run)]

    def table(self, units: int) -> Tensor:
        """Return the positions of every unit, shape ``(units, parts * run)``."""
        per_block = units // self.blocks
        per_part = per_block * self.run + self.gap
        unit = torch.arange(units)
        start = unit // per_block * self.parts * per_part + unit % per_block * self.run
        return start[:, None] + torch.tensor(self.positions(0, units))

    def permuted(self, units: int, order: Sequence[int]) -> Tensor:
        """Return the old position of every position's value; ``order``: the unit at each place."""
        table = self.table(units)
        return table[list(order)].flatten()[table.flatten().argsort()]

    @property
    def is_plain(self) -> bool:
        return self == UnitLayout(self.parts, self.run)


@cache
def positions_of(layout: UnitLayout, unit: int, units: int, device: torch.device) -> Tensor:
    return torch.tensor(layout.positions(unit, units), device=device)


def share_positions(layouts: Iterable[tuple[UnitLayout, int]]) -> bool:
    """True if two units take the same position; each layout is given with its number of units."""
    positions = torch.cat([layout.table(units).flatten() for layout, units in layouts])
    return bool(positions.bincount().max() > 1)


@dataclass(frozen=True)
class TensorDim:
    name: str
    dim: int
    layout: UnitLayout = UnitLayout()

    @property
    def layer(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def place(self) -> tuple[str, int]:
        return self.name, self.dim


# tensor dims in one layout each, with the field that sets them; None: the joint fields
Sources = Mapping[TensorDim, FieldPath | None]
Places = frozenset[tuple[str, int]]  # parameters and dimensions, without layouts


def places_of(dims: Collection[TensorDim]) -> Places:
    return frozenset(dim.place for dim in dims)


# tensor dims with the same units, the number of units, and the units that are removed
Removed = tuple[Sequence[TensorDim], int, Tensor]


def positions_left(
    shapes: Mapping[str, Sequence[int]], removed: Iterable[Removed]
) -> dict[str, dict[int, Tensor]]:
    """Return name -> dimension -> the positions that remain when units are removed."""
    stays: dict[str, dict[int, Tensor]] = {}
    for dims, units, lost in removed:
        for dim in (dim for dim in dims if dim.name in shapes):  # not encoder states
            every = torch.ones(shapes[dim.name][dim.dim], dtype=torch.bool)
            stay = stays.setdefault(dim.name, {}).setdefault(dim.dim, every)
            stay[dim.layout.table(units)[lost].flatten()] = False
    return {
        name: {axis: stay.nonzero().flatten() for axis, stay in by_axis.items()}
        for name, by_axis in stays.items()
    }


@dataclass(frozen=True)
class TinyGroup:
    """Tensor dims that lose the same units, proved by permutation on the tiny model."""

    fields: tuple[FieldPath, ...]  # the config fields that count its units
    dims: tuple[TensorDim, ...]
    sources: tuple[FieldPath | None, ...]  # of each dim, its field; None: the joint fields
    units: int  # in the tiny model
    # equal runs of units inside which units are interchangeable (the dimensions of a head, the
    # query heads of a key/value head); 1: all units are
    channel_groups: int
    per_field_unit: int = 1  # its units for one unit of the fields (channels for one head)


@dataclass(frozen=True)
class Finding:
    """A width of the tiny model: its groups, or why it cannot be pruned."""

    fields: tuple[FieldPath, ...]
    groups: tuple[TinyGroup, ...] = ()
    reason: str | None = None  # why it cannot be pruned; None: it can
    disproved: bool = False  # an experiment shows that its units are not interchangeable
    unobserved: bool = False  # no output depends on some of its tensor dims
    told_apart: Places = frozenset()  # where its units are distinguishable
    minimum: int = 1  # units with which the class runs: a router of the best two experts needs two
    unobserved_parameters: tuple[str, ...] = ()  # in a group, though no output depends on them
    outward: bool = False  # an output is as wide
    encoder_states: tuple[str, ...] = ()  # inputs that lose the same units


# the dims of a group (parameter, dimension, layout), with ``*`` for the numbers of layers
_Kind = frozenset[tuple[str, int, UnitLayout]]


def as_in_like_layers(groups: Sequence[TinyGroup]) -> list[TinyGroup]:
    """Return the groups, as large and with as many channel groups as those of like layers."""
    # still proved: every old group is, and no new one allows a permutation that an old one does not
    merged = list(groups)
    for kind in dict.fromkeys(map(_kind, groups)):
        for parts in _in_parts(merged, kind):
            dims = tuple(dim for group in parts for dim in group.dims)
            sources = tuple(source for group in parts for source in group.sources)
            most = max(group.channel_groups for group in parts)
            if all(most % group.channel_groups == 0 for group in parts):
                whole = replace(parts[0], dims=dims, sources=sources, channel_groups=most)
                merged = [group for group in merged if group not in parts] + [whole]
    strictest: dict[_Kind, int] = {}
    for group in merged:
        kind = _kind(group)
        strictest[kind] = max(strictest.get(kind, 1), group.channel_groups)
    return [
        replace(group, channel_groups=most) if most % group.channel_groups == 0 else group
        for group in merged
        for most in (strictest[_kind(group)],)
    ]


def _in_parts(groups: Sequence[TinyGroup], kind: _Kind) -> list[list[TinyGroup]]:
    """Return, for each layer, groups that together have the dims of one group of another layer."""
    layers: dict[tuple[str, ...], list[TinyGroup]] = {}
    for group in groups:
        numbers = {tuple(re.findall(r"\.(\d+)(?=\.)", dim.name)) for dim in group.dims}
        if len(numbers) == 1 and _kind(group) < kind:
            layers.setdefault(numbers.pop(), []).append(group)
    return [
        parts
        for parts in layers.values()
        if len(parts) > 1
        and sum(len(group.dims) for group in parts) == len(kind)
        and frozenset().union(*map(_kind, parts)) == kind
    ]


def all_alike(groups: tuple[TinyGroup, ...], finer: tuple[TinyGroup, ...]) -> tuple[TinyGroup, ...]:
    """Return the finer groups, except those that were not refined alike in all like layers."""
    kinds: dict[_Kind, set[tuple[int, int, int]]] = {}
    pairs = list(zip(groups, finer, strict=True))
    for group, other in pairs:
        parts = (other.units, other.channel_groups, other.per_field_unit)
        kinds.setdefault(_kind(group), set()).add(parts)
    return tuple(other if len(kinds[_kind(group)]) == 1 else group for group, other in pairs)


def in_parts_alike(
    model: nn.Module, groups: Sequence[TinyGroup], unused: Sequence[TensorDim]
) -> tuple[list[TinyGroup], list[TensorDim]]:
    """Add the dims of unused parts to groups of like parts; return groups and dims left over."""
    # no token is routed to most of NLLB-MoE's experts; parts of one list with equal class, tensors
    # and settings compute the same function of their weights
    by_part: dict[str, list[TensorDim]] = {}
    for dim in unused:
        by_part.setdefault(_part_of_list(model, dim.name), []).append(dim)
    merged, remaining = list(groups), list[TensorDim]()
    for part, dims in by_part.items():
        like = (
            other
            for other in _parts_of_same_list(model, part)
            if other not in by_part and _facts(model, other) == _facts(model, part)
        )
        added = (_as_in(merged, other, part, dims) for other in like)
        extended = next((candidate for candidate in added if candidate is not None), None)
        if extended is None:
            remaining += dims
        else:
            merged = extended
    return merged, remaining


def _part_of_list(model: nn.Module, name: str) -> str:
    """Return the innermost item of a list of modules that holds a parameter, or an empty string."""
    part = name.rpartition(".")[0]
    while part:
        above = part.rpartition(".")[0]
        if isinstance(model.get_submodule(above), (nn.ModuleList, nn.ModuleDict)):
            return part
        part = above
    return ""


def _parts_of_same_list(model: nn.Module, part: str) -> list[str]:
    above = part.rpartition(".")[0]
    children = model.get_submodule(above).named_children() if part else ()
    return [f"{above}.{key}" for key, _ in children]


def _facts(model: nn.Module, part: str) -> dict[str, dict[str, Hashable]]:
    facts = ModuleFacts()
    return {name: facts.of(module) for name, module in named_modules(model.get_submodule(part))}


def _as_in(
    groups: Sequence[TinyGroup], like: str, part: str, dims: Sequence[TensorDim]
) -> list[TinyGroup] | None:
    """Return the groups with a part's dims as a like part has them; None: that one has others."""
    result: list[TinyGroup] = []
    placed: set[tuple[str, int]] = set()
    for group in groups:
        pairs = list(zip(group.dims, group.sources, strict=True))
        added = [
            (replace(dim, name=f"{part}.{dim.name.removeprefix(f'{like}.')}"), source)
            for dim, source in pairs
            if dim.name.startswith(f"{like}.")
        ]
        placed |= {dim.place for dim, _ in added}
        if len(added) in (0, len(pairs)):
            result.append(group)  # a group inside the like part is kept, and the part gets its own
            pairs = []
        if added:
            new_dims, sources = zip(*pairs, *added, strict=True)
            result.append(replace(group, dims=new_dims, sources=sources))
    return result if placed == places_of(dims) else None


def _kind(group: TinyGroup) -> _Kind:
    return frozenset(
        (re.sub(r"\.\d+(?=\.)", ".*", dim.name), dim.dim, dim.layout) for dim in group.dims
    )
