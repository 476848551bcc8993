"""Pad layers that differ with zeros, so that a class which knows one width for all can hold them.

Where a unit's channels stand in each parameter is read off the dependency groups, at the widths
that a layer has and at those that it gets. Units are added behind those that are there: query heads
behind those of their key/value group, key/value groups behind the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import in_one_line, listed
from ..fieldmap.model_view import view_of
from ..graph.full_size import Group
from ..graph.layer_fields import layers_listed
from ..graph.prunable import Width, widths_of
from ..graph.unit_count import UnitCount
from ..model.build import Builder, Refusal, without_data
from ..model.config_json import FieldPath, config_json, field_name
from ..model.layer_entries import layer_number, shared_field
from ..model.tensors import owner, tensor
from ..twin.layout import TensorDim, places_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerWidths:
    """The widths that single layers of a model have of their own.

    Attributes:
        data: the config's JSON with an entry for every layer.
        widths: the widths that are proved, each of one layer.
        values: field -> its value, for the fields of those widths.
    """

    data: dict[str, Any]
    widths: tuple[Width, ...]
    values: dict[FieldPath, int]

    @property
    def groups(self) -> list[Group]:
        """The dependency groups of all widths."""
        return [group for width in self.widths for group in width.groups]

    def by_layer(self, shared: tuple[FieldPath, ...]) -> list[Width]:
        """Return the widths of single layers that some fields for all layers stand for."""
        return [width for width in self.widths if _shared(width.fields) == shared]

    def values_of(self, shared: FieldPath) -> list[int]:
        """Return the values that layers have of a field, in their order."""
        return [v for field, v in self.values.items() if shared_field(field) == shared]


def layer_widths(model: PreTrainedModel) -> LayerWidths:
    """Return the widths that single layers of a model have of their own.

    ``model``: a model whose layers may differ; it is as it was afterwards. The meta device will do.

    Raises:
        UnsupportedModelError: its layers cannot have widths of their own.
    """
    with layers_listed(model):
        view = view_of(model, weights=False)
        widths = tuple(
            width
            for width in widths_of(view.model, view.field_map)
            if width.reason is None and all(layer_number(f) is not None for f in width.fields)
        )
        data = config_json(model.config, use_diff=False)
    groups = [group for width in widths for group in width.groups]
    widths = tuple(
        replace(width, groups=tuple(_grouped(group, groups) for group in width.groups))
        for width in widths
    )
    shared = {shared_field(field) for width in widths for field in width.fields}
    own = [
        field
        for field in view.field_map.values
        if layer_number(field) is not None and shared_field(field) in shared
    ]
    own.sort(key=lambda field: (field_name(shared_field(field)), layer_number(field) or 0))
    values = {field: view.field_map.values[field] for field in own}
    return LayerWidths(data, widths, values)


def _grouped(group: Group, groups: Iterable[Group]) -> Group:
    """Return a group with as many channel groups as there are units around its own.

    Query heads stand in units of a key/value head each.  Of a layer with a single one, that is not
    seen where its output is split into heads.
    """
    for other in groups:
        around = set(group.fields) < set(other.fields)
        if around and places_of(group.dims) <= places_of(other.dims):
            return replace(group, count=replace(group.count, channel_groups=other.count.units))
    return group


def _shared(fields: Iterable[FieldPath]) -> tuple[FieldPath, ...]:
    return tuple(map(shared_field, fields))


def largest(widths: LayerWidths, multiple_of: int = 1) -> dict[FieldPath, int] | Refusal:
    """Return field for all layers -> the least value that every layer can be padded to.

    ``multiple_of``: what the value of a field in which layers differ has to be a multiple of; not
    asked of heads.

    Returns:
        The values; or a refusal that names a field whose layers have no common value.
    """
    found: dict[FieldPath, int] = {}
    for field in dict.fromkeys(map(shared_field, widths.values)):
        values = set(widths.values_of(field))
        joint = _largest_joint(widths, field)
        if joint is not None:
            found[field] = joint
        elif len(values) == 1:
            found[field] = values.pop()
        elif own := widths.by_layer((field,)):
            multiple = multiple_of if own[0].groups[0].count.run == 1 else 1
            found[field] = -(-max(values) // multiple) * multiple
        else:
            layers = " or ".join(map(str, sorted(values)))
            return Refusal(
                f"{field_name(field)} is {layers} by layer, and nothing proves where zeros would "
                "have to stand"
            )
    return found


def _largest_joint(widths: LayerWidths, field: FieldPath) -> int | None:
    """Return the value of a field that moves with another, which counts the units of both.

    As many units as a layer has, times the most that one holds: key/value heads, and query heads
    for each.

    Returns:
        The value, or ``None`` if there is no such other field.
    """
    for width in widths.widths:
        shared = _shared(width.fields)
        if len(shared) > 1 and field in shared:
            units = [
                min(values, default=1)
                for values in zip(*map(widths.values_of, shared), strict=True)
            ]
            own = widths.values_of(field)
            if all(value % count == 0 for value, count in zip(own, units, strict=True)):
                per_unit = [value // count for value, count in zip(own, units, strict=True)]
                return max(units) * max(per_unit)
    return None


@dataclass(frozen=True)
class Padded:
    """A padded model.

    Attributes:
        model: the model, on the CPU.
        groups: its dependency groups of which units were added, each with the units added.
    """

    model: PreTrainedModel
    groups: tuple[tuple[Group, Tensor], ...]


def pad(
    model: PreTrainedModel,
    widths: LayerWidths,
    model_class: type[PreTrainedModel],
    data: dict[str, Any],
) -> Padded | Refusal:
    """Build a class from a config with wider layers, and copy a model's weights into it.

    ``model``: the model; it stays as it is.
    ``data``: the config's JSON, in which no width is less than the model's.

    Returns:
        The padded model; or a refusal: the class does not build it, or a parameter's units cannot
        be told.
    """
    builder = Builder(model).of_class(model_class)
    try:
        config = builder.config(data)
    except Exception as error:  # a config class may refuse with any exception
        return Refusal(in_one_line(error))
    empty = without_data(model_class, config)
    built = builder.build(data, buffers=True)
    for result in (empty, built):
        if isinstance(result, Refusal):
            return result
    pairs = _paired(widths, layer_widths(empty), model)  # type: ignore[arg-type]
    refusal = _fill(built, model, pairs)
    if refusal is not None:
        return refusal
    padded: Any = built
    padded.generation_config = getattr(model, "generation_config", None)
    added: list[tuple[Group, Tensor]] = []
    for old, new in pairs:
        units = torch.ones(new.count.units, dtype=torch.bool)
        units[unit_positions(old.count, new.count)] = False
        if bool(units.any()):
            added.append((new, units.nonzero().flatten()))
    return Padded(padded, tuple(added))


def _paired(narrow: LayerWidths, wide: LayerWidths, model: nn.Module) -> list[tuple[Group, Group]]:
    """Return each group of the wider layers with what it is in the model.

    What a layer's own widths do not show is taken from the wider ones: query heads of their own,
    in a layer that has one for each key/value head.
    """
    known = {_kind(group): group for group in narrow.groups}
    pairs: list[tuple[Group, Group]] = []
    for group in wide.groups:
        old = known.get(_kind(group))
        pairs.append((old or _narrowed(group, narrow.values, wide.values, model), group))
    return pairs


def _kind(group: Group) -> tuple[frozenset[FieldPath], tuple[object, ...]]:
    """Return what a group is whatever its widths: its fields, places and parts."""
    return frozenset(group.fields), tuple(sorted(map(_place_and_parts, group.dims)))


def _place_and_parts(dim: TensorDim) -> tuple[str, int, int]:
    return dim.name, dim.dim, dim.layout.parts


def _narrowed(
    group: Group, old: Mapping[FieldPath, int], new: Mapping[FieldPath, int], model: nn.Module
) -> Group:
    """Return a group with the layouts that it has where its fields have smaller values."""
    field = group.fields[0]
    units = group.count.units * old[field] // new[field]
    dims: list[TensorDim] = []
    for dim in group.dims:
        layout = dim.layout
        rest = tensor(model, dim.name).shape[dim.dim] - units * layout.parts * layout.run
        gap = rest // layout.parts if layout.gap else 0
        offset = (gap or rest) if layout.offset else 0
        run = layout.run if rest >= 0 else 0  # smaller units inside say where the channels are
        dims.append(replace(dim, layout=replace(layout, run=run, offset=offset, gap=gap)))
    return replace(group, dims=tuple(dims), count=replace(group.count, units=units))


def unit_positions(old: UnitCount, new: UnitCount) -> Tensor:
    """Return, for every unit, its number among more units; channel groups stay together."""
    units = torch.arange(old.units)
    before, after = old.units // old.channel_groups, new.units // new.channel_groups
    return units // before * after + units % before


def _fill(built: Any, model: nn.Module, pairs: Sequence[tuple[Group, Group]]) -> Refusal | None:
    """Give a model without data the weights of a narrower one, and zeros for units it lacks.

    Return why that cannot be, or ``None``.
    """
    narrow, wide = model.state_dict(), built.state_dict()
    if narrow.keys() != wide.keys():
        return Refusal(f"it has other tensors: {listed(sorted(narrow.keys() ^ wide.keys()))}")
    dims = _dims_by_name(pairs)
    for name, value in narrow.items():
        widened = value.detach().cpu()
        for axis, size in enumerate(wide[name].shape):
            if size == widened.shape[axis]:
                continue
            new_positions = _new_positions(widened.shape[axis], size, dims.get((name, axis), ()))
            if new_positions is None:
                return Refusal(f"nothing proves which channels {name} has in dimension {axis}")
            shape = (*widened.shape[:axis], size, *widened.shape[axis + 1 :])
            widened = widened.new_zeros(shape).index_copy(axis, new_positions, widened)
        _put(built, name, widened)
    built.tie_weights()
    return None


_Dim = tuple[TensorDim, TensorDim, UnitCount, UnitCount]
"""A tensor dim as it is and as it is when wider, each with the unit count of its group."""


def _dims_by_name(pairs: Iterable[tuple[Group, Group]]) -> dict[tuple[str, int], list[_Dim]]:
    """Return parameter and dimension -> its tensor dims in all groups, the largest runs first."""
    dims: dict[tuple[str, int], list[_Dim]] = {}
    for old, new in pairs:
        order = [sorted(group.dims, key=_place_and_parts) for group in (old, new)]
        for old_dim, new_dim in zip(*order, strict=True):
            dims.setdefault(new_dim.place, []).append((old_dim, new_dim, old.count, new.count))
    for found in dims.values():
        found.sort(key=lambda entry: -entry[1].layout.run)
    return dims


def _new_positions(size: int, wider: int, dims: Iterable[_Dim]) -> Tensor | None:
    """Return the position that each channel of a dimension gets in the wider one.

    Channels of no unit keep their order.

    Args:
        size: how many channels the dimension has.
        wider: how many it gets.
        dims: its tensor dims, those of the largest units first: what smaller ones say goes.

    Returns:
        The positions, or ``None`` if the tensor dims do not tell them.
    """
    positions, of_units = torch.full((size,), -1), torch.zeros(wider, dtype=torch.bool)
    for old, new, count, wider_count in dims:
        table = new.layout.table(wider_count.units)
        of_units[table.flatten()] = True
        kept = table[unit_positions(count, wider_count)]
        now = old.layout.table(count.units)
        if now.shape == kept.shape:  # else smaller units (heads in a group) are added inside too
            positions[now] = kept
    rest = (positions < 0).nonzero().flatten()
    outside = (~of_units).nonzero().flatten()
    if len(rest) != len(outside):
        return None
    positions[rest] = outside
    return positions


def _put(built: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer of a model that was built without data."""
    module, key = owner(built, name)
    if key in module._parameters:
        trained = value.is_floating_point() and module._parameters[key].requires_grad  # type: ignore[union-attr]
        module._parameters[key] = nn.Parameter(value.clone(), requires_grad=trained)
    else:
        module._buffers[key] = value.clone()
