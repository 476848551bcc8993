"""Carry groups proved on the tiny model over to the real one: all layers, full-size positions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

from torch import nn

from ..fieldmap.field_map import FieldMap
from ..fieldmap.unit_shares import Share, Shares, shares_of, units_of
from ..forward.head_splits import splits_after
from ..model.config_json import FieldPath, field_name
from ..model.tensors import parameter_names, saved_buffers
from ..notebook import short
from ..twin.channel_groups import counted_by
from ..twin.group import Finding, TinyGroup
from ..twin.layout import TensorDim, UnitLayout
from ..twin.tiny.tiny_model import TinyModel
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
) -> list[Group] | str:
    """Return the real model's groups of one width, or the reason why they do not carry over.

    Args:
        finding: the groups of the tiny model.
        tiny: the tiny model.
        field_map: of the real model.
        model: the real model.
    """
    names = {names[0]: names for names in parameter_names(model).values()}
    buffers = saved_buffers(model)
    names.update({name: [name] for name in buffers})
    missing = [field for field in finding.fields if field not in field_map.values]
    if missing:
        return f"{field_name(missing[0])} sets no width of the real model"
    shares = shares_of(field_map, finding.fields)
    if isinstance(shares, str):
        return shares
    result: list[Group] = []
    covered: set[tuple[str, int]] = set()
    widths = {field_map.values[field] for field in finding.fields}
    for group in finding.groups:
        for instance in _instances(group, field_map, names):
            real = _real_group(group, instance, tiny, field_map, shares, names)
            if isinstance(real, str):
                return real
            result.append(real)
            covered |= {(member.name, member.dim) for member in real.dims}
    twice = _in_two_groups(result)
    if twice is not None:
        return twice
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers.items()):
        for dim in range(tensor.ndim):
            kind = field_map.depth.canonical(name)
            if (kind, dim) in shares and (name, dim) not in covered:
                return f"{name} follows {field_name(finding.fields[-1])} but was found in no group"
            # a layer of a deep list, which is not in the shallow model
            if kind not in field_map.shapes and tensor.shape[dim] in widths:
                return f"{name} is as wide, and is of no layer that was looked at"
    return result


def _in_two_groups(groups: Sequence[Group]) -> str | None:
    """Return why groups cannot be pruned, or None: two of them hold the same channels."""
    holding: dict[tuple[str, int], list[tuple[int, UnitLayout]]] = {}
    for group in groups:
        for member in group.dims:
            holding.setdefault((member.name, member.dim), []).append(
                (group.count.units, member.layout)
            )
    for (name, dim), layouts in holding.items():
        if len(layouts) > 1:
            held = [layout.table(units).flatten().tolist() for units, layout in layouts]
            if len(set().union(*held)) < sum(map(len, held)):
                return (
                    f"{name}: dimension {dim} is in two groups at full size: layers that read each "
                    "other, of which the tiny model has fewer"
                )
    return None


def _instances(
    group: TinyGroup, field_map: FieldMap, names: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, TensorDim]]:
    """Yield each real group that a tiny group stands for: real parameter name -> tiny tensor dim.

    A group inside one layer of a list exists once in every layer like it; a group across several
    layers holds all of them.  A ``#`` and a number behind the name tell two tensor dims of one
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
        inside = ".".join(name.split(".")[: home.count(".") + 1]) if home else ""
        for number, dim in enumerate(_distinct(by_name.get(like, []))):
            instances.setdefault(inside, {})[f"{name}#{number}"] = dim
    yield from instances.values()


def _distinct(dims: Sequence[TensorDim]) -> list[TensorDim]:
    """Return one tensor dim of each (dimension, layout): like layers have like tensor dims."""
    return list({(dim.dim, dim.layout): dim for dim in dims}.values())


def _single_layers(group: TinyGroup, field_map: FieldMap) -> set[str]:
    """Return the layers to which a group is confined: it is in no other layer of their lists.

    Returns:
        Names of layers in lists of like layers; none if a tensor dim is outside of such lists.
    """
    used: dict[str, set[str]] = {}
    for dim in group.dims:
        inside = False
        for match in _INDEX.finditer(dim.name):
            layers = dim.name[: match.start()]
            if layers in field_map.depth.alike:
                used.setdefault(layers, set()).add(dim.name[: match.end()])
                inside = True
        if not inside:
            return set()
    return {next(iter(layers)) for layers in used.values() if len(layers) == 1}


