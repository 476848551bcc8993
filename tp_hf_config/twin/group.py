"""The groups of a tiny model, made equal in layers that are alike.

In a first layer all values may be equal (X-CLIP's messages between frames), so that the weights on
them do not matter. Units seem interchangeable there that are not in the layers behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..model.config_json import FieldPath
from .layout import Places, TensorDim, UnitLayout


@dataclass(frozen=True)
class TinyGroup:
    """Tensor dims that lose the same units, proved by permutation on the tiny model.

    Attributes:
        fields: the config fields that count its units.
        dims: its tensor dims, with names in the tiny model.
        sources: for each of them, the field that sets it; ``None``: the joint fields together.
        units: how many units it has in the tiny model.
        channel_groups: in how many equal runs of units a permutation has to stay (the dimensions of
            a head, the query heads of a key/value head); 1: all units are interchangeable.
        per_field_unit: how many of its units go with one unit of the fields (the channels of a
            residual stream that go with one attention head).
    """

    fields: tuple[FieldPath, ...]
    dims: tuple[TensorDim, ...]
    sources: tuple[FieldPath | None, ...]
    units: int
    channel_groups: int
    per_field_unit: int = 1


@dataclass(frozen=True)
class Finding:
    """A width of the tiny model: its groups, or why it cannot be pruned.

    Attributes:
        fields: the config fields that count its units.
        groups: its groups.
        reason: why it cannot be pruned; ``None``: it can.
        disproved: True if an experiment told its units apart.
        unobserved: True if no output depends on some of its tensor dims.
        told_apart: the tensor dims in which its units are told apart.
        minimum: the fewest units with which the class runs (a router that takes the best two
            experts needs two).
        unobserved_parameters: parameters that no output depends on, and that are in a group all the
            same.
        outward: True if an output is as wide.
        encoder_states: the inputs (encoder states) that lose the same units.
    """

    fields: tuple[FieldPath, ...]
    groups: tuple[TinyGroup, ...] = ()
    reason: str | None = None
    disproved: bool = False
    unobserved: bool = False
    told_apart: Places = frozenset()
    minimum: int = 1
    unobserved_parameters: tuple[str, ...] = ()
    outward: bool = False
    encoder_states: tuple[str, ...] = ()


_Kind = frozenset[tuple[str, int, UnitLayout]]
"""The tensor dims of a group (parameter, dimension, layout), without the numbers of layers."""


def as_in_like_layers(groups: Sequence[TinyGroup]) -> list[TinyGroup]:
    """Return the groups, as large and with as many channel groups as those of like layers.

    Groups of one layer that have together what one group of another layer has become one. Every old
    group was proved, and new ones allow no permutation that the old ones do not: they are proved
    too.
    """
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
    """Return, layer by layer, groups that have together what one group of another layer has."""
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
    """Return the finer groups, except where groups that are alike were not all refined alike.

    There the old ones stay: what only some of them show is chance.
    """
    kinds: dict[_Kind, set[tuple[int, int, int]]] = {}
    pairs = list(zip(groups, finer, strict=True))
    for group, other in pairs:
        parts = (other.units, other.channel_groups, other.per_field_unit)
        kinds.setdefault(_kind(group), set()).add(parts)
    return tuple(other if len(kinds[_kind(group)]) == 1 else group for group, other in pairs)


def _kind(group: TinyGroup) -> _Kind:
    """Return the tensor dims of a group, with ``*`` for the numbers of layers."""
    return frozenset(
        (re.sub(r"\.\d+(?=\.)", ".*", dim.name), dim.dim, dim.layout) for dim in group.dims
    )
