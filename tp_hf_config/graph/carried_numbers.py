"""Carry the numbers of a group over from the tiny model to full size: runs, parts, layouts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Any

from ..fieldmap.field_map import FieldMap
from ..fieldmap.unit_shares import Share
from ..model.build import Refusal
from ..model.config_json import FieldPath
from ..twin.group import TinyGroup
from ..twin.layout import TensorDim, UnitLayout
from ..twin.prove import counted_by, parts_counted_by
from ..twin.tiny.tiny_model import TinyModel


def full_runs(group: TinyGroup, tiny: TinyModel, field_map: FieldMap) -> dict[int, int]:
    """Return the runs of units that are a head of a layer: in the tiny model -> at full size."""
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
    """Return the head splits of a layer's output in the tiny model, each with that at full size."""
    full = field_map.full_splits(layer) or ()
    return zip(tiny.field_map.splits_of(layer) or (), full, strict=False)


@dataclass(frozen=True)
class PartCounts:
    """In how many parts of a dimension a unit stands, where each dimension has several.

    Attributes:
        tiny: how many in the tiny model, at least.
        full: how many at full size.
        channel_groups: how many channel groups there are then; ``None``: that is not seen.
    """

    tiny: int = 1
    full: int = 1
    channel_groups: int | None = None


def full_parts(
    group: TinyGroup, dims: Sequence[TensorDim], tiny: TinyModel, field_map: FieldMap
) -> PartCounts | Refusal:
    """Return in how many parts a unit stands at full size, or a refusal if that cannot be told.

    One dimension of every Mamba head is a unit, in as many parts as there are heads; or of every
    second head, in two channel groups. The field that is seen to count the heads says how many
    there are at full size.
    """
    if group.per_field_unit == 1 or any(dim.layout.parts == 1 for dim in dims):
        return PartCounts()
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
        f"a unit is in {parts} places in the tiny model; at full size in "
        f"{' or '.join(map(str, sorted(totals))) or 'an unknown number'}"
    )


def full_per_field_unit(
    group: TinyGroup,
    matched: Sequence[tuple[str, TensorDim, Share]],
    runs: Mapping[int, int],
    part_counts: PartCounts,
) -> int | Refusal:
    """Return the units per field unit at full size, or a refusal if they cannot be told.

    Tensor dims that hold a unit in one part decide; where each holds it in several, ``part_counts``
    says how many those are.
    """
    if group.per_field_unit == 1:
        return 1
    single = [entry for entry in matched if entry[1].layout.parts == 1]
    # a head's width may differ at full size
    one_position = [entry for entry in single if entry[1].layout.run == 1]
    per_field_units: set[int] = set()
    for name, dim, share in one_position or single or matched:
        run = runs.get(dim.layout.run, dim.layout.run)
        parts = dim.layout.parts // part_counts.tiny * part_counts.full
        per_field_unit, rest = divmod(share.per_unit, parts * run)
        if rest:
            return Refusal(f"{name}: dimension {dim.dim} holds no whole units at full size")
        per_field_units.add(per_field_unit)
    if len(per_field_units) > 1:
        return Refusal(
            f"its dimensions hold {sorted(per_field_units)} channels a unit at full size"
        )
    return per_field_units.pop()


def _counted(group: TinyGroup) -> bool:
    """True if some tensor dim of a group has one position for each of its units (heads)."""
    return any(dim.layout.parts == dim.layout.run == 1 for dim in group.dims)


def full_channel_groups(group: TinyGroup, tiny: TinyModel, field_map: FieldMap) -> set[int]:
    """Return the numbers of channel groups that a group may have at full size: one if it is clear.

    The heads of its own layers decide, or a field that is seen to count them. If there is neither
    (torch splits the heads itself), all numbers that are as large in the tiny model have to agree.
    """
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
    """True if a layer beside the group's is split into as many heads as it has channel groups."""
    around = {dim.layer.rpartition(".")[0] for dim in group.dims}
    return any(
        split[0] == group.channel_groups
        for layer, splits in tiny.field_map.splits.heads.items()
        for split in splits
        if layer.rpartition(".")[0] in around
    )


