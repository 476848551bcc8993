"""Carry groups proved on the tiny model over to the real one: all layers, full-size positions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..fieldmap.field_map import FieldMap
from ..fieldmap.unit_shares import Share, Shares, shares_of, units_of
from ..forward.head_splits import splits_after
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.tensors import parameter_names, saved_buffers
from ..reports import short
from ..twin.group import Finding, TinyGroup
from ..twin.layout import TensorDim, UnitLayout, places_of, share_positions
from ..twin.tiny.tiny_model import TinyModel
from .carried_numbers import (
    full_channel_groups,
    full_layout,
    full_parts,
    full_per_field_unit,
    full_runs,
)
from .unit_count import UnitCount

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Group:
    """A dependency group of the real model: tensor dims that lose the same units.

    Attributes:
        fields: the config fields that count its units.
        dims: its tensor dims.
        count: its unit count before pruning.
    """

    fields: tuple[FieldPath, ...]
    dims: tuple[TensorDim, ...]
    count: UnitCount

    def __repr__(self) -> str:
        fields = " + ".join(map(field_name, self.fields))
        return short(self, f"{fields}: {self.count.units:,} units in {len(self.dims)} dimensions")


def expand(
    finding: Finding, tiny: TinyModel, field_map: FieldMap, model: nn.Module
) -> list[Group] | Refusal:
    """Return the real model's groups of one width, or the reason why they do not carry over."""
    names = {names[0]: names for names in parameter_names(model).values()}
    buffers = saved_buffers(model)
    names.update({name: [name] for name in buffers})
    missing = [field for field in finding.fields if field not in field_map.values]
    if missing:
        return Refusal(f"{field_name(missing[0])} sets no width of the real model")
    shares = shares_of(field_map, finding.fields)
    if isinstance(shares, Refusal):
        return shares
    result: list[Group] = []
    covered: set[tuple[str, int]] = set()
    widths = {field_map.values[field] for field in finding.fields}
    for group in finding.groups:
        for instance in instances(group, field_map, names):
            real = _real_group(group, instance, tiny, field_map, shares, names)
            if isinstance(real, Refusal):
                return real
            result.append(real)
            covered |= places_of(real.dims)
    refusal = _in_two_groups(result)
    if refusal is not None:
        return refusal
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers.items()):
        for dim in range(tensor.ndim):
            kind = field_map.depth.canonical(name)
            if (kind, dim) in shares and (name, dim) not in covered:
                last = field_name(finding.fields[-1])
                return Refusal(f"{name} follows {last} but was found in no group")
            # a layer of a deep list, which is not in the shallow model
            if kind not in field_map.shapes and tensor.shape[dim] in widths:
                return Refusal(f"{name} is as wide, and is of no layer that was looked at")
    return result


def _in_two_groups(groups: Sequence[Group]) -> Refusal | None:
    """Return why groups cannot be pruned, or None: two of them hold the same channels."""
    by_place: dict[tuple[str, int], list[tuple[UnitLayout, int]]] = {}
    for group in groups:
        for dim in group.dims:
            by_place.setdefault(dim.place, []).append((dim.layout, group.count.units))
    for (name, axis), layouts in by_place.items():
        if len(layouts) > 1 and share_positions(layouts):
            return Refusal(
                f"{name}: dimension {axis} is in two groups at full size: layers that read each "
                "other, of which the tiny model has fewer"
            )
    return None


def instances(
    group: TinyGroup, field_map: FieldMap, names: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, TensorDim]]:
    """Yield each real group that a tiny group stands for: real parameter name -> tiny tensor dim.

    A group inside one layer of a list exists once in every layer like it; a group across several
    layers holds all of them. A ``#`` and a number behind the name tell two tensor dims of one
    parameter apart.
    """
    depth = field_map.depth
    by_name: dict[str, list[TensorDim]] = {}
    for dim in group.dims:
        by_name.setdefault(depth.first(dim.name), []).append(dim)
    single = _single_layers(group, field_map)
    if any(depth.first(layer) != layer for layer in single):
        return  # the group in the first layer of its kind stands for it
    instances: dict[str, dict[str, TensorDim]] = {}
    for name in names:  # lacks parts that this model was built without (BERT's pooler)
        like = depth.canonical(name)
        home = max((layer for layer in single if like.startswith(f"{layer}.")), default="", key=len)
        real_home = ".".join(name.split(".")[: home.count(".") + 1]) if home else ""
        # like layers have like tensor dims: one of each dimension and layout
        distinct = {(dim.dim, dim.layout): dim for dim in by_name.get(like, [])}
        for number, dim in enumerate(distinct.values()):
            instances.setdefault(real_home, {})[f"{name}#{number}"] = dim
    yield from instances.values()


