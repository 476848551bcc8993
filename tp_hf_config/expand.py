"""From groups proved on the tiny copy to groups of the real model: every layer, real positions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

from torch import nn

from .counted import counted_by
from .directions import Share, Shares, shares_of, units_of
from .heads import splits_after
from .learn import ConfigMap
from .miniature import Miniature
from .notebook import short
from .proofs import Finding, Group
from .reference import FieldPath, field_name
from .ties import parameter_names, saved_buffers
from .twins import Dim, Layout

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter of the real model, and where its units stand.

    Attributes:
        name: the parameter's name; a tied weight is listed under each of its names.
        dim: the dimension.
        layout: how the units stand along it.
    """

    name: str
    dim: int
    layout: Layout


@dataclass(frozen=True)
class WidthGroup:
    """Dimensions of the real model that lose the same units.

    Attributes:
        fields: the config fields that count its units.
        members: its dimensions.
        units: how many units it has when nothing is pruned.
        classes: units are interchangeable inside each of so many equal runs; 1: all of them.
        grain: how many of its units go with one unit of the fields.
        least: fewer units, and the class does not run.
        apart: how many channels a unit is that are not neighbours (one of every group of a
            convolution).
    """

    fields: tuple[FieldPath, ...]
    members: tuple[Member, ...]
    units: int
    classes: int
    grain: int = 1
    least: int = 1
    apart: int = 1

    def __repr__(self) -> str:
        fields = " + ".join(map(field_name, self.fields))
        return short(self, f"{fields}: {self.units:,} units in {len(self.members)} dimensions")

    @property
    def run(self) -> int:
        """How many channels a unit is."""
        return max(self.apart, *(member.layout.run for member in self.members))


def expand(
    finding: Finding, mini: Miniature, known: ConfigMap, model: nn.Module
) -> list[WidthGroup] | str:
    """The real model's groups of one width, or why what was found does not carry over."""
    names = {names[0]: names for names in parameter_names(model).values()}
    buffers = saved_buffers(model)
    names.update({name: [name] for name in buffers})
    missing = [path for path in finding.fields if path not in known.values]
    if missing:
        return f"{field_name(missing[0])} sets no width of the real model"
    shares = shares_of(known, finding.fields)
    if isinstance(shares, str):
        return shares
    result: list[WidthGroup] = []
    covered: set[tuple[str, int]] = set()
    widths = {known.values[path] for path in finding.fields}
    for group in finding.groups:
        for instance in _instances(group, known, names):
            real = _real_group(group, instance, mini, known, shares, names)
            if isinstance(real, str):
                return real
            result.append(real)
            covered |= {(member.name, member.dim) for member in real.members}
    twice = _in_two_groups(result)
    if twice is not None:
        return twice
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers.items()):
        for dim in range(tensor.ndim):
            kind = known.depth.canonical(name)
            if (kind, dim) in shares and (name, dim) not in covered:
                return f"{name} follows {field_name(finding.fields[-1])} but was found in no group"
            if kind not in known.shapes and tensor.shape[dim] in widths:  # a layer of a deep list
                return f"{name} is as wide, and is of no layer that was looked at"
    return result


def _in_two_groups(groups: Sequence[WidthGroup]) -> str | None:
    """Why groups cannot go that hold the same channels."""
    holding: dict[tuple[str, int], list[tuple[int, Layout]]] = {}
    for group in groups:
        for member in group.members:
            holding.setdefault((member.name, member.dim), []).append((group.units, member.layout))
    for (name, dim), layouts in holding.items():
        if len(layouts) > 1:
            held = [layout.table(units).flatten().tolist() for units, layout in layouts]
            if len(set().union(*held)) < sum(map(len, held)):
                return (
                    f"{name}: dimension {dim} is in two groups at full size: layers that read each "
                    "other, of which the tiny copy has fewer"
                )
    return None


def _instances(
    group: Group, known: ConfigMap, names: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Dim]]:
    """Real parameter names of each real group that is like a tiny one, with the tiny dimension.

    A group inside one layer of a list stands once in every layer that is like it; a group that
    reaches over several layers holds all of them.  Two dimensions of one parameter are told apart
    by a ``#`` and a number behind the name.
    """
    depth = known.depth
    by_name: dict[str, list[Dim]] = {}
    for dim in group.dims:
        by_name.setdefault(depth.first(dim.name), []).append(dim)
    single = _single_layers(group, known)
    if any(depth.first(layer) != layer for layer in single):
        return  # the same as in the first layer of its kind
    found: dict[str, dict[str, Dim]] = {}
    for name in names:  # a part that this model was built without (BERT's pooler) has none
        like = depth.canonical(name)
        home = max((layer for layer in single if like.startswith(f"{layer}.")), default="", key=len)
        inside = ".".join(name.split(".")[: home.count(".") + 1]) if home else ""
        for number, dim in enumerate(_distinct(by_name.get(like, []))):
            found.setdefault(inside, {})[f"{name}#{number}"] = dim
    yield from found.values()


