"""Groups of layers that are alike: none may do what another of them does not.

In a first layer values may be all the same (X-CLIP's messages between frames), so that what weighs
them matters not: units are interchangeable there that are not in the layers behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from .reference import shapes
from .twins import Dim, Layout

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


def in_parts_alike(
    model: nn.Module, groups: Sequence[Group], unused: Sequence[Dim]
) -> tuple[list[Group], list[Dim]]:
    """Put dimensions of parts that nothing goes through where those of like parts are.

    No token goes to most of NLLB-MoE's experts.  Parts of one list that are of one class, with the
    same tensors and settings, compute the same of their weights, whether a token goes to them or
    not.

    Returns:
        The groups, and the dimensions that are in no such part.
    """
    by_part: dict[str, list[Dim]] = {}
    for dim in unused:
        by_part.setdefault(_part_of_list(model, dim.name), []).append(dim)
    merged, left = list(groups), list[Dim]()
    for part, dims in by_part.items():
        like = (
            other
            for other in _beside(model, part)
            if other not in by_part and _built(model, other) == _built(model, part)
        )
        added = (_as_in(merged, other, part, dims) for other in like)
        more = next((one for one in added if one is not None), None)
        merged, left = (merged, left + dims) if more is None else (more, left)
    return merged, left


def _part_of_list(model: nn.Module, name: str) -> str:
    """The innermost part of a list or dictionary that a parameter is in; empty: none."""
    path = name.rpartition(".")[0]
    while path:
        above = path.rpartition(".")[0]
        if isinstance(model.get_submodule(above), (nn.ModuleList, nn.ModuleDict)):
            return path
        path = above
    return ""


def _beside(model: nn.Module, part: str) -> list[str]:
    """The parts of the same list."""
    above = part.rpartition(".")[0]
    children = model.get_submodule(above).named_children() if part else ()
    return [f"{above}.{key}" for key, _ in children]


def _built(model: nn.Module, part: str) -> list[object]:
    """What has to be the same of parts that compute the same."""
    plain = (bool, int, float, str, type(None))
    found: list[object] = [sorted(shapes(model.get_submodule(part)).items())]
    for name, module in model.get_submodule(part).named_modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        found += [name, type(module), settings]
    return found


def _as_in(
    groups: Sequence[Group], like: str, part: str, dims: Sequence[Dim]
) -> list[Group] | None:
    """The groups with a part's dimensions as a like part has them; ``None``: it has others."""
    result: list[Group] = []
    placed: set[tuple[str, int]] = set()
    for group in groups:
        inside = [
            (replace(dim, name=f"{part}.{dim.name.removeprefix(f'{like}.')}"), source)
            for dim, source in zip(group.dims, group.sources, strict=True)
            if dim.name.startswith(f"{like}.")
        ]
        placed |= {(dim.name, dim.dim) for dim, _ in inside}
        alone = len(inside) == len(group.dims)
        own = [] if alone else list(zip(group.dims, group.sources, strict=True))
        result += [group] if alone or not inside else []
        if inside:
            every = own + inside
            sources = tuple(source for _, source in every)
            result.append(replace(group, dims=tuple(dim for dim, _ in every), sources=sources))
    return result if placed == {(dim.name, dim.dim) for dim in dims} else None


def _kind(group: Group) -> _Kind:
    """A group's dimensions without the numbers of layers."""
    return frozenset(
        (re.sub(r"\.\d+(?=\.)", ".*", dim.name), dim.dim, dim.layout) for dim in group.dims
    )
