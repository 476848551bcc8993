"""Pad widths with zeros: to one width for all layers, or to multiples that a tool takes.

The wider class is built, and its dependency groups show which units a layer lacks; its weights fill
the others. Query heads are added after those of their key/value group, groups after the others.

Equal outputs do not prove that zeros are neutral: an expert of zeros may just not be chosen for a
few tokens. So the weights that compute added units are also set to noise, one side of a layer at a
time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import listed
from ..fieldmap.learn_field_map import map_of
from ..fieldmap.model_view import view_of
from ..graph.experiments import experiments_of
from ..graph.full_size import Group
from ..graph.layer_fields import layers_listed
from ..graph.prunable import Width, widths_of
from ..graph.sides import is_output, sides_of
from ..graph.unit_count import multiple_for_round_to
from ..model.build import Builder, Refusal
from ..model.config_json import FieldPath, config_json, field_name, with_values
from ..model.fill import fill
from ..model.layer_class import auto_classes, layer_lists, stock_class
from ..model.layer_entries import layer_number, name_in_all_layers, shared_field, uniform_json
from ..model.paging import in_file, is_paged
from ..model.surroundings import free_memory
from ..model.tensors import owner, tensor
from ..planning.selection import inner_widths_of
from ..twin.layout import places_of, positions_left
from .job import ByLayer, Written
from .output import save_model
from .proofs import (
    ROUNDING,
    NotProvedError,
    SameOutputs,
    compared,
    first_run,
    in_float64,
    outputs_of,
    prove_roundtrip,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOUD = 10.0  # noise relative to the weights around it: large enough to change a router's choice
_BYTES_TO_PROVE = 12  # of a parameter: the padded one, and both copies while it becomes float64


def write(model: PreTrainedModel, folder: Path, multiple_of: int = 1) -> Written:
    """Pad every layer to the widest for the stock class, prove it and write it.

    ``multiple_of``: inner widths of feed-forward layers and experts end as multiples of it.
    """
    stock, fields, proof = padded_alike(model, multiple_of)
    save_model(stock, folder)
    prove_roundtrip(stock, folder, map_of(model).recipe)
    loading = f"{auto_classes(type(stock.config), type(stock))[0]}.from_pretrained(folder)"
    return Written(stock.num_parameters(), proof, fields, loading)


def padded_alike(
    model: PreTrainedModel, multiple_of: int = 1
) -> tuple[PreTrainedModel, ByLayer, SameOutputs]:
    """Pad every layer to the widest, and prove that the stock class then computes the same.

    If copies in float64 do not fit into memory, a tiny model of the class proves it, unless layers
    differ.
    """
    large = is_paged() or _BYTES_TO_PROVE * model.num_parameters() > free_memory()
    differ = bool(layer_lists(type(model)))
    widths = _widths_of(model, differ)
    values = _largest(widths)
    raised = _in_multiples(widths, values, multiple_of)
    if raised == values and not differ:
        named = ", ".join(f"{field_name(field)} {value:,}" for field, value in values.items())
        raise NotProvedError(
            f"{named} is a multiple of {multiple_of} already" if named else "it has no inner width"
        )
    proof = _proved_at_twice(model) if large and not differ else None
    return _padded(model, widths, raised, proof)


def _proved_at_twice(model: PreTrainedModel) -> SameOutputs:
    """Pad every inner width of a tiny model of the class to twice its size; return the proof."""
    tiny = experiments_of(map_of(model)).tiny
    if isinstance(tiny, Refusal):
        raise NotProvedError(tiny.reason)
    small: Any = tiny.model
    widths = _widths_of(small, differ=False)
    return _padded(small, widths, {field: 2 * n for field, n in widths.values.items()})[2]


def _padded(
    model: PreTrainedModel,
    widths: LayerWidths,
    values: Mapping[FieldPath, int],
    proof: SameOutputs | None = None,
) -> tuple[PreTrainedModel, ByLayer, SameOutputs]:
    """Build the stock class with these values and fill it; without a proof, prove it."""
    builder = Builder(model).of_class(stock_class(type(model)))
    built: Any = builder.build(with_values(uniform_json(widths.data), values), buffers=True)
    if isinstance(built, Refusal):
        raise NotProvedError(built.reason)
    added = _added_units(_widths_of(built, bool(layer_lists(type(model)))), widths.values)
    _fill(built, model, added)
    proof = proof or _prove(model, built, added)
    built.generation_config = getattr(model, "generation_config", None)
    before = {field: tuple(widths.values_of(field)) for field in values}
    fields = {
        field_name(field): (old, (values[field],) * len(old))
        for field, old in before.items()
        if set(old) != {values[field]}
    }
    return built, fields, proof


@dataclass(frozen=True)
class LayerWidths:
    """The widths that single layers of a model have of their own."""

    data: dict[str, Any]  # config.json with an entry for every layer
    widths: tuple[Width, ...]  # the proved ones, each of one layer
    values: dict[FieldPath, int]  # of their fields
    inner: tuple[Width, ...] = ()  # those inside feed-forward layers and experts

    @property
    def groups(self) -> list[Group]:
        return [group for width in self.widths for group in width.groups]

    def values_of(self, shared: FieldPath) -> list[int]:
        return [v for field, v in self.values.items() if shared_field(field) == shared]


def _widths_of(model: PreTrainedModel, differ: bool) -> LayerWidths:
    """Return the widths of single layers, of a model whose layers differ; else the inner widths."""
    with layers_listed(model, differ):
        view = view_of(model, weights=False)
        widths = inner = inner_widths_of(view)
        if differ:
            widths = tuple(
                width
                for width in widths_of(view.model, view.field_map)
                if width.reason is None and all(layer_number(f) is not None for f in width.fields)
            )
        data = config_json(model.config, use_diff=False)
    shared = {shared_field(field) for width in widths for field in width.fields}
    own = [
        field
        for field in view.field_map.values
        if shared_field(field) in shared and (layer_number(field) is not None) is differ
    ]
    own.sort(key=lambda field: (field_name(shared_field(field)), layer_number(field) or 0))
    return LayerWidths(data, widths, {field: view.field_map.values[field] for field in own}, inner)


def _in_multiples(
    widths: LayerWidths, values: Mapping[FieldPath, int], multiple_of: int
) -> dict[FieldPath, int]:
    """Raise the inner widths among ``values`` to multiples of so many channels."""
    raised = dict(values)
    for width in widths.inner:
        field = shared_field(width.fields[0])
        for group in width.groups:
            each = group.count.per_field_unit * group.count.run
            step = multiple_for_round_to(multiple_of, each)
            raised[field] = max(raised[field], -(-values[field] // step) * step)
    return raised


def _shared(fields: Iterable[FieldPath]) -> tuple[FieldPath, ...]:
    return tuple(map(shared_field, fields))


def _largest(widths: LayerWidths) -> dict[FieldPath, int]:
    """Return field for all layers -> the least value that every layer can be padded to."""
    found: dict[FieldPath, int] = {}
    for field in dict.fromkeys(map(shared_field, widths.values)):
        values = set(widths.values_of(field))
        joint = _largest_joint(widths, field)
        if joint is not None:
            found[field] = joint
        elif len(values) == 1:
            found[field] = values.pop()
        elif any(_shared(width.fields) == (field,) for width in widths.widths):
            found[field] = max(values)
        else:
            layers = " or ".join(map(str, sorted(values)))
            raise NotProvedError(
                f"{field_name(field)} differs between layers ({layers}), and it is not proved "
                "where zeros would have to be added"
            )
    return found


def _largest_joint(widths: LayerWidths, field: FieldPath) -> int | None:
    """Return the value of a field pruned together with one that counts its units, if any."""
    own = widths.values_of(field)
    for width in widths.widths:
        shared = _shared(width.fields)
        if len(shared) > 1 and field in shared:
            each = map(widths.values_of, shared)
            units: list[int] = [min(values) for values in zip(*each, strict=True)]
            if all(value % count == 0 for value, count in zip(own, units, strict=True)):
                # key/value heads, and the query heads of each
                return max(units) * max(value // n for value, n in zip(own, units, strict=True))
    return None


# groups of the padded model, each with the units that were added
_Added = list[tuple[Group, Tensor]]


def _added_units(wide: LayerWidths, old: Mapping[FieldPath, int]) -> _Added:
    """Return the units of wider layers that layers with the old values lack."""
    added: _Added = []
    for group in wide.groups:
        # query heads are grouped by key/value head
        around = next((g for g in wide.groups if _is_around(g, group)), None)
        now = group.count.channel_groups if around is None else around.count.units
        then = now if around is None else _units(around, wide.values, old)
        lacking = torch.ones(now, group.count.units // now, dtype=torch.bool)
        lacking[:then, : _units(group, wide.values, old) // then] = False
        if bool(lacking.any()):
            added.append((group, lacking.flatten().nonzero().flatten()))
    return added


def _is_around(outer: Group, group: Group) -> bool:
    return set(group.fields) < set(outer.fields) and (
        places_of(group.dims) <= places_of(outer.dims)
    )


def _units(group: Group, new: Mapping[FieldPath, int], old: Mapping[FieldPath, int]) -> int:
    field = min(group.fields, key=lambda field: (new[field], old[field]))  # units hold the others'
    return group.count.units * old[field] // new[field]


def _fill(built: nn.Module, model: nn.Module, added: _Added) -> None:
    """Give a wider build a model's weights, with zeros for the added units."""
    narrow, wide = model.state_dict(), built.state_dict()
    if narrow.keys() != wide.keys():
        raise NotProvedError(
            f"the padded class has other tensors: {listed(sorted(narrow.keys() ^ wide.keys()))}"
        )
    places = positions_left(
        {name: value.shape for name, value in wide.items()},
        ((group.dims, group.count.units, units) for group, units in added),
    )

    def padded(name: str, values: Tensor) -> Tensor:
        values = values.detach().cpu()
        for axis, size in enumerate(wide[name].shape):
            positions = places.get(name, {}).get(axis)
            if values.shape[axis] != (size if positions is None else len(positions)):
                raise NotProvedError(
                    f"it is not proved which channels {name} has in dimension {axis}"
                )
            if positions is not None:
                shape = (*values.shape[:axis], size, *values.shape[axis + 1 :])
                values = values.new_zeros(shape).index_copy(axis, positions, values)
        return in_file(values) if is_paged() else values.clone()

    fill(built, model, padded)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in narrow:
            module, key = owner(built, name)
            module._buffers[key] = padded(name, buffer)


