"""The groups of coupled dimensions that config fields set, found and proved on a tiny copy.

The map says which dimensions a field sets; the twin test says which of them belong together and in
which layout; a permutation of units that leaves the outputs as they were is the proof.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain
from math import gcd

from torch import nn

from .alike import all_alike
from .directions import (
    Shares,
    equal_fields,
    equal_together,
    grouped_heads,
    heads_with_width,
    proportional,
    shares_of,
    strides_in,
    units_of,
    whole_heads,
)
from .layouts import layouts_of
from .learn import ConfigMap
from .miniature import Miniature
from .proofs import Finding, Group, classes_of, companion, named, order_of, proved, second_look
from .reach import why_not
from .reference import FieldPath, Refusal, field_name, with_values
from .rehearsal import rehearse
from .search import Places, Sources, Style, in_other_layouts, places_of, searched
from .states import AXIS, states_of
from .ties import saved_buffers, stacks
from .twins import Dim, Layout, Links, TwinTest


def find_groups(mini: Miniature) -> list[Finding]:
    """Find the groups of every field of a class, and of the fields that only go together."""
    known = mini.known
    singly = [
        _find(mini, (path,))
        for path in known.values
        if path not in known.linked | known.bound and _sets_outputs(mini, path)
    ]
    apart = {f.fields[0]: f.apart for f in singly if f.reason is not None}
    failed = set(apart)
    findings = [_rehearsed(mini, finding) for finding in singly]
    refused = {f.fields[0] for f in findings if f.reason is not None} - failed
    stuck = failed | {path for path in refused if not _takes_less(known, path)}
    equal = [*equal_fields(known, failed), *equal_together(known, failed)]
    tried: set[frozenset[FieldPath]] = set()
    for fields in chain(equal, grouped_heads(known, stuck), heads_with_width(known, stuck)):
        if frozenset(fields) not in tried:
            tried.add(frozenset(fields))
            alone = [apart[path] for path in fields if path in apart]
            everywhere: Places = frozenset(chain(*alone)) if all(alone) else frozenset()
            found = _find(mini, fields, (), everywhere)
            if found.reason is None:
                findings.append(found)

    def is_new(fields: tuple[FieldPath, ...]) -> bool:
        return all(set(fields) != set(other.fields) for other in findings)

    for fields in filter(is_new, whole_heads(known)):
        groups = next((f.groups for f in findings if f.fields == fields[-1:]), ())
        several = [_find(mini, fields, groups)]
        for pair in equal:
            if several[-1].reason is not None and fields[-1] in pair:
                several.append(_find(mini, (*fields[:-1], *pair)))
        findings.append(several[-1] if several[-1].reason is None else several[0])
    findings += [_in_proportion(mini, fields) for fields in proportional(known)]
    together = findings[len(singly) :]
    return findings[: len(singly)] + [_rehearsed(mini, finding) for finding in together]


def _takes_less(known: ConfigMap, path: FieldPath) -> bool:
    """Whether the class is built with less of a field alone: three quarters, half, one less."""
    value = known.values[path]
    tried = {value * 3 // 4, value // 2, value - 1} - {0}
    return any(not isinstance(known.build_at({path: less}), Refusal) for less in tried)


def _in_proportion(mini: Miniature, fields: tuple[FieldPath, ...]) -> Finding:
    """What units of two fields are: heads, which are runs, or else a part of every head."""
    found = _find(mini, fields, heads=True)
    if found.reason is not None or not all(map(_scales, found.groups)):
        found = _find(mini, fields)
    if found.reason is None and not all(map(_scales, found.groups)):
        return Finding(fields, reason="how long runs of its units are at full size is not seen")
    return found


def _scales(group: Group) -> bool:
    """Whether runs are heads, which something counts: else there may be more runs at full size."""
    alone = any(dim.layout.parts == dim.layout.run == 1 for dim in group.dims)
    return alone or all(dim.layout.run == 1 for dim in group.dims)


def _rehearsed(mini: Miniature, finding: Finding) -> Finding:
    """The finding, refused where the class built smaller does not compute what is left."""
    reason = rehearse(mini, finding) if finding.reason is None else None
    return finding if reason is None else replace(finding, reason=reason, disproved=True)


def _sets_outputs(mini: Miniature, path: FieldPath) -> bool:
    """Whether a field sets a width, not just a number of entries or a kernel's size."""
    for (name, dim), expression in mini.known.expressions.items():
        if path not in expression.fields or not isinstance(dim, int):
            continue
        module = mini.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Embedding) and dim == 0:
            return False
    return mini.known.moves_shapes(path)


