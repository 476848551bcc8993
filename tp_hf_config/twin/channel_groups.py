"""Find which field says how many channel groups the units of a group form, by experiment.

Mamba 2's heads share states in as many groups as ``n_groups`` says, a number that no layer shows.
The tiny model is built with another number: with the field that counts them, units form as many
channel groups as it says then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import gcd

from torch import nn

from ..forward.coverage import forward_error
from ..model.build import Refusal
from ..model.config_json import FieldPath
from ..model.shapes import shapes
from ..model.surroundings import same_random_state
from .group import TinyGroup
from .layout import TensorDim
from .prove import channel_groups_of
from .tiny.random_weights import randomise, scale_convolutions
from .tiny.tiny_model import TinyModel, once


@once
def counted_by(group: TinyGroup, tiny: TinyModel) -> list[FieldPath]:
    """Return the fields that count the channel groups of a group, as experiments show."""
    numbers = tiny.field_map.values | tiny.field_map.non_size_fields
    equal = [field for field, value in numbers.items() if value == group.channel_groups]
    return [field for field in equal if field not in group.fields and _counts(field, group, tiny)]


@once
def parts_counted_by(group: TinyGroup, tiny: TinyModel) -> list[FieldPath] | None:
    """Return the fields that count the parts in which a group holds its units.

    One dimension of every head of Mamba 2 is a unit, in as many parts as there are heads, or in
    half as many in two channel groups: with more heads, units are in more parts. If none does, the
    number is the code's own (Swin's second stage is twice as wide as its first). ``None``: a field
    may count them, and the class takes no other value.
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
    """True if with twice or half of a field's value, units are in twice or half as many parts.

    The field changes alone, or with one that the class takes it only in proportion with. ``None``:
    no other value runs.
    """
    numbers = tiny.field_map.values | tiny.field_map.non_size_fields
    partners: list[FieldPath | None] = [None, *tiny.field_map.ratio_partners.get(field, ())]
    ran = False
    for factor, partner in product((Fraction(2), Fraction(1, 2)), partners):
        changes = {path: factor * numbers[path] for path in (field, partner) if path in numbers}
        if any(value.denominator > 1 for value in changes.values()):
            continue
        model = _rebuilt(tiny, {path: int(value) for path, value in changes.items()})
        if model is not None:
            ran, dims = True, _dims_with_more_parts(group, tiny, model, factor)
            if dims is not None:
                return _channel_group_count(group, tiny, model, dims) == group.channel_groups
    return False if ran else None


def _dims_with_more_parts(
    group: TinyGroup, tiny: TinyModel, model: nn.Module, factor: Fraction
) -> list[TensorDim] | None:
    """Return a group's dims in a build with ``factor`` times the parts; None: sizes do not fit."""
    was, now = shapes(tiny.model), shapes(model)
    dims = []
    for dim in group.dims if was.keys() == now.keys() else ():
        layout, parts = dim.layout, dim.layout.parts * factor
        longer = now[dim.name][dim.dim] - was[dim.name][dim.dim]
        added = (parts - layout.parts) * group.units * layout.run
        if layout.offset or parts.denominator > 1 or longer < added:
            return None
        dims.append(replace(dim, layout=replace(layout, parts=int(parts))))
    return dims or None


def _counts(field: FieldPath, group: TinyGroup, tiny: TinyModel) -> bool:
    """True if units form as many channel groups as a field says, at every other number that runs.

    One number is not enough: if the channel groups are a common multiple of this field and another
    (SqueezeBERT), this one may be the larger. False if no other number runs.
    """
    ran = False
    for number in (n for n in range(1, group.units) if group.units % n == 0):
        model = _rebuilt(tiny, {field: number}) if number != group.channel_groups else None
        if model is None:
            continue
        ran, dims = True, _dims_with_other_rest(group, tiny, model)
        if dims is None or _channel_group_count(group, tiny, model, dims) != number:
            return False
    return ran


def _channel_group_count(
    group: TinyGroup, tiny: TinyModel, model: nn.Module, dims: list[TensorDim]
) -> int | None:
    """Return the number of channel groups in another build; None: no permutation is neutral."""
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


def _dims_with_other_rest(
    group: TinyGroup, tiny: TinyModel, model: nn.Module
) -> list[TensorDim] | None:
    """Return a group's dims in a build that may add other positions; None: the units changed."""
    was, now = shapes(tiny.model), shapes(model)
    dims = []
    for dim in group.dims if was.keys() == now.keys() else ():
        layout, size = dim.layout, was[dim.name][dim.dim]
        longer = now[dim.name][dim.dim] - size
        rest = size - group.units * layout.parts * layout.run
        if longer and (layout.gap or not rest or rest + longer < 0):
            return None
        offset = layout.offset + longer if layout.offset else 0
        dims.append(replace(dim, layout=replace(layout, offset=offset)))
    return dims or None
