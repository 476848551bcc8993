"""Count the units of the widths that are pruned, and find what they stay multiples of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import gcd, lcm

from torch import nn

from ..fieldmap.field_map import multiple_of
from ..fieldmap.model_view import ModelView
from ..graph.prunable import Width
from ..graph.unit_count import UnitCount
from ..model.config_json import FieldPath
from ..model.tensors import is_matrix_stack, tensor


def multiples_of(view: ModelView, widths: Iterable[Width]) -> dict[tuple[FieldPath, ...], int]:
    """Return what each of these widths has to stay a multiple of, counted in units of its fields.

    The class, the kernels or the channel groups require it.
    """
    counts = view.field_map.count_fields()
    multiples: dict[tuple[FieldPath, ...], int] = {}
    for width in widths:
        multiple = _multiple_in(view, width)
        if len(width.fields) == 1 and not set(width.fields) & counts:
            own = multiple_of(view.field_map, width.fields[0])
            multiple = lcm(
                multiple, own // gcd(own, view.field_map.values[width.fields[0]] // width.units)
            )
        multiples[width.fields] = multiple
    return multiples


def unit_counts_of(width: Width, multiple: int, model: nn.Module) -> tuple[UnitCount, ...]:
    """Return the unit counts of a width's groups, each different one once.

    ``multiple`` is what the width has to stay a multiple of, in units of its fields.
    """
    channels: dict[tuple[str, int], int] = {}
    for dim in (dim for group in width.groups for dim in group.dims):
        channels[dim.place] = channels.get(dim.place, 0) + dim.layout.parts * dim.layout.run
    unit_counts: dict[UnitCount, None] = {}
    for group in width.groups:
        layers = {(tensor(model, m.name).shape[m.dim], channels[m.place]) for m in group.dims}
        unit_count = group.count.in_multiples_of(multiple)
        unit_counts[replace(unit_count, layers=tuple(sorted(layers)))] = None
    return tuple(unit_counts)


def _multiple_in(view: ModelView, width: Width) -> int:
    """Return what a width has to stay a multiple of for its kernels and channel groups.

    Stacked experts run in a grouped matrix product that takes only rows of whole 16 bytes. Channel
    groups have to lose the same number each.
    """
    multiple = 1
    for group in width.groups:
        own = group.count.channel_groups  # all groups of a width lose the same number
        for dim in group.dims:
            if dim.dim > 0 and is_matrix_stack(view.model, dim.name):
                own = lcm(own, 16 // tensor(view.model, dim.name).element_size())
        multiple = lcm(multiple, own // gcd(own, group.count.per_field_unit))
    return multiple
