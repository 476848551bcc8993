"""Carry groups proved on the tiny model over to the real one: all layers, full-size positions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Any

from torch import nn

from ..fieldmap.field_map import FieldMap
from ..fieldmap.unit_shares import Share, Shares, shares_of, units_of
from ..forward.head_splits import splits_after
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.tensors import parameter_names, saved_buffers
from ..reports import short
from ..twin.layout import Finding, TensorDim, TinyGroup, UnitLayout, places_of, share_positions
from ..twin.prove import counted_by, parts_counted_by
from ..twin.tiny.tiny_model import TinyModel
from .unit_count import UnitCount

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Group:
    """A dependency group of the real model: tensor dims that lose the same units."""

    fields: tuple[FieldPath, ...]  # config fields that count its units
    dims: tuple[TensorDim, ...]
    count: UnitCount  # before pruning

    def __repr__(self) -> str:
        fields = " + ".join(map(field_name, self.fields))
        return short(self, f"{fields}: {self.count.units:,} units in {len(self.dims)} dimensions")


def expand(
    finding: Finding, tiny: TinyModel, field_map: FieldMap, model: nn.Module
) -> list[Group] | Refusal:
    """Return the real model's groups of one width, or why they do not carry over."""
    names = {names[0]: names for names in parameter_names(model).values()}
    buffers = saved_buffers(model)
    names.update({name: [name] for name in buffers})
    missing = [field for field in finding.fields if field not in field_map.values]
    if missing:
        return Refusal(f"{field_name(missing[0])} sets no width of the full-size model")
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
                return Refusal(f"{name} depends on {last} but is in no group")
            # a layer that the shallow model does not have
            if kind not in field_map.shapes and tensor.shape[dim] in widths:
                return Refusal(f"{name} is as wide, and no layer of its kind was examined")
    return result


def _in_two_groups(groups: Sequence[Group]) -> Refusal | None:
    """Return why groups cannot be pruned if two of them hold the same channels."""
    by_place: dict[tuple[str, int], list[tuple[UnitLayout, int]]] = {}
    for group in groups:
        for dim in group.dims:
            by_place.setdefault(dim.place, []).append((dim.layout, group.count.units))
    for (name, axis), layouts in by_place.items():
        if len(layouts) > 1 and share_positions(layouts):
            return Refusal(
                f"{name}: dimension {axis} is in two groups at full size, because layers read each "
                "other, and the tiny model has fewer of them"
            )
    return None


def instances(
    group: TinyGroup, field_map: FieldMap, names: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, TensorDim]]:
    """Yield the real groups of a tiny group, each as real parameter name -> tiny tensor dim."""
    depth = field_map.depth
    by_name: dict[str, list[TensorDim]] = {}
    for dim in group.dims:
        by_name.setdefault(depth.first(dim.name), []).append(dim)
    # a group inside one layer exists in every layer of that kind; others span all their layers
    single = _single_layers(group, field_map)
    if any(depth.first(layer) != layer for layer in single):
        return  # covered by the group in the first layer of this kind
    instances: dict[str, dict[str, TensorDim]] = {}
    for name in names:  # only parts that this model has (BERT may lack its pooler)
        like = depth.canonical(name)
        home = max((layer for layer in single if like.startswith(f"{layer}.")), default="", key=len)
        real_home = ".".join(name.split(".")[: home.count(".") + 1]) if home else ""
        # like layers have like tensor dims: one of each dimension and layout
        distinct = {(dim.dim, dim.layout): dim for dim in by_name.get(like, [])}
        for number, dim in enumerate(distinct.values()):
            instances.setdefault(real_home, {})[f"{name}#{number}"] = dim  # several per parameter
    yield from instances.values()


def _single_layers(group: TinyGroup, field_map: FieldMap) -> set[str]:
    """Return the layers of layer lists that contain a whole group; empty if it spans layers."""
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
    instance: Mapping[str, TensorDim],  # one of ``instances(group, ...)``
    tiny: TinyModel,
    field_map: FieldMap,
    shares: Shares,
    names: Mapping[str, Sequence[str]],  # first name of a parameter -> all names
) -> Group | Refusal:
    """Return a group at full size, or why it does not carry over."""
    units = units_of(field_map, group.fields)
    matched: list[tuple[str, TensorDim, Share]] = []
    sources = dict(zip(group.dims, group.sources, strict=True))
    for key, dim in instance.items():
        name = key.rpartition("#")[0]
        dim_shares = shares.get((field_map.depth.canonical(name), dim.dim), ())
        share = next((share for share in dim_shares if share.field == sources[dim]), None)
        if share is None and len(dim_shares) == 1 and None in (sources[dim], dim_shares[0].field):
            (share,) = dim_shares  # its field differs because one config rounds the size
        if share is None:
            return Refusal(f"{name}: dimension {dim.dim} is not set by it at full size")
        matched.append((name, dim, share))
    runs = _full_runs(group, tiny, field_map)
    part_counts = _full_parts(group, [dim for _, dim, _ in matched], tiny, field_map)
    if isinstance(part_counts, Refusal):
        return part_counts
    per_field_unit = _full_per_field_unit(group, matched, runs, part_counts)
    if isinstance(per_field_unit, Refusal):
        return per_field_unit
    channel_groups = part_counts.channel_groups or group.channel_groups
    if channel_groups > 1 and part_counts.channel_groups is None:
        counts = _full_channel_groups(group, tiny, field_map)
        if len(counts) != 1:
            full = " or ".join(map(str, sorted(counts))) or "an unknown number"
            return Refusal(
                f"its units are in {channel_groups} channel groups in the tiny model, and in "
                f"{full} at full size"
            )
        (channel_groups,) = counts
    units *= per_field_unit
    if units % channel_groups:
        return Refusal(
            f"{units} units cannot be divided into {channel_groups} equal channel groups"
        )
    dims: list[TensorDim] = []
    for name, dim, share in matched:
        layout = _full_layout(name, dim, share, per_field_unit, runs, group, tiny, field_map)
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
    """Refuse a group whose units are not the same share of every attention head."""
    for dim in group.dims if group.count.channel_groups == 1 else ():
        splits = field_map.splits_of(dim.layer)
        if splits is None or dim.dim or dim.layout.parts == 1:
            continue
        if splits_after(splits, dim.layout.positions(0, group.count.units)) is None:
            return Refusal(f"{dim.name}: its units are not the same share of every head")
    return None