def _distinct(dims: Sequence[Dim]) -> list[Dim]:
    """One of each (dimension, layout): layers that are alike have alike dimensions."""
    return list({(dim.dim, dim.layout): dim for dim in dims}.values())


def _single_layers(group: Group, known: ConfigMap) -> set[str]:
    """The layers in lists of like layers in which a group uses no other layer."""
    used: dict[str, set[str]] = {}
    for dim in group.dims:
        inside = False
        for match in _INDEX.finditer(dim.name):
            path = dim.name[: match.start()]
            if path in known.depth.alike:
                used.setdefault(path, set()).add(dim.name[: match.end()])
                inside = True
        if not inside:
            return set()
    return {next(iter(layers)) for layers in used.values() if len(layers) == 1}


def _real_group(
    group: Group,
    instance: Mapping[str, Dim],
    mini: Miniature,
    known: ConfigMap,
    shares: Shares,
    names: Mapping[str, Sequence[str]],
) -> WidthGroup | str:
    units = units_of(known, group.fields)
    found: list[tuple[str, Dim, Share]] = []
    sources = dict(zip(group.dims, group.sources, strict=True))
    for key, dim in instance.items():
        name = key.rpartition("#")[0]
        mine = shares.get((known.depth.canonical(name), dim.dim), ())
        share = next((share for share in mine if share.field == sources[dim]), None)
        if share is None and len(mine) == 1 and None in (sources[dim], mine[0].field):
            (share,) = mine  # all that moves there: rounded in one config, a line in the other
        if share is None:
            return f"{name}: dimension {dim.dim} does not follow it at full size"
        found.append((name, dim, share))
    runs = _real_runs(group, mini, known)
    grain = _real_grain(group, found, runs)
    if isinstance(grain, str):
        return grain
    classes = group.classes
    if classes > 1:
        counts = _real_classes(group, mini, known, grain)
        if len(counts) != 1:
            full = " or ".join(map(str, sorted(counts))) or "an unknown number"
            return f"its units go in {classes} classes in the tiny copy; at full size in {full}"
        (classes,) = counts
        if units * grain % classes:
            return f"{units * grain} units do not go into {classes} equal classes"
    members: list[Member] = []
    for name, dim, share in found:
        layout = _real_layout(name, dim, share, grain, runs, group, mini, known)
        if isinstance(layout, str):
            return layout
        members += [Member(alias, dim.dim, layout) for alias in names[name]]
    path, *others = group.fields
    apart = 1 if others else known.values[path] // (units * grain)
    real = WidthGroup(group.fields, tuple(members), units * grain, classes, grain, apart=apart)
    return _uneven_heads(real, known) or real


def _real_runs(group: Group, mini: Miniature, known: ConfigMap) -> dict[int, int]:
    """The run of a group's units -> what it is at full size, where that is a head of its layers."""
    found: dict[int, int] = {}
    for dim in group.dims if group.grain > 1 else ():
        layer = dim.name.rpartition(".")[0]
        tiny, real = mini.known.splits_of(layer) or (), known.layout.heads.get(layer, ())
        for split, full in zip(tiny, real, strict=False) if dim.dim == 0 else ():
            if split[-1] == dim.layout.run > 1:
                found[dim.layout.run] = full[-1]
    return found


def _real_grain(
    group: Group, found: Sequence[tuple[str, Dim, Share]], runs: Mapping[int, int]
) -> int | str:
    """How many units of a group go with one of the fields at full size.

    Dimensions that hold a unit in one place tell; of several places there can be more or fewer.
    """
    if group.grain == 1:
        return 1
    single = [one for one in found if one[1].layout.parts == 1]
    alone = [one for one in single if one[1].layout.run == 1]  # heads are wider or not
    grains: set[int] = set()
    for name, dim, share in alone or single or found:
        run = runs.get(dim.layout.run, dim.layout.run)
        grain, left = divmod(share.per_unit, dim.layout.parts * run)
        if left:
            return f"{name}: dimension {dim.dim} holds no whole units at full size"
        grains.add(grain)
    if len(grains) > 1:
        return f"its dimensions hold {sorted(grains)} channels a unit at full size"
    return grains.pop()


def _counted(group: Group) -> bool:
    """Whether some dimension of a group has one position for each of its units (heads)."""
    return any(dim.layout.parts == dim.layout.run == 1 for dim in group.dims)


