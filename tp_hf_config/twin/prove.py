"""Prove the groups of one width: a permutation decides on what the twin test linked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import chain, product
from math import gcd

import torch
from torch import nn

from ..errors import listed
from ..fieldmap.layer_kinds import names_in_code
from ..forward.coverage import forward_error
from ..model.build import Refusal
from ..model.config_json import FieldPath
from ..model.shapes import shapes
from ..model.surroundings import same_random_state
from .layout import Finding, Sources, TensorDim, TinyGroup, as_in_like_layers, in_parts_alike
from .tiny.tiny_model import TinyModel, once, randomise, scale_convolutions
from .twin_test import Links, TwinTest


def named(dims: Sequence[TensorDim]) -> str:
    return listed(list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", dim.name) for dim in dims)))


def proved(
    test: TwinTest, sources: Sources, fields: tuple[FieldPath, ...], links: Links
) -> Finding:
    """Return the linked groups with their unobserved companions, each proved by permutation."""
    groups: list[TinyGroup] = []
    members, unplaced = _members(test, links)
    for group in members:
        channel_groups = channel_groups_of(test, group)
        if channel_groups is None or not test.alike(group, channel_groups):
            reason = f"permuting units changes the outputs in {named(group)}"
            return Finding(fields, reason=reason, disproved=True)
        by_field = tuple(sources[dim] for dim in group)
        groups.append(TinyGroup(fields, tuple(group), by_field, test.units, channel_groups))
    groups = as_in_like_layers(groups)
    unobserved = tuple(dim.name for dim in unplaced)
    if unplaced and test.unused(unobserved):
        groups, unplaced = in_parts_alike(test.model, groups, unplaced)
    stream = _stream(test, unplaced, groups) if unplaced else None
    if unplaced and stream is None:
        reason = f"the outputs do not depend on {named(unplaced)}"
        return Finding(fields, tuple(groups), reason, unobserved=True)
    if not groups:
        return Finding(fields, reason="it sets no parameter that the outputs depend on")
    if stream is not None:
        stream_group = groups[stream]
        added = tuple(sources[dim] for dim in unplaced)
        groups[stream] = replace(
            stream_group,
            dims=(*stream_group.dims, *unplaced),
            sources=(*stream_group.sources, *added),
        )
    return Finding(fields, tuple(groups), unobserved_parameters=unobserved)


def second_look(
    test: TwinTest, sources: Sources, fields: tuple[FieldPath, ...], links: Links
) -> Finding | None:
    """Return the finding after a second twin test that disturbs every tensor dim in doubt.

    An unproved group lacks dims whose links are too faint to show. If no permutation of all dims in
    doubt is neutral, they are in no group (None). If one is, and they are not shown to be several
    groups, they are one.
    """
    doubted = _doubted(test, links)
    if not doubted or channel_groups_of(test, doubted) is None:
        return None
    links = test.links(list(sources), doubted=doubted, still_doubted=partial(_doubted, test))
    finding = proved(test, sources, fields, links)
    still_doubted = _doubted(test, links) if finding.disproved else []
    if not still_doubted or channel_groups_of(test, still_doubted) is None:
        return finding
    settled = [group for group in links.groups if not {*group} & {*still_doubted}]
    unobserved = tuple(dim for dim in links.unobserved if dim not in still_doubted)
    joined = Links((*settled, tuple(still_doubted)), links.unequal, unobserved)
    return proved(test, sources, fields, joined)


def _members(test: TwinTest, links: Links) -> tuple[list[list[TensorDim]], list[TensorDim]]:
    """Return the linked groups with unobserved companions, and unobserved dims without a group."""
    unplaced: list[TensorDim] = []
    members: list[list[TensorDim]] = [list(group) for group in links.groups]
    for vectors in [g for g in members if all(test.parameters[d.name].ndim == 1 for d in g)]:
        # before an almost closed activation, no link from a bias to its weight shows
        others = [group for group in members if group is not vectors]
        homes = [companion(dim, others) for dim in vectors]
        if homes[0] is not None and all(home is homes[0] for home in homes):
            homes[0].extend(vectors)
            members = others
    for dim in links.unobserved:
        group = _group_of_copy(test, dim, members) or companion(dim, members)
        (unplaced if group is None else group).append(dim)
    return members, unplaced


def _doubted(test: TwinTest, links: Links) -> list[TensorDim]:
    """Return the tensor dims in doubt: of unproved groups, and unobserved ones if any is used."""
    members, unplaced = _members(test, links)
    unproved = (group for group in members if channel_groups_of(test, group) is None)
    used = [] if test.unused(dim.name for dim in unplaced) else unplaced
    return list(dict.fromkeys(chain(*unproved, used)))


def _stream(test: TwinTest, unused: Sequence[TensorDim], groups: Sequence[TinyGroup]) -> int | None:
    """Return the index of the residual stream's group, to which unused vectors belong, or None.

    Unused are DINOv2's mask token without a mask, DINOv3's empty tensor, and layers that no code
    reads (Qwen2.5-Omni's table, MarkupLM's projection). The residual stream is the only group
    that has a norm and interchangeable channels. Of several (MBart's encoder and decoder have
    tables of their own, ``shared`` is unread), the first with a tensor of the same shape is chosen.
    """
    layouts = {dim.layout for dim in unused}
    streams = [
        number
        for number, group in enumerate(groups)
        if group.channel_groups == 1
        and any(d.layout in layouts and _is_in_norm(test.model, d) for d in group.dims)
    ]
    if len(streams) > 1 and all(is_unread(test.model, dim.layer) for dim in unused):
        shapes = _shapes(test, unused)
        streams = [number for number in streams if shapes <= _shapes(test, groups[number].dims)][:1]
    fits = (
        len(streams) == len(layouts) == 1
        and all(_fills(test, dim) and _is_of_vectors(test, dim) for dim in unused)
        and test.unused(dim.name for dim in unused)
    )
    return streams[0] if fits else None


def _shapes(test: TwinTest, dims: Sequence[TensorDim]) -> set[tuple[int, torch.Size]]:
    return {(dim.dim, test.parameters[dim.name].shape) for dim in dims}


def _is_of_vectors(test: TwinTest, dim: TensorDim) -> bool:
    """True if a parameter is empty or a vector along this dim, or of a layer that no code reads."""
    parameter = test.parameters[dim.name]
    vector = parameter.numel() in (0, max(parameter.shape))
    return vector or is_unread(test.model, dim.layer)


def _fills(test: TwinTest, dim: TensorDim) -> bool:
    size = test.units * dim.layout.parts * dim.layout.run
    return dim.layout.is_plain and size == test.parameters[dim.name].shape[dim.dim]


def _is_in_norm(model: nn.Module, dim: TensorDim) -> bool:
    """True if a parameter is of a norm or a scale: its module's own parameters are all vectors."""
    own = list(model.get_submodule(dim.layer).parameters(recurse=False))
    return bool(own) and all(parameter.ndim == 1 for parameter in own)