def _prove(model: PreTrainedModel, padded: PreTrainedModel, added: _Added) -> SameOutputs:
    """Compare a padded model with the model; refuse a field in which zeros are not neutral."""
    recipe = map_of(model).recipe
    inputs, _ = first_run(model, recipe)
    expected = outputs_of(in_float64(model, recipe), inputs, recipe)
    twin = in_float64(padded, recipe)
    found = outputs_of(twin, inputs, recipe)
    for name, places in _computing(twin, added):
        _set_to_noise(twin, places)
        loud = outputs_of(twin, inputs, recipe)
        for (weight, axis), channels in places:
            tensor(twin, weight).data.index_fill_(axis, channels, 0.0)
        if not compared(found, loud).difference <= ROUNDING:
            raise NotProvedError(
                f"zeros are not neutral in {name}: the other units compute something else when "
                "units are added, as in a norm or a router over all units"
            )
    same = compared(expected, found)
    if not same.difference <= ROUNDING:
        raise NotProvedError(f"the padded model's outputs differ by {same.difference:.0e}")
    return same


# tensor dimensions, each with the positions of its added channels
_Places = list[tuple[tuple[str, int], Tensor]]


def _computing(model: nn.Module, padding: _Added) -> Iterator[tuple[str, _Places]]:
    """Yield field name -> the outputs of layers that compute added units, like layers together."""
    kinds: dict[tuple[str, str], _Places] = {}
    for group, added in padding:
        name = " + ".join(name_in_all_layers(field_name(field)) for field in group.fields)
        for side in filter(is_output, sides_of(model, group, {})):
            kind = re.sub(r"\.\d+(?=\.)", ".*", str(side.dims[0].place))
            channels = side.table[added].flatten()
            kinds.setdefault((name, kind), []).extend((dim.place, channels) for dim in side.dims)
    for (name, _), places in kinds.items():
        yield name, places


def _set_to_noise(model: nn.Module, places: _Places) -> None:
    generator = torch.Generator().manual_seed(0)
    for (name, axis), channels in places:
        weight = tensor(model, name).data
        shape = [*weight.shape]
        shape[axis] = len(channels)
        noise = torch.randn(shape, generator=generator, dtype=weight.dtype)
        weight.index_copy_(axis, channels, noise * _LOUD * weight.abs().mean().clamp_min(1e-3))