def _full_runs(group: TinyGroup, tiny: TinyModel, field_map: FieldMap) -> dict[int, int]:
    """Return run of units that form a head: in the tiny model -> at full size."""
    return {
        dim.layout.run: full[-1]
        for dim in group.dims
        if dim.dim == 0 and group.per_field_unit > 1
        for small, full in _splits(dim.layer, tiny, field_map)
        if small[-1] == dim.layout.run > 1
    }


def _splits(
    layer: str, tiny: TinyModel, field_map: FieldMap
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the head splits of a layer's output: in the tiny model, and at full size."""
    full = field_map.full_splits(layer) or ()
    return zip(tiny.field_map.splits_of(layer) or (), full, strict=False)


@dataclass(frozen=True)
class PartCounts:
    """Number of parts in which each dimension holds a unit, if none holds it in one."""

    tiny: int = 1  # common divisor in the tiny model
    full: int = 1  # number at full size
    channel_groups: int | None = None  # at full size; None: not observed


def _full_parts(
    group: TinyGroup, dims: Sequence[TensorDim], tiny: TinyModel, field_map: FieldMap
) -> PartCounts | Refusal:
    """Return in how many parts a unit is held at full size, or why that is unknown."""
    if group.per_field_unit == 1 or any(dim.layout.parts == 1 for dim in dims):
        return PartCounts()
    # Mamba: a unit is one dimension of every head (or of every second, in two channel groups),
    # in as many parts as heads; the field that counts the heads gives the full-size number
    parts = gcd(*(dim.layout.parts for dim in dims))
    values = dict(_numbers(field_map.data)) | field_map.values
    counting = parts_counted_by(group, tiny)
    if counting is not None and not counting:
        return PartCounts(parts, parts)
    totals = {values.get(field, 0) for field in counting or ()}
    if len(totals) == 1:
        (total,) = totals
        if group.channel_groups > 1 and total % parts == 0:
            return PartCounts(parts, parts, total // parts)
        return PartCounts(parts, total, 1)
    if group.channel_groups > 1:
        return PartCounts(parts, parts)
    return Refusal(
        f"a unit is in {parts} places in the tiny model, and in "
        f"{' or '.join(map(str, sorted(totals))) or 'an unknown number'} at full size"
    )


def _full_per_field_unit(
    group: TinyGroup,
    matched: Sequence[tuple[str, TensorDim, Share]],
    runs: Mapping[int, int],
    part_counts: PartCounts,
) -> int | Refusal:
    """Return the units per field unit at full size, or why that is unknown."""
    if group.per_field_unit == 1:
        return 1
    single = [entry for entry in matched if entry[1].layout.parts == 1]
    # dims that hold a unit in one part decide; a head's width may differ at full size
    one_position = [entry for entry in single if entry[1].layout.run == 1]
    per_field_units: set[int] = set()
    for name, dim, share in one_position or single or matched:
        run = runs.get(dim.layout.run, dim.layout.run)
        parts = dim.layout.parts // part_counts.tiny * part_counts.full
        per_field_unit, rest = divmod(share.per_unit, parts * run)
        if rest:
            return Refusal(f"{name}: dimension {dim.dim} is no whole number of units at full size")
        per_field_units.add(per_field_unit)
    if len(per_field_units) > 1:
        return Refusal(
            "its dimensions hold different numbers of channels for each unit at full size: "
            f"{sorted(per_field_units)}"
        )
    return per_field_units.pop()


def _counted(group: TinyGroup) -> bool:
    """True if some tensor dim of a group has one position per unit (heads)."""
    return any(dim.layout.parts == dim.layout.run == 1 for dim in group.dims)


def _full_channel_groups(group: TinyGroup, tiny: TinyModel, field_map: FieldMap) -> set[int]:
    """Return the possible numbers of channel groups at full size; one if it is clear."""
    # the heads of its own layers decide, else a field that is seen to count them, else (torch
    # splits the heads itself) every number that equals this one in the tiny model
    decided = {
        full[0]
        for dim in group.dims
        if dim.dim == 0 and group.per_field_unit > 1
        for small, full in _splits(dim.layer, tiny, field_map)
        if small[0] == group.channel_groups
    }
    full_values = dict(_numbers(field_map.data)) | field_map.values
    if not decided and not _splits_beside(group, tiny):
        decided = {full_values.get(field, 0) for field in counted_by(group, tiny)}
    if decided:
        return decided
    layers = {dim.layer for dim in group.dims}
    counts = _full_counts(group.channel_groups, tiny, field_map, layers)
    if group.per_field_unit == 1:
        return counts
    moving = tiny.field_map.values | tiny.field_map.non_size_fields
    fields = {full_values.get(field, 0) for field, n in moving.items() if n == group.channel_groups}
    return fields | counts


def _splits_beside(group: TinyGroup, tiny: TinyModel) -> bool:
    """True if a neighbouring layer is split into as many heads as the group has channel groups."""
    around = {dim.layer.rpartition(".")[0] for dim in group.dims}
    return any(
        split[0] == group.channel_groups
        for layer, splits in tiny.field_map.splits.heads.items()
        for split in splits
        if layer.rpartition(".")[0] in around
    )


def _full_layout(
    name: str,
    dim: TensorDim,
    share: Share,  # at full size, as are ``per_field_unit`` and ``runs``
    per_field_unit: int,
    runs: Mapping[int, int],  # :func:`_full_runs`
    group: TinyGroup,
    tiny: TinyModel,
    field_map: FieldMap,
) -> UnitLayout | Refusal:
    """Return the unit layout along a tensor dim at full size, or why it is unknown."""
    per_unit = share.per_unit
    parts, run = dim.layout.parts, Fraction(per_unit, dim.layout.parts)
    if dim.layout.parts == dim.layout.run == group.per_field_unit == 1 < per_unit:
        return Refusal(
            f"{name}: dimension {dim.dim} has {per_unit} positions for each unit at full size, but "
            "one in the tiny model, so their order is unknown"
        )
    if dim.layout.run == 1 and group.per_field_unit == 1:
        parts, run = per_unit, Fraction(1)  # one position per part; there can be more parts (heads)
    elif group.per_field_unit > 1 < dim.layout.run and _counted(group):
        run = Fraction(per_unit, parts * per_field_unit)
    elif group.per_field_unit > 1:
        run = Fraction(runs.get(dim.layout.run, dim.layout.run))
        parts = per_unit // int(run * per_field_unit)
        if parts * run * per_field_unit != per_unit:
            return Refusal(f"{name}: dimension {dim.dim} is no whole number of units at full size")
    if run.denominator != 1 or (dim.layout.offset and not share.rest):
        return Refusal(f"{name}: dimension {dim.dim} is no whole number of units at full size")
    blocks = dim.layout.blocks
    if blocks > 1:
        counts = _full_counts(blocks, tiny, field_map, (name.rpartition(".")[0],))
        if len(counts) != 1:
            return Refusal(
                f"{name}: the number of blocks in dimension {dim.dim} is unknown at full size"
            )
        (blocks,) = counts
    gap = Fraction(share.rest, parts) if dim.layout.gap else Fraction(0)
    if gap.denominator != 1:
        return Refusal(
            f"{name}: the gaps between the units of dimension {dim.dim} have different sizes"
        )
    rest = int(gap) if gap else share.rest
    return UnitLayout(parts, int(run), blocks, rest if dim.layout.offset else 0, int(gap))


def _full_counts(
    count: int, tiny: TinyModel, field_map: FieldMap, layers: Collection[str]
) -> set[int]:
    """Return the head counts at full size that a head count of the tiny model may become."""
    around = {layer.rpartition(".")[0] for layer in layers}
    candidates = [
        (layer.rpartition(".")[0] in around, full[0])
        for layer, splits in tiny.field_map.splits.heads.items()
        for small, full in zip(splits, field_map.full_splits(layer) or (), strict=False)
        if small[0] == count
    ]
    # layers beside these first: another tower may agree in the tiny model, and differ at full size
    near = {full_count for is_near, full_count in candidates if is_near}
    anywhere = {full_count for _, full_count in candidates}
    return near or anywhere or _unchanged_count(count, tiny, field_map)


def _unchanged_count(count: int, tiny: TinyModel, field_map: FieldMap) -> set[int]:
    """Return the count itself if both configs hold it in the same fields (expert groups)."""
    small, full = dict(_numbers(tiny.field_map.data)), dict(_numbers(field_map.data))
    fields = [field for field, value in small.items() if value == count]
    return {count} if fields and all(full.get(field) == count for field in fields) else set()


def _numbers(node: Any, field: FieldPath = ()) -> Iterator[tuple[FieldPath, int]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _numbers(value, (*field, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*field, key), value