def companion(unobserved: TensorDim, groups: Sequence[list[TensorDim]]) -> list[TensorDim] | None:
    """Return the group with the outputs of the layer of an unobserved tensor dim, or None."""
    output = (unobserved.layer, 0, unobserved.layout)
    return next((g for g in groups if any((d.layer, d.dim, d.layout) == output for d in g)), None)


def _group_of_copy(
    test: TwinTest, unobserved: TensorDim, groups: Sequence[list[TensorDim]]
) -> list[TensorDim] | None:
    """Return the group with the same dim of an equally large tensor in the same layer, or None."""

    # I-BERT keeps integers for every weight, which are only read once it is quantised
    def is_copy(dim: TensorDim) -> bool:
        same = dim != unobserved == replace(dim, name=unobserved.name)
        shapes = [test.parameters[name].shape for name in (dim.name, unobserved.name)]
        return same and dim.layer == unobserved.layer and shapes[0] == shapes[1]

    return next((group for group in groups if any(map(is_copy, group))), None)


def channel_groups_of(test: TwinTest, dims: Sequence[TensorDim]) -> int | None:
    """Return the fewest channel groups inside which a permutation is neutral; None: none is."""
    for channel_groups in (n for n in range(1, test.units) if test.units % n == 0):
        if test.proves(dims, list(order_of(test.units, channel_groups, swap=True))):
            is_neutral = test.proves(dims, list(order_of(test.units, channel_groups, swap=False)))
            return channel_groups if is_neutral else None
    return None


def order_of(units: int, channel_groups: int, swap: bool) -> Iterator[int]:
    """Yield an order of the units that moves none to another channel group."""
    size = units // channel_groups
    generator = torch.Generator().manual_seed(units)
    for start in range(0, units, size):
        if swap:  # exchange the first and last unit of the first channel group
            order = list(range(size))
            if start == 0:
                order[0], order[-1] = order[-1], order[0]
        else:
            order = torch.randperm(size, generator=generator).tolist()
        yield from (start + unit for unit in order)


# methods that construct or return a layer, and run nothing (MBart's ``shared``)
_NO_READERS = ("__init__", "get_input_embeddings", "set_input_embeddings")


def is_unread(model: nn.Module, layer: str) -> bool:
    """True if no code reads this layer's attribute: only ``__init__`` and accessors name it."""
    names = [part for part in layer.split(".") if not part.isdigit()]
    return bool(names) and names[-1] not in names_in_code(model, _NO_READERS)