def _real_group(
    group: TinyGroup,
    instance: Mapping[str, TensorDim],
    tiny: TinyModel,
    field_map: FieldMap,
    shares: Shares,
    names: Mapping[str, Sequence[str]],
) -> Group | str:
    """Return a group at full size, or the reason why it does not carry over.

    ``group`` is the tiny group, ``instance`` one of its :func:`_instances`; ``names`` maps the
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
            return f"{name}: dimension {dim.dim} does not follow it at full size"
        matched.append((name, dim, share))
    runs = _real_runs(group, tiny, field_map)
    per_field_unit = _real_grain(group, matched, runs)
    if isinstance(per_field_unit, str):
        return per_field_unit
    channel_groups = group.channel_groups
    if channel_groups > 1:
        counts = _real_classes(group, tiny, field_map, per_field_unit)
        if len(counts) != 1:
            full = " or ".join(map(str, sorted(counts))) or "an unknown number"
            return (
                f"its units are in {channel_groups} channel groups in the tiny model; at full "
                f"size in {full}"
            )
        (channel_groups,) = counts
        if units * per_field_unit % channel_groups:
            total = units * per_field_unit
            return f"{total} units do not go into {channel_groups} equal channel groups"
    dims: list[TensorDim] = []
    for name, dim, share in matched:
        layout = _real_layout(name, dim, share, per_field_unit, runs, group, tiny, field_map)
        if isinstance(layout, str):
            return layout
        dims += [TensorDim(alias, dim.dim, layout) for alias in names[name]]
    field, *others = group.fields
    field_run = 1 if others else field_map.values[field] // (units * per_field_unit)
    run = max(field_run, *(dim.layout.run for dim in dims))
    count = UnitCount(
        units * per_field_unit, channel_groups, per_field_unit=per_field_unit, run=run
    )
    real = Group(group.fields, tuple(dims), count)
    return _uneven_heads(real, field_map) or real


def _real_runs(group: TinyGroup, tiny: TinyModel, field_map: FieldMap) -> dict[int, int]:
    """Return the runs of units that are a head of a layer: in the tiny model -> at full size."""
    runs: dict[int, int] = {}
    for dim in group.dims if group.per_field_unit > 1 else ():
        layer = dim.name.rpartition(".")[0]
        small, real = tiny.field_map.splits_of(layer) or (), field_map.layout.heads.get(layer, ())
        for split, full in zip(small, real, strict=False) if dim.dim == 0 else ():
            if split[-1] == dim.layout.run > 1:
                runs[dim.layout.run] = full[-1]
    return runs


def _real_grain(
    group: TinyGroup, found: Sequence[tuple[str, TensorDim, Share]], runs: Mapping[int, int]
) -> int | str:
    """Return the units per field unit at full size, or the reason why they cannot be told.

    Tensor dims that hold a unit in one place decide; of several places there can be more or fewer.
    """
    if group.per_field_unit == 1:
        return 1
    single = [entry for entry in found if entry[1].layout.parts == 1]
    # a head's width may differ at full size
    alone = [entry for entry in single if entry[1].layout.run == 1]
    per_field_units: set[int] = set()
    for name, dim, share in alone or single or found:
        run = runs.get(dim.layout.run, dim.layout.run)
        per_field_unit, rest = divmod(share.per_unit, dim.layout.parts * run)
        if rest:
            return f"{name}: dimension {dim.dim} holds no whole units at full size"
        per_field_units.add(per_field_unit)
    if len(per_field_units) > 1:
        return f"its dimensions hold {sorted(per_field_units)} channels a unit at full size"
    return per_field_units.pop()


def _counted(group: TinyGroup) -> bool:
    """True if some tensor dim of a group has one position for each of its units (heads)."""
    return any(dim.layout.parts == dim.layout.run == 1 for dim in group.dims)


def _real_classes(
    group: TinyGroup, tiny: TinyModel, field_map: FieldMap, per_field_unit: int
) -> set[int]:
    """Return the numbers of channel groups that a group may have at full size.

    The heads of its own layers decide, or a field that is seen to count them.  If there is neither
    (torch splits the heads itself), all numbers that are as large in the tiny model have to agree.
    They may be equal there by chance: if a field unit has one unit in every channel group, there
    are at least ``per_field_unit`` channel groups (Falcon-H1's dims of heads, with as many key
    heads).

    Returns:
        A single number if it can be told; none or several if not.
    """
    own = {dim.name.rpartition(".")[0] for dim in group.dims if dim.dim == 0}
    decided: set[int] = set()
    for layer in own if group.per_field_unit > 1 else ():
        small, real = tiny.field_map.splits_of(layer) or (), field_map.layout.heads.get(layer, ())
        pairs = zip(small, real, strict=False)
        decided |= {full[0] for split, full in pairs if split[0] == group.channel_groups}
    full_values = dict(_numbers(field_map.data)) | field_map.values
    if not decided and not _splits_beside(group, tiny):
        decided = {full_values.get(field, 0) for field in counted_by(group, tiny)}
    if decided:
        return decided
    layers = {dim.name.rpartition(".")[0] for dim in group.dims}
    if group.per_field_unit == 1:
        return _real_counts(group.channel_groups, tiny, field_map, layers)
    moving = tiny.field_map.values | tiny.field_map.silent
    fields = {full_values.get(field, 0) for field, n in moving.items() if n == group.channel_groups}
    counts = fields | _real_counts(group.channel_groups, tiny, field_map, layers)
    return (
        {lcm(*counts, per_field_unit)}
        if group.channel_groups == group.per_field_unit and len(counts) == 1
        else counts
    )


def _splits_beside(group: TinyGroup, tiny: TinyModel) -> bool:
    """True if a layer beside the group's is split into as many heads as it has channel groups."""
    around = {dim.name.rpartition(".")[0].rpartition(".")[0] for dim in group.dims}
    return any(
        split[0] == group.channel_groups
        for layer, splits in tiny.field_map.layout.heads.items()
        for split in splits
        if layer.rpartition(".")[0] in around
    )


