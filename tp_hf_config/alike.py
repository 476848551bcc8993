"""Groups of layers that are alike: none may do what another of them does not.

In a first layer values may be all the same (X-CLIP's messages between frames), so that what weighs
them matters not: units are interchangeable there that are not in the layers behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .twins import Layout

if TYPE_CHECKING:
    from .proofs import Group

_Kind = frozenset[tuple[str, int, Layout]]


def as_in_like_layers(groups: Sequence[Group]) -> list[Group]:
    """Groups as large, and of as many classes, as those of layers that are alike.

    Each was proved alone, so that they are proved together, and in fewer orders.
    """
    merged = list(groups)
    for kind in dict.fromkeys(map(_kind, groups)):
        for parts in _apart(merged, kind):
            dims = tuple(dim for group in parts for dim in group.dims)
            sources = tuple(source for group in parts for source in group.sources)
            most = max(group.classes for group in parts)
            if all(most % group.classes == 0 for group in parts):
                whole = replace(parts[0], dims=dims, sources=sources, classes=most)
                merged = [group for group in merged if group not in parts] + [whole]
    strictest: dict[_Kind, int] = {}
    for group in merged:
        kind = _kind(group)
        strictest[kind] = max(strictest.get(kind, 1), group.classes)
    classes = [strictest[_kind(group)] for group in merged]
    return [
        replace(group, classes=most) if most % group.classes == 0 else group
        for group, most in zip(merged, classes, strict=True)
    ]


def _apart(groups: Sequence[Group], kind: _Kind) -> list[list[Group]]:
    """Groups of one layer each that have together what one group of another layer has."""
    layers: dict[tuple[str, ...], list[Group]] = {}
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


def all_alike(groups: tuple[Group, ...], finer: tuple[Group, ...]) -> tuple[Group, ...]:
    """The finer groups, but where one of several that are alike is none: it shows too much."""
    kinds: dict[_Kind, set[tuple[int, int, int]]] = {}
    pairs = list(zip(groups, finer, strict=True))
    for group, other in pairs:
        parts = (other.units, other.classes, other.grain)
        kinds.setdefault(_kind(group), set()).add(parts)
    return tuple(other if len(kinds[_kind(group)]) == 1 else group for group, other in pairs)


def _kind(group: Group) -> _Kind:
    """A group's dimensions without the numbers of layers."""
    return frozenset(
        (re.sub(r"\.\d+(?=\.)", ".*", dim.name), dim.dim, dim.layout) for dim in group.dims
    )
