"""Carry groups proved on the tiny model over to the real one: all layers, full-size positions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from ..twin.layout import Finding, TensorDim, TinyGroup, UnitLayout, share_positions
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
    buffers = saved_buffers(model)
    names = {names[0]: names for names in parameter_names(model).values()}
    names |= {name: [name] for name in buffers}
    missing = [field for field in finding.fields if field not in field_map.values]
    if missing:
        return Refusal(f"{field_name(missing[0])} sets no width of the full-size model")
    shares = shares_of(field_map, finding.fields)
    if isinstance(shares, Refusal):
        return shares
    result: list[Group] = []
    for group in finding.groups:
        for instance in instances(group, field_map, names):
            real = _real_group(group, instance, tiny, field_map, shares, names)
            if isinstance(real, Refusal):
                return real
            result.append(real)
    refusal = _in_two_groups(result)
    if refusal is not None:
        return refusal
    covered = {dim.place for group in result for dim in group.dims}
    widths = {field_map.values[field] for field in finding.fields}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers.items()):
        kind = field_map.depth.canonical(name)
        for dim, size in enumerate(tensor.shape):
            if (kind, dim) in shares and (name, dim) not in covered:
                last = field_name(finding.fields[-1])
                return Refusal(f"{name} depends on {last} but is in no group")
            # a layer that the shallow model does not have
            if kind not in field_map.shapes and size in widths:
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
    group: TinyGroup, field_map: FieldMap, names: Collection[str]
) -> Iterator[list[tuple[str, TensorDim]]]:
    """Yield the real groups of a tiny group: real parameter names with tiny tensor dims."""
    depth = field_map.depth
    by_name: dict[str, list[TensorDim]] = {}
    for dim in group.dims:
        by_name.setdefault(depth.first(dim.name), []).append(dim)
    # a group inside one layer exists in every layer of that kind; others span all their layers
    single = _single_layers(group, field_map)
    if any(depth.first(layer) != layer for layer in single):
        return  # covered by the group in the first layer of this kind
    by_home: dict[str, list[tuple[str, TensorDim]]] = {}
    for name in names:  # only parts that this model has (BERT may lack its pooler)
        like = depth.canonical(name)
        home = max((layer for layer in single if like.startswith(f"{layer}.")), default="", key=len)
        real_home = ".".join(name.split(".")[: home.count(".") + 1]) if home else ""
        # like layers have like tensor dims: one of each dimension and layout
        distinct = {(dim.dim, dim.layout): dim for dim in by_name.get(like, [])}
        for dim in distinct.values():
            by_home.setdefault(real_home, []).append((name, dim))
    yield from by_home.values()


def _single_layers(group: TinyGroup, field_map: FieldMap) -> set[str]:
    """Return the layers of layer lists that contain a whole group; empty if it spans layers."""
    used: dict[str, set[str]] = {}
    for dim in group.dims:
        found = [(dim.name[: m.start()], dim.name[: m.end()]) for m in _INDEX.finditer(dim.name)]
        inside = [pair for pair in found if pair[0] in field_map.depth.first_of_kind]
        for layers, layer in inside:
            used.setdefault(layers, set()).add(layer)
        if not inside:
            return set()
    return {layer for layers in used.values() if len(layers) == 1 for layer in layers}


def _real_group(
    group: TinyGroup,
    instance: Sequence[tuple[str, TensorDim]],  # one of ``instances(group, ...)``
    tiny: TinyModel,
    field_map: FieldMap,
    shares: Shares,
    names: Mapping[str, Sequence[str]],  # first name of a parameter -> all names
) -> Group | Refusal:
    """Return a group at full size, or why it does not carry over."""
    matched: list[_Matched] = []
    sources = dict(zip(group.dims, group.sources, strict=True))
    for name, dim in instance:
        dim_shares = shares.get((field_map.depth.canonical(name), dim.dim), ())
        share = next((share for share in dim_shares if share.field == sources[dim]), None)
        if share is None and len(dim_shares) == 1 and None in (sources[dim], dim_shares[0].field):
            (share,) = dim_shares  # its field differs because one config rounds the size
        if share is None:
            return Refusal(f"{name}: dimension {dim.dim} is not set by it at full size")
        matched.append((name, dim, share))
    carried = _Carried(group, tiny, field_map)
    part_counts = carried.part_counts([dim for _, dim, _ in matched])
    if isinstance(part_counts, Refusal):
        return part_counts
    per_field_unit = carried.per_field_unit(matched, part_counts)
    if isinstance(per_field_unit, Refusal):
        return per_field_unit
    channel_groups = part_counts.channel_groups or group.channel_groups
    if channel_groups > 1 and part_counts.channel_groups is None:
        counts = carried.channel_groups()
        if len(counts) != 1:
            full = " or ".join(map(str, sorted(counts))) or "an unknown number"
            return Refusal(
                f"its units are in {channel_groups} channel groups in the tiny model, and in "
                f"{full} at full size"
            )
        (channel_groups,) = counts
    units = units_of(field_map, group.fields) * per_field_unit
    if units % channel_groups:
        return Refusal(
            f"{units} units cannot be divided into {channel_groups} equal channel groups"
        )
    dims: list[TensorDim] = []
    for name, dim, share in matched:
        layout = carried.layout(name, dim, share, per_field_unit)
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


_Matched = tuple[str, TensorDim, Share]  # full-size name, tiny tensor dim, share at full size
_Split = tuple[int, ...]  # (heads, [parts,] head_dim)


@dataclass(frozen=True)
class PartCounts:
    """Number of parts in which each dimension holds a unit, if none holds it in one."""

    tiny: int = 1  # common divisor in the tiny model
    full: int = 1  # number at full size
    channel_groups: int | None = None  # at full size; None: not observed


@dataclass(frozen=True)
class _Carried:
    """What the numbers of a tiny model's group become at full size."""

    group: TinyGroup
    tiny: TinyModel
    field_map: FieldMap  # of the full-size model

    @cached_property
    def values(self) -> dict[FieldPath, int]:
        return dict(_numbers(self.field_map.data)) | self.field_map.values

    @cached_property
    def own_splits(self) -> list[tuple[int, _Split, _Split]]:
        """A layer's run, and a head split of its output: in the tiny model, and at full size."""
        return [
            (dim.layout.run, small, full)
            for dim in self.group.dims
            if dim.dim == 0 and self.group.per_field_unit > 1
            for small, full in zip(
                self.tiny.field_map.splits_of(dim.layer) or (),
                self.field_map.full_splits(dim.layer) or (),
                strict=False,
            )
        ]

    @cached_property
    def runs(self) -> dict[int, int]:
        """Run of units that form a head: in the tiny model -> at full size."""
        return {run: full[-1] for run, small, full in self.own_splits if small[-1] == run > 1}

    def run(self, dim: TensorDim) -> int:
        return self.runs.get(dim.layout.run, dim.layout.run)

    def part_counts(self, dims: Sequence[TensorDim]) -> PartCounts | Refusal:
        """Return in how many parts a unit is held at full size, or why that is unknown."""
        group = self.group
        if group.per_field_unit == 1 or any(dim.layout.parts == 1 for dim in dims):
            return PartCounts()
        # Mamba: a unit is one dimension of every head (or of every second, in two channel groups),
        # in as many parts as heads; the field that counts the heads gives the full-size number
        parts = gcd(*(dim.layout.parts for dim in dims))
        counting = parts_counted_by(group, self.tiny)
        if counting is not None and not counting:
            return PartCounts(parts, parts)
        totals = {self.values.get(field, 0) for field in counting or ()}
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

    def per_field_unit(self, matched: Sequence[_Matched], parts_of: PartCounts) -> int | Refusal:
        """Return the units per field unit at full size, or why that is unknown."""
        if self.group.per_field_unit == 1:
            return 1
        single = [entry for entry in matched if entry[1].layout.parts == 1]
        # dims that hold a unit in one part decide; a head's width may differ at full size
        one_position = [entry for entry in single if entry[1].layout.run == 1]
        found: set[int] = set()
        for name, dim, share in one_position or single or matched:
            parts = dim.layout.parts // parts_of.tiny * parts_of.full
            per_field_unit, rest = divmod(share.per_unit, parts * self.run(dim))
            if rest:
                return _not_whole(name, dim)
            found.add(per_field_unit)
        if len(found) > 1:
            return Refusal(
                "its dimensions hold different numbers of channels for each unit at full size: "
                f"{sorted(found)}"
            )
        return found.pop()

    def channel_groups(self) -> set[int]:
        """Return the possible numbers of channel groups at full size; one if it is clear."""
        # the heads of its own layers decide, else a field that is seen to count them, else (torch
        # splits the heads itself) every number that equals this one in the tiny model
        group, count = self.group, self.group.channel_groups
        decided = {full[0] for _, small, full in self.own_splits if small[0] == count}
        around = {_module_of(dim.layer) for dim in group.dims}
        heads = self.tiny.field_map.splits.heads.items()
        beside = (split for layer, some in heads if _module_of(layer) in around for split in some)
        if not decided and all(split[0] != count for split in beside):
            decided = {self.values.get(field, 0) for field in counted_by(group, self.tiny)}
        if decided:
            return decided
        counts = self.head_counts(count, around)
        if group.per_field_unit == 1:
            return counts
        moving = self.tiny.field_map.values | self.tiny.field_map.non_size_fields
        return counts | {self.values.get(field, 0) for field, n in moving.items() if n == count}

    def layout(
        self,
        name: str,
        dim: TensorDim,
        share: Share,
        per_field_unit: int,  # at full size
    ) -> UnitLayout | Refusal:
        """Return the unit layout along a tensor dim at full size, or why it is unknown."""
        group, old, per_unit = self.group, dim.layout, share.per_unit
        if old.parts == old.run == group.per_field_unit == 1 < per_unit:
            return Refusal(
                f"{name}: dimension {dim.dim} has {per_unit} positions for each unit at full size, "
                "but one in the tiny model, so their order is unknown"
            )
        # heads: some tensor dim has one position per unit
        counted = any(other.layout.parts == other.layout.run == 1 for other in group.dims)
        if old.run == 1 and group.per_field_unit == 1:
            parts, run = per_unit, 1  # one position per part; there can be more parts (heads)
        elif group.per_field_unit == 1 or (old.run > 1 and counted):
            parts, run = old.parts, per_unit // (old.parts * per_field_unit)
        else:
            run = self.run(dim)
            parts = per_unit // (run * per_field_unit)
        if parts * run * per_field_unit != per_unit or (old.offset and not share.rest):
            return _not_whole(name, dim)
        blocks = old.blocks
        if blocks > 1:
            counts = self.head_counts(blocks, {_module_of(_module_of(name))})
            if len(counts) != 1:
                return Refusal(
                    f"{name}: the number of blocks in dimension {dim.dim} is unknown at full size"
                )
            (blocks,) = counts
        gap, unequal = divmod(share.rest, parts) if old.gap else (0, 0)
        if unequal:
            return Refusal(
                f"{name}: the gaps between the units of dimension {dim.dim} have different sizes"
            )
        return UnitLayout(parts, run, blocks, (gap or share.rest) if old.offset else 0, gap)

    def head_counts(self, count: int, around: Collection[str]) -> set[int]:
        """Return the head counts at full size that a head count of the tiny model may become."""
        candidates = [
            (_module_of(layer) in around, full[0])
            for layer, splits in self.tiny.field_map.splits.heads.items()
            for small, full in zip(splits, self.field_map.full_splits(layer) or (), strict=False)
            if small[0] == count
        ]
        # those in these modules first: another tower may agree in the tiny model and differ here
        near = {full_count for is_near, full_count in candidates if is_near}
        if candidates:
            return near or {full_count for _, full_count in candidates}
        # the count itself if both configs hold it in the same fields (expert groups)
        numbers = dict(_numbers(self.field_map.data))
        small_data = self.tiny.field_map.data
        counts = {numbers.get(field) for field, value in _numbers(small_data) if value == count}
        return {count} if counts == {count} else set()


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _not_whole(name: str, dim: TensorDim) -> Refusal:
    return Refusal(f"{name}: dimension {dim.dim} is no whole number of units at full size")


def _numbers(node: Any, field: FieldPath = ()) -> Iterator[tuple[FieldPath, int]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _numbers(value, (*field, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*field, key), value