def full_layout(
    name: str,
    dim: TensorDim,
    share: Share,
    per_field_unit: int,
    runs: Mapping[int, int],
    group: TinyGroup,
    tiny: TinyModel,
    field_map: FieldMap,
) -> UnitLayout | Refusal:
    """Return the unit layout along a tensor dim at full size, or a refusal if it cannot be told.

    ``dim`` and ``group`` are of the tiny model; ``share``, ``per_field_unit`` and ``runs`` (see
    :func:`full_runs`) are at full size.
    """
    per_unit = share.per_unit
    parts, run = dim.layout.parts, Fraction(per_unit, dim.layout.parts)
    if dim.layout.parts == dim.layout.run == group.per_field_unit == 1 < per_unit:
        return Refusal(
            f"{name}: {per_unit} positions of dimension {dim.dim} go with a unit at full size, one "
            "in the tiny model, so that their order was not seen"
        )
    if dim.layout.run == 1 and group.per_field_unit == 1:
        parts, run = per_unit, Fraction(1)  # one position per part; there can be more parts (heads)
    elif group.per_field_unit > 1 < dim.layout.run and _counted(group):
        run = Fraction(per_unit, parts * per_field_unit)
    elif group.per_field_unit > 1:
        run = Fraction(runs.get(dim.layout.run, dim.layout.run))
        parts = per_unit // int(run * per_field_unit)
        if parts * run * per_field_unit != per_unit:
            return Refusal(f"{name}: dimension {dim.dim} holds no whole units at full size")
    if run.denominator != 1 or (dim.layout.offset and not share.rest):
        return Refusal(f"{name}: dimension {dim.dim} holds no whole units at full size")
    blocks = dim.layout.blocks
    if blocks > 1:
        counts = _full_counts(blocks, tiny, field_map, (name.rpartition(".")[0],))
        if len(counts) != 1:
            return Refusal(f"{name}: blocks of the tiny model cannot be told at full size")
        (blocks,) = counts
    gap = Fraction(share.rest, parts) if dim.layout.gap else Fraction(0)
    if gap.denominator != 1:
        return Refusal(f"{name}: what stands between the units of dimension {dim.dim} is uneven")
    rest = int(gap) if gap else share.rest
    return UnitLayout(parts, int(run), blocks, rest if dim.layout.offset else 0, int(gap))


def _full_counts(
    count: int, tiny: TinyModel, field_map: FieldMap, layers: Collection[str]
) -> set[int]:
    """Return the head counts at full size that a head count of the tiny model may stand for.

    Heads of ``layers``, or of the layers beside them, decide first: another tower may have as many
    in the tiny model, and another number at full size.
    """
    around = {layer.rpartition(".")[0] for layer in layers}
    candidates = [
        (layer.rpartition(".")[0] in around, full[0])
        for layer, splits in tiny.field_map.splits.heads.items()
        for small, full in zip(splits, field_map.full_splits(layer) or (), strict=False)
        if small[0] == count
    ]
    near = {full_count for is_near, full_count in candidates if is_near}
    anywhere = {full_count for _, full_count in candidates}
    return near or anywhere or _unchanged_count(count, tiny, field_map)


def _unchanged_count(count: int, tiny: TinyModel, field_map: FieldMap) -> set[int]:
    """Return the number itself if fields say it in both configs (a router's groups of experts)."""
    small, full = dict(_numbers(tiny.field_map.data)), dict(_numbers(field_map.data))
    fields = [field for field, value in small.items() if value == count]
    return {count} if fields and all(full.get(field) == count for field in fields) else set()


def _numbers(node: Any, field: FieldPath = ()) -> Iterator[tuple[FieldPath, int]]:
    """Yield each whole number in a config's JSON, with its field."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _numbers(value, (*field, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*field, key), value
