"""The groups of one width, of what the twin test linked: each is proved by a permutation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .alike import as_in_like_layers, in_parts_alike
from .reference import FieldPath
from .search import Places, places_of
from .twins import Dim, Layout, Links, TwinTest
from .unread import is_unread


@dataclass(frozen=True)
class Group:
    """Dimensions that lose the same units, proved by permutation on the tiny copy.

    Attributes:
        fields: the config fields that count its units.
        dims: its dimensions, in the names of the tiny copy.
        sources: for each of them, the field that sets it; ``None``: the fields together.
        units: how many units it has there.
        classes: units may only change places inside each of so many equal runs of units (the
            dimensions of a head, the query heads of a key/value head); 1: anywhere.
        grain: how many of its units go with one unit of the fields (the channels of a residual
            stream that go with one attention head).
    """

    fields: tuple[FieldPath, ...]
    dims: tuple[Dim, ...]
    sources: tuple[FieldPath | None, ...]
    units: int
    classes: int
    grain: int = 1


@dataclass(frozen=True)
class Finding:
    """What was found for one width: its groups, or why it cannot be pruned.

    ``disproved``: units were seen not to be interchangeable; ``unseen``: the outputs do not show
    some of its dimensions; ``apart``: dimensions in which they are not; ``unproved``: those of a
    group of which no permutation is neutral; ``least``: fewer units, and the class does not run (a
    router that takes the best two experts needs two); ``along``: parameters that no output depends
    on, in a group all the same; ``outward``: an output is as wide; ``handed``: inputs (states of an
    encoder) that lose the same units.
    """

    fields: tuple[FieldPath, ...]
    groups: tuple[Group, ...] = ()
    reason: str | None = None
    disproved: bool = False
    unseen: bool = False
    apart: Places = frozenset()
    unproved: Places = frozenset()
    least: int = 1
    along: tuple[str, ...] = ()
    outward: bool = False
    handed: tuple[str, ...] = ()


def named(dims: Sequence[Dim]) -> str:
    """Some parameters by name, those of alike layers once."""
    names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", dim.name) for dim in dims))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def proved(
    test: TwinTest,
    sources: Mapping[Dim, FieldPath | None],
    fields: tuple[FieldPath, ...],
    links: Links,
) -> Finding:
    """The linked groups with their silent companions, each proved by permutation."""
    groups: list[Group] = []
    members, homeless = _members(test, links)
    for group in members:
        classes = classes_of(test, group)
        if classes is None or not test.alike(group, classes):
            reason = f"no permutation of units is neutral in {named(group)}"
            return Finding(fields, reason=reason, disproved=True, unproved=places_of(group))
        by_field = tuple(sources[dim] for dim in group)
        groups.append(Group(fields, tuple(group), by_field, test.units, classes))
    groups = as_in_like_layers(groups)
    along = tuple(dim.name for dim in homeless)
    if homeless and test.unused(along):
        groups, homeless = in_parts_alike(test.model, groups, homeless)
    stream = _stream(test, homeless, groups) if homeless else None
    if homeless and stream is None:
        reason = f"the outputs do not depend on {named(homeless)}"
        return Finding(fields, tuple(groups), reason, unseen=True)
    if not groups:
        return Finding(fields, reason="it sets no parameter that the outputs depend on")
    if stream is not None:
        own = groups[stream]
        more = tuple(sources[dim] for dim in homeless)
        groups[stream] = replace(own, dims=(*own.dims, *homeless), sources=(*own.sources, *more))
    return Finding(fields, tuple(groups), along=along)


def second_look(
    test: TwinTest,
    sources: Mapping[Dim, FieldPath | None],
    fields: tuple[FieldPath, ...],
    links: Links,
) -> Finding | None:
    """The groups once each dimension in doubt is disturbed; ``None``: that cannot help.

    A group that is not proved lacks dimensions that are linked too faintly to show. All in doubt
    together lack none, so where no permutation of those is neutral, they belong nowhere.  Where one
    is, and they are not seen to be several groups, they are one: units go from all of them at once.
    """
    doubted = _doubted(test, links)
    if not doubted or classes_of(test, doubted) is None:
        return None
    links = test.links(list(sources), doubted=doubted)
    found = proved(test, sources, fields, links)
    left = _doubted(test, links) if found.disproved else []
    if not left or classes_of(test, left) is None:
        return found
    apart = [group for group in links.groups if not {*group} & {*left}]
    silent = [dim for dim in links.silent if dim not in left]
    joined = Links((*apart, tuple(left)), links.unequal, tuple(silent))
    return proved(test, sources, fields, joined)


def _members(test: TwinTest, links: Links) -> tuple[list[list[Dim]], list[Dim]]:
    """The linked groups with their silent companions, and the silent that are of none."""
    homeless: list[Dim] = []
    members: list[list[Dim]] = [list(group) for group in links.groups]
    for vectors in [g for g in members if all(test.parameters[d.name].ndim == 1 for d in g)]:
        # a bias before an activation that is all but closed is not seen to go with its weight
        others = [group for group in members if group is not vectors]
        homes = [companion(dim, others) for dim in vectors]
        if homes[0] is not None and all(home is homes[0] for home in homes):
            homes[0].extend(vectors)
            members = others
    for silent in links.silent:
        group = _copied(test, silent, members) or companion(silent, members)
        (homeless if group is None else group).append(silent)
    return members, homeless


def _doubted(test: TwinTest, links: Links) -> list[Dim]:
    """The dimensions to look at once more: of groups that are not proved, or only seemed silent."""
    members, homeless = _members(test, links)
    unproved = (group for group in members if classes_of(test, group) is None)
    silent = [] if test.unused(dim.name for dim in homeless) else homeless
    return list(dict.fromkeys(dim for group in (*unproved, silent) for dim in group))


def _stream(test: TwinTest, unused: Sequence[Dim], groups: Sequence[Group]) -> int | None:
    """The place of the group that vectors go along with which the class has and does not use.

    The token of a mask that was not given (DINOv2), a tensor of none of them (DINOv3), a layer that
    no code reads (Qwen2.5-Omni's table, MarkupLM's projection): where a single group of the width
    is of free channels, the residual stream, they can only be of that one, channel by channel.  The
    stream is what norms belong to.  Of several (MBart's encoder and decoder have each their own
    table, which ``shared`` is not), a layer that no code reads is as good with any: it goes with
    the first that has a tensor of its shape.
    """
    sizes = {dim.layout for dim in unused}
    whole = all(_fills(test.parameters[dim.name], dim, test.units) for dim in unused)
    plain = len(sizes) == 1 and whole
    streams = [
        place
        for place, group in enumerate(groups)
        if group.classes == 1
        and any(d.layout in sizes and _is_vector_alone(test.model, d.name) for d in group.dims)
    ]
    vectors = all(_is_of_vectors(test, dim) for dim in unused)
    if len(streams) > 1 and all(is_unread(test.model, _layer(dim)) for dim in unused):
        shapes = _shapes(test, unused)
        streams = [place for place in streams if shapes <= _shapes(test, groups[place].dims)][:1]
    alone = len(streams) == 1 and plain and vectors and test.unused(dim.name for dim in unused)
    return streams[0] if alone else None


def _shapes(test: TwinTest, dims: Sequence[Dim]) -> set[tuple[int, torch.Size]]:
    """Which axes of tensors of which shapes there are among some dimensions."""
    return {(dim.dim, test.parameters[dim.name].shape) for dim in dims}


def _layer(dim: Dim) -> str:
    return dim.name.rpartition(".")[0]


def _is_of_vectors(test: TwinTest, dim: Dim) -> bool:
    """Whether a dimension is its parameter's only one, or of a layer that no code reads."""
    parameter = test.parameters[dim.name]
    vector = parameter.numel() in (0, max(parameter.shape))
    return vector or is_unread(test.model, _layer(dim))