def _real_classes(group: Group, mini: Miniature, known: ConfigMap, grain: int) -> set[int]:
    """In how many classes the units of a group go at full size; several: it cannot be told.

    The heads of its own layers tell, or a field that is seen to count them; where there is neither
    (torch splits them itself), all that is as many in the tiny copy has to agree.  That may be by
    chance: where a unit of the fields is one of every class there, each class is as fine as
    ``grain``, the same at full size, says (Falcon-H1's dims of heads, with as many heads of keys).
    """
    own = {dim.name.rpartition(".")[0] for dim in group.dims if dim.dim == 0}
    found: set[int] = set()
    for layer in own if group.grain > 1 else ():
        tiny, real = mini.known.splits_of(layer) or (), known.layout.heads.get(layer, ())
        pairs = zip(tiny, real, strict=False)
        found |= {full[0] for split, full in pairs if split[0] == group.classes}
    full_values = dict(_numbers(known.data)) | known.values
    if not found and not _splits_beside(group, mini):
        found = {full_values.get(path, 0) for path in counted_by(group, mini)}
    if found:
        return found
    layers = {dim.name.rpartition(".")[0] for dim in group.dims}
    if group.grain == 1:
        return _real_counts(group.classes, mini, known, layers)
    moving = mini.known.values | mini.known.silent
    fields = {full_values.get(path, 0) for path, n in moving.items() if n == group.classes}
    counts = fields | _real_counts(group.classes, mini, known, layers)
    return {lcm(*counts, grain)} if group.classes == group.grain and len(counts) == 1 else counts


def _splits_beside(group: Group, mini: Miniature) -> bool:
    """Whether a layer beside one of a group's is split into as many heads as it has classes."""
    around = {dim.name.rpartition(".")[0].rpartition(".")[0] for dim in group.dims}
    return any(
        split[0] == group.classes
        for layer, splits in mini.known.layout.heads.items()
        for split in splits
        if layer.rpartition(".")[0] in around
    )


def _uneven_heads(group: WidthGroup, known: ConfigMap) -> str | None:
    """Why a unit that stands in several places cannot go: it is not as much of every head."""
    for member in group.members if group.classes == 1 else ():
        splits = known.splits_of(member.name.rpartition(".")[0])
        if splits is None or member.dim or member.layout.parts == 1:
            continue
        if splits_after(splits, member.layout.positions(0, group.units)) is None:
            return f"{member.name}: its units are not the same share of every head"
    return None


def _real_layout(
    name: str,
    dim: Dim,
    share: Share,
    grain: int,
    runs: Mapping[int, int],
    group: Group,
    mini: Miniature,
    known: ConfigMap,
) -> Layout | str:
    per_unit = share.per_unit
    parts, run = dim.layout.parts, Fraction(per_unit, dim.layout.parts)
    if dim.layout.parts == dim.layout.run == group.grain == 1 < per_unit:
        return (
            f"{name}: {per_unit} positions of dimension {dim.dim} go with a unit at full size, one "
            "in the tiny copy, so that their order was not seen"
        )
    if dim.layout.run == 1 and group.grain == 1:
        parts, run = per_unit, Fraction(1)  # one position in every part: there can be more (heads)
    elif group.grain > 1 < dim.layout.run and _counted(group):
        run = Fraction(per_unit, parts * grain)
    elif group.grain > 1:
        run = Fraction(runs.get(dim.layout.run, dim.layout.run))
        parts = per_unit // int(run * grain)
        if parts * run * grain != per_unit:
            return f"{name}: dimension {dim.dim} holds no whole units at full size"
    if run.denominator != 1 or (dim.layout.offset and not share.rest):
        return f"{name}: dimension {dim.dim} holds no whole units at full size"
    blocks = dim.layout.blocks
    if blocks > 1:
        found = _real_counts(blocks, mini, known, (name.rpartition(".")[0],))
        if len(found) != 1:
            return f"{name}: blocks of the tiny copy cannot be told at full size"
        (blocks,) = found
    gap = Fraction(share.rest, parts) if dim.layout.gap else Fraction(0)
    if gap.denominator != 1:
        return f"{name}: what stands between the units of dimension {dim.dim} is uneven"
    rest = int(gap) if gap else share.rest
    return Layout(parts, int(run), blocks, rest if dim.layout.offset else 0, int(gap))


def _real_counts(
    count: int, mini: Miniature, known: ConfigMap, layers: Collection[str]
) -> set[int]:
    """What a number of heads in the tiny copy is in the real model.

    The heads of some layers, or of those beside them, tell first: another tower may have as many in
    the tiny copy, and another number at full size.
    """
    around = {layer.rpartition(".")[0] for layer in layers}
    near: set[int] = set()
    found: set[int] = set()
    for layer, splits in mini.known.layout.heads.items():
        real = known.layout.heads.get(layer, ())
        for tiny, full in zip(splits, real, strict=False):
            if tiny[0] == count:
                found.add(full[0])
                near |= {full[0]} if layer.rpartition(".")[0] in around else set()
    return near or found or _kept_numbers(count, mini, known)


def _kept_numbers(count: int, mini: Miniature, known: ConfigMap) -> set[int]:
    """The number itself, where a field says it in both configs (a router's groups of experts)."""
    tiny, full = dict(_numbers(mini.known.data)), dict(_numbers(known.data))
    paths = [path for path, value in tiny.items() if value == count]
    return {count} if paths and all(full.get(path) == count for path in paths) else set()


def _numbers(node: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, int]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from _numbers(value, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, key), value