def _single_layers(group: TinyGroup, field_map: FieldMap) -> set[str]:
    """Return the layers, in lists of like layers, to which a group is confined; none if to none."""
    used: dict[str, set[str]] = {}
    for dim in group.dims:
        inside = False
        for match in _INDEX.finditer(dim.name):
            layers = dim.name[: match.start()]
            if layers in field_map.depth.first_of_kind:
                used.setdefault(layers, set()).add(dim.name[: match.end()])
                inside = True
        if not inside:
            return set()
    return {layer for layers in used.values() if len(layers) == 1 for layer in layers}


def _real_group(
    group: TinyGroup,
    instance: Mapping[str, TensorDim],
    tiny: TinyModel,
    field_map: FieldMap,
    shares: Shares,
    names: Mapping[str, Sequence[str]],
) -> Group | Refusal:
    """Return a group at full size, or the reason why it does not carry over.

    ``group`` is the tiny group, ``instance`` one of its :func:`instances`; ``names`` maps the
    first name of a parameter to all of its names.
    """
    units = units_of(field_map, group.fields)
    matched: list[tuple[str, TensorDim, Share]] = []
    sources = dict(zip(group.dims, group.sources, strict=True))
    for key, dim in instance.items():
        name = key.rpartition("#")[0]
        dim_shares = shares.get((field_map.depth.canonical(name), dim.dim), ())
        share = next((share for share in dim_shares if share.field == sources[dim]), None)
        if share is None and len(dim_shares) == 1 and None in (sources[dim], dim_shares[0].field):
            (share,) = dim_shares  # the only share: one config rounds it, the other does not
        if share is None:
            return Refusal(f"{name}: dimension {dim.dim} does not follow it at full size")
        matched.append((name, dim, share))
    runs = full_runs(group, tiny, field_map)
    part_counts = full_parts(group, [dim for _, dim, _ in matched], tiny, field_map)
    if isinstance(part_counts, Refusal):
        return part_counts
    per_field_unit = full_per_field_unit(group, matched, runs, part_counts)
    if isinstance(per_field_unit, Refusal):
        return per_field_unit
    channel_groups = part_counts.channel_groups or group.channel_groups
    if channel_groups > 1 and part_counts.channel_groups is None:
        counts = full_channel_groups(group, tiny, field_map)
        if len(counts) != 1:
            full = " or ".join(map(str, sorted(counts))) or "an unknown number"
            return Refusal(
                f"its units are in {channel_groups} channel groups in the tiny model; at full "
                f"size in {full}"
            )
        (channel_groups,) = counts
    units *= per_field_unit
    if units % channel_groups:
        return Refusal(f"{units} units do not go into {channel_groups} equal channel groups")
    dims: list[TensorDim] = []
    for name, dim, share in matched:
        layout = full_layout(name, dim, share, per_field_unit, runs, group, tiny, field_map)
        if isinstance(layout, Refusal):
            return layout
        dims += [TensorDim(alias, dim.dim, layout) for alias in names[name]]
    field, *others = group.fields
    field_run = 1 if others else field_map.values[field] // units
    run = max(field_run, *(dim.layout.run for dim in dims))
    count = UnitCount(units, channel_groups, per_field_unit=per_field_unit, run=run)
    real = Group(group.fields, tuple(dims), count)
    return _uneven_heads(real, field_map) or real


def _uneven_heads(group: Group, field_map: FieldMap) -> Refusal | None:
    """Return why units in several parts cannot go, or None: heads would lose unequal shares."""
    for dim in group.dims if group.count.channel_groups == 1 else ():
        splits = field_map.splits_of(dim.layer)
        if splits is None or dim.dim or dim.layout.parts == 1:
            continue
        if splits_after(splits, dim.layout.positions(0, group.count.units)) is None:
            return Refusal(f"{dim.name}: its units are not the same share of every head")
    return None