def _fills(parameter: torch.Tensor, dim: Dim, units: int) -> bool:
    """Whether units fill a dimension, all of one kind of place in one block."""
    layout = Layout(dim.layout.parts, dim.layout.run)
    return dim.layout == layout and len(layout.table(units).flatten()) == parameter.shape[dim.dim]


def _is_vector_alone(model: torch.nn.Module, name: str) -> bool:
    """Whether a parameter is of a norm or a scale: a vector, and beside it nothing but vectors."""
    beside = list(model.get_submodule(name.rpartition(".")[0]).parameters(recurse=False))
    return bool(beside) and all(parameter.ndim == 1 for parameter in beside)


def companion(silent: Dim, groups: Sequence[list[Dim]]) -> list[Dim] | None:
    """The group with the output side of the layer that a dimension without effect is part of."""
    layer = silent.name.rpartition(".")[0]
    for group in groups:
        for dim in group:
            beside = dim.name.rpartition(".")[0] == layer
            if beside and dim.dim == 0 and dim.layout == silent.layout:
                return group
    return None


def _copied(test: TwinTest, silent: Dim, groups: Sequence[list[Dim]]) -> list[Dim] | None:
    """The group with the same dimension of a tensor of the same shape in the same layer.

    I-BERT keeps integers for every weight, which are only read once it is quantised.
    """
    layer, shape = silent.name.rpartition(".")[0], test.parameters[silent.name].shape
    for group in groups:
        for dim in group:
            beside = dim.name.rpartition(".")[0] == layer and dim.name != silent.name
            same = replace(dim, name=silent.name) == silent
            if beside and same and test.parameters[dim.name].shape == shape:
                return group
    return None


def classes_of(test: TwinTest, dims: Sequence[Dim]) -> int | None:
    """In how many runs of units a permutation has to stay to be neutral; None: none is."""
    for classes in (n for n in range(1, test.units) if test.units % n == 0):
        if test.proves(dims, list(order_of(test.units, classes, swap=True))):
            proved = test.proves(dims, list(order_of(test.units, classes, swap=False)))
            return classes if proved else None
    return None


def order_of(units: int, classes: int, swap: bool) -> Iterator[int]:
    """An order of the units inside each class: first and last of the first exchanged, or random."""
    size = units // classes
    generator = torch.Generator().manual_seed(units)
    for start in range(0, units, size):
        if swap:
            places = list(range(size))
            if start == 0:
                places[0], places[-1] = places[-1], places[0]
        else:
            places = torch.randperm(size, generator=generator).tolist()
        yield from (start + place for place in places)