@once
def counted_by(group: TinyGroup, tiny: TinyModel) -> list[FieldPath]:
    """Return the fields that count a group's channel groups (Mamba 2's ``n_groups``)."""
    numbers = tiny.field_map.values | tiny.field_map.non_size_fields
    equal = [field for field, value in numbers.items() if value == group.channel_groups]
    return [field for field in equal if field not in group.fields and _counts(field, group, tiny)]


@once
def parts_counted_by(group: TinyGroup, tiny: TinyModel) -> list[FieldPath] | None:
    """Return the fields that count the parts in which a group holds its units (Mamba 2's heads).

    Empty: the class's code sets the number (Swin's second stage is twice as wide as its first).
    None: a field may count them, but the class accepts no other value.
    """
    parts = gcd(*(dim.layout.parts for dim in group.dims)) * group.channel_groups
    field_map = tiny.field_map
    setting = [field_map.fields_of(*dim.place) for dim in group.dims]
    relevant = field_map.count_fields().union(field_map.ratio_partners, *setting) - set(
        group.fields
    )
    numbers = field_map.values | field_map.non_size_fields
    results = {
        field: _scales_parts(field, group, tiny)
        for field in sorted(relevant, key=str)
        if numbers.get(field) == parts
    }
    counting = [field for field, scales in results.items() if scales]
    return None if not counting and None in results.values() else counting


def _scales_parts(field: FieldPath, group: TinyGroup, tiny: TinyModel) -> bool | None:
    """True if twice or half the field gives units twice or half the parts; None: it never runs."""
    numbers = tiny.field_map.values | tiny.field_map.non_size_fields
    partners: list[FieldPath | None] = [None, *tiny.field_map.ratio_partners.get(field, ())]
    ran = False
    for factor, partner in product((Fraction(2), Fraction(1, 2)), partners):
        changes = {path: factor * numbers[path] for path in (field, partner) if path in numbers}
        if any(value.denominator > 1 for value in changes.values()):
            continue
        model = _rebuilt(tiny, {path: int(value) for path, value in changes.items()})
        if model is not None:
            ran, dims = True, _dims_in(model, group, tiny, factor)
            if dims is not None:
                return _channel_group_count(group, tiny, model, dims) == group.channel_groups
    return False if ran else None


def _counts(field: FieldPath, group: TinyGroup, tiny: TinyModel) -> bool:
    """True if units form as many channel groups as a field says, at all numbers that run."""
    ran = False
    # one number is not enough: channel groups may be a common multiple of this field and a smaller
    # one (SqueezeBERT)
    for number in (n for n in range(1, group.units) if group.units % n == 0):
        model = _rebuilt(tiny, {field: number}) if number != group.channel_groups else None
        if model is None:
            continue
        ran, dims = True, _dims_in(model, group, tiny)
        if dims is None or _channel_group_count(group, tiny, model, dims) != number:
            return False
    return ran


def _dims_in(
    model: nn.Module, group: TinyGroup, tiny: TinyModel, factor: Fraction = Fraction(1)
) -> list[TensorDim] | None:
    """Return a group's dims in a build with ``factor`` times the parts; None: sizes do not fit."""
    was, now = shapes(tiny.model), shapes(model)
    dims = []
    for dim in group.dims if was.keys() == now.keys() else ():
        layout, parts = dim.layout, dim.layout.parts * factor
        size, per_part = was[dim.name][dim.dim], group.units * layout.run
        added = now[dim.name][dim.dim] - size - (parts - layout.parts) * per_part
        rest = size - layout.parts * per_part  # positions of something else, which may be more now
        if factor != 1:
            fits = not layout.offset and parts.denominator == 1 and added >= 0
        else:
            fits = not added or (not layout.gap and rest > 0 and rest + added >= 0)
        if not fits:
            return None
        offset = int(layout.offset + added) if layout.offset else 0
        dims.append(replace(dim, layout=replace(layout, parts=int(parts), offset=offset)))
    return dims or None


def _channel_group_count(
    group: TinyGroup, tiny: TinyModel, model: nn.Module, dims: list[TensorDim]
) -> int | None:
    runs = sorted({dim.layout.parts * dim.layout.run for dim in dims})
    return channel_groups_of(tiny.test(group.units, runs, model), dims)


def _rebuilt(tiny: TinyModel, values: Mapping[FieldPath, int]) -> nn.Module | None:
    """Return the tiny model at other values, with random weights; None: it does not run."""
    with same_random_state(0):
        model = tiny.field_map.builder.build_real(tiny.field_map.config_at(values))
        if isinstance(model, Refusal):
            return None
        randomise(model)
        scale_convolutions(model, tiny.inputs, tiny.recipe)
    return model if forward_error(model, tiny.inputs, tiny.recipe) is None else None