def _uneven_heads(group: Group, field_map: FieldMap) -> str | None:
    """Return why units in several places cannot go, or None: heads would lose unequal shares."""
    for dim in group.dims if group.count.channel_groups == 1 else ():
        splits = field_map.splits_of(dim.name.rpartition(".")[0])
        if splits is None or dim.dim or dim.layout.parts == 1:
            continue
        if splits_after(splits, dim.layout.positions(0, group.count.units)) is None:
            return f"{dim.name}: its units are not the same share of every head"
    return None


def _real_layout(
    name: str,
    dim: TensorDim,
    share: Share,
    per_field_unit: int,
    runs: Mapping[int, int],
    group: TinyGroup,
    tiny: TinyModel,
    field_map: FieldMap,
) -> UnitLayout | str:
    """Return the unit layout along a tensor dim at full size, or the reason why it cannot be told.

    ``dim`` and ``group`` are of the tiny model; ``share``, ``per_field_unit`` and ``runs`` (see
    :func:`_real_runs`) are at full size.
    """
    per_unit = share.per_unit
    parts, run = dim.layout.parts, Fraction(per_unit, dim.layout.parts)
    if dim.layout.parts == dim.layout.run == group.per_field_unit == 1 < per_unit:
        return (
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
            return f"{name}: dimension {dim.dim} holds no whole units at full size"
    if run.denominator != 1 or (dim.layout.offset and not share.rest):
        return f"{name}: dimension {dim.dim} holds no whole units at full size"
    blocks = dim.layout.blocks
    if blocks > 1:
        counts = _real_counts(blocks, tiny, field_map, (name.rpartition(".")[0],))
        if len(counts) != 1:
            return f"{name}: blocks of the tiny model cannot be told at full size"
        (blocks,) = counts
    gap = Fraction(share.rest, parts) if dim.layout.gap else Fraction(0)
    if gap.denominator != 1:
        return f"{name}: what stands between the units of dimension {dim.dim} is uneven"
    rest = int(gap) if gap else share.rest
    return UnitLayout(parts, int(run), blocks, rest if dim.layout.offset else 0, int(gap))


def _real_counts(
    count: int, tiny: TinyModel, field_map: FieldMap, layers: Collection[str]
) -> set[int]:
    """Return the head counts at full size that a head count of the tiny model may stand for.

    Heads of ``layers``, or of the layers beside them, decide first: another tower may have as many
    in the tiny model, and another number at full size.
    """
    around = {layer.rpartition(".")[0] for layer in layers}
    near: set[int] = set()
    anywhere: set[int] = set()
    for layer, splits in tiny.field_map.layout.heads.items():
        real = field_map.layout.heads.get(layer, ())
        for small, full in zip(splits, real, strict=False):
            if small[0] == count:
                anywhere.add(full[0])
                near |= {full[0]} if layer.rpartition(".")[0] in around else set()
    return near or anywhere or _kept_numbers(count, tiny, field_map)


def _kept_numbers(count: int, tiny: TinyModel, field_map: FieldMap) -> set[int]:
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