def _find(
    mini: Miniature,
    fields: tuple[FieldPath, ...],
    alone: Sequence[Group] = (),
    apart_alone: Places = frozenset(),
    heads: bool = False,
) -> Finding:
    """Groups of units that are the same share of every one of the fields.

    ``alone``: the groups that one of them sets by itself; ``apart_alone``: where units of each of
    them alone are told apart; ``heads``: units are likely to be heads, though no layer shows it.
    """
    known = mini.known
    units = units_of(known, fields)
    if units < 2:
        return Finding(fields, reason=f"{field_name(fields[0])} is {units} in the tiny copy")
    shares = shares_of(known, fields)
    if isinstance(shares, str):
        return Finding(fields, reason=shares)
    shares |= _handed(mini, shares)
    styles: dict[Style, list[Dim]] = {}
    listed = {**saved_buffers(mini.model), **dict(mini.model.named_parameters())}  # a tied one once
    listed |= mini.states
    heads = heads or bool(set(fields) & known.count_fields())
    for (name, dim), parts in shares.items():
        for share in parts if name in listed else ():
            layouts = layouts_of(mini, name, dim, share, units, heads)
            styles.setdefault((tuple(layouts), share.field), []).append(Dim(name, dim))
    if not styles:
        return Finding(fields, reason="it sets no parameter's dimension alone")
    runs = {known.values[path] // units for path in fields}
    held = {share.per_unit for parts in shares.values() for share in parts}
    if len(fields) > 1:  # an output can be a multiple of a field
        runs |= held
    by_itself = [group.dims for group in alone]
    split = _split_into(known, fields) if alone else frozenset()

    def look(runs: set[int]) -> tuple[TwinTest, Sources, tuple[Sources, Links]]:
        test = TwinTest(mini.model, mini.inputs, units, sorted(runs), mini.watched)
        return (test, *searched(test, styles, strides_in(shares), by_itself, apart_alone, split))

    found: Finding | None = None
    test, first, (sources, links) = look(runs)
    if links.unequal and (more := test.multiples(held) - runs):  # tokens side by side (RADIO)
        test, first, (sources, links) = look(runs | more)
    if not links.unequal:
        found = proved(test, sources, fields, links)
        if found.reason is not None:
            found = second_look(test, sources, fields, links) or found
        if found.unproved:
            several = in_other_layouts(test, styles, sources, found.unproved)
            others = (proved(test, other, fields, seen) for other, seen in several)
            found = next((other for other in others if other.reason is None), found)
        if mini.partial and (found.unseen or found.along):  # what reads images was not run
            unseen = found.reason or f"the outputs do not depend on {', '.join(found.along[:3])}"
            found = replace(found, reason=f"{unseen} when given text alone", unseen=True, along=())
    if found is None:
        reason = f"units are not interchangeable in {named(links.unequal)}"
        apart = places_of(links.unequal)
        found = Finding(fields, reason=reason, disproved=True, apart=apart)
    if found.disproved and len(fields) == 1:
        found = _without_twins(test, first, fields) or found
    handed = tuple(n for n in mini.states if any(d.name == n for g in found.groups for d in g.dims))
    found = replace(found, outward=test.shows_outside(), handed=handed)
    if len(fields) > 1 or units < known.values[fields[0]]:
        return _refined(mini, found)
    dims = (dim for group in found.groups for dim in group.dims if dim.dim == 0)
    stacked = any(stacks(mini.model, dim.name) for dim in dims)
    return replace(found, least=_least(mini, fields[0])) if stacked else found


def _split_into(known: ConfigMap, fields: Collection[FieldPath]) -> frozenset[str]:
    """The parameters of layers whose outputs some of these fields split into heads."""
    layers = {
        name
        for (name, which), expression in known.expressions.items()
        if isinstance(which, str) and expression.fields & set(fields)
    }
    return frozenset(name for name in known.shapes if name.rpartition(".")[0] in layers)


def _handed(mini: Miniature, shares: Shares) -> Shares:
    """What the fields have of the states of an encoder: as much as of what reads them."""
    read = states_of(mini.model)
    if read is None or not mini.states:
        return {}
    reader = (mini.known.depth.first(read.reader), read.dim)
    return {(read.argument, AXIS): shares[reader]} if reader in shares else {}


def _least(mini: Miniature, path: FieldPath) -> int:
    """The smallest value of a field with which the class still runs."""
    known = mini.known
    for value in range(1, known.values[path]):
        model = known.builder.build_real(with_values(known.depth.data, {path: value}))
        if not isinstance(model, Refusal) and why_not(model, mini.inputs) is None:
            return value
    return known.values[path]


def _without_twins(
    test: TwinTest, sources: Mapping[Dim, FieldPath | None], fields: tuple[FieldPath, ...]
) -> Finding | None:
    """One group per layer, by permutation alone.

    Twins that compete (routed experts: the best few are taken) are never alike, but may well
    change places.  Every dimension has to matter (without it the permutation is not neutral), or
    to stand beside one that does.
    """
    layers: dict[str, list[Dim]] = {}
    for dim in sources:
        layers.setdefault(re.split(r"(?<=\.\d)\d*\.", dim.name)[0], []).append(dim)
    groups: list[Group] = []
    for dims in layers.values():
        classes = classes_of(test, dims)
        if classes is None:
            return None
        orders = [list(order_of(test.units, classes, swap)) for swap in (True, False)]
        rest = [(dim, [other for other in dims if other != dim]) for dim in dims]
        idle = [dim for dim, others in rest if all(test.proves(others, one) for one in orders)]
        busy = [dim for dim in dims if dim not in idle]
        if any(companion(dim, [busy]) is None for dim in idle):
            return None
        groups.append(
            Group(fields, tuple(dims), tuple(sources[dim] for dim in dims), test.units, classes)
        )
    return Finding(fields, tuple(groups))


def _refined(mini: Miniature, finding: Finding) -> Finding:
    """Let a group choose among smaller units where those are interchangeable everywhere.

    Whole heads go with a run of the residual stream's channels, but which channels is free.
    """
    groups = finding.groups
    if not set(finding.fields) & mini.known.count_fields():
        groups = all_alike(groups, tuple(_by_position(mini, group) for group in groups))
    finer = tuple(_finest(mini, group) for group in groups)
    return replace(finding, groups=all_alike(groups, finer))


def in_positions(mini: Miniature, finding: Finding) -> Finding | None:
    """The finding with units of single positions; ``None``: those cannot change places.

    A unit of Swin's first stage is several dimensions of every head in its last one, of whose heads
    there may be more at full size than a unit has dimensions.
    """
    groups = tuple(_by_position(mini, group) for group in finding.groups)
    finer = replace(finding, groups=all_alike(finding.groups, groups))
    if finer == finding or rehearse(mini, finer) is not None:
        return None
    return finer


def _by_position(mini: Miniature, group: Group) -> Group:
    """The group in units of single positions, if those may change places: in each head, say."""
    sizes = {dim.layout.parts * dim.layout.run for dim in group.dims}
    if len(sizes) > 1 or any(dim.layout.offset or dim.layout.gap for dim in group.dims):
        return group
    (grain,) = sizes
    if grain == 1:
        return group
    dims = tuple(replace(dim, layout=Layout()) for dim in group.dims)
    units = group.units * grain
    test = TwinTest(mini.model, mini.inputs, units, watched=mini.watched)
    classes = classes_of(test, dims)
    if classes is None or not test.alike(dims, classes):
        return group
    return replace(group, dims=dims, units=units, classes=classes, grain=grain)


def _finest(mini: Miniature, group: Group) -> Group:
    """The group in the smallest parts of its runs that are interchangeable.

    Heads stay whole, also where attention to all alike lets dims of several change places.
    """
    split = _split_into(mini.known, group.fields)
    heads = [dim for dim in group.dims if dim.dim == 0 and dim.name in split]
    run = reduce(gcd, (dim.layout.run for dim in group.dims))
    for grain in (n for n in range(run, 1, -1) if run % n == 0):
        if any(dim.layout.run // grain % _head_dim(mini, dim) for dim in heads):
            continue
        dims = tuple(
            replace(dim, layout=replace(dim.layout, run=dim.layout.run // grain))
            for dim in group.dims
        )
        units = group.units * grain
        widths = {dim.layout.parts * dim.layout.run for dim in dims}
        test = TwinTest(mini.model, mini.inputs, units, sorted(widths), mini.watched)
        orders = (list(order_of(units, group.classes, swap)) for swap in (True, False))
        if all(test.proves(dims, order) for order in orders) and test.alike(dims, group.classes):
            return replace(group, dims=dims, units=units, grain=grain)
    return group


def _head_dim(mini: Miniature, dim: Dim) -> int:
    """How many positions one head takes of the outputs of its layer; 1: they are not seen split."""
    splits = mini.known.splits_of(dim.name.rpartition(".")[0])
    return splits[0][-1] if splits else 1
