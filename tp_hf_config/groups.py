"""The groups of coupled dimensions that config fields set, found and proved on a tiny copy.

The map says which dimensions a field sets; the twin test says which of them belong together and in
which layout; a permutation of units that leaves the outputs as they were is the proof.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch

from .miniature import Miniature
from .reference import FieldPath, field_name
from .twins import Dim, Layout, Links, TwinTest

_MAX_LAYOUTS = 8


@dataclass(frozen=True)
class Group:
    """Dimensions that lose the same units, proved by permutation on the tiny copy.

    Attributes:
        fields: the config fields that count its units.
        dims: its dimensions, in the names of the tiny copy.
        sources: for each of them, the field that sets it.
        units: how many units it has there.
        classes: units may only change places inside each of so many equal runs of units (the
            dimensions of a head, the query heads of a key/value head); 1: anywhere.
    """

    fields: tuple[FieldPath, ...]
    dims: tuple[Dim, ...]
    sources: tuple[FieldPath, ...]
    units: int
    classes: int


@dataclass(frozen=True)
class Finding:
    """What was found for one width: its groups, or why it cannot be pruned.

    ``disproved``: units were seen not to be interchangeable (else nothing was seen).
    """

    fields: tuple[FieldPath, ...]
    groups: tuple[Group, ...] = ()
    reason: str | None = None
    disproved: bool = False


def find_groups(mini: Miniature) -> list[Finding]:
    """Find the groups of every field of a class, and of the fields that only go together."""
    findings: list[Finding] = []
    counts = sorted(mini.known.count_fields(), key=str)
    for path in mini.known.values:
        if path in mini.known.linked or not _sets_outputs(mini, path):
            continue
        findings.append(_find(mini, {path: 1}))
    for larger, smaller in product(counts, counts):
        ratio = mini.known.values[larger] / mini.known.values[smaller]
        if larger != smaller and ratio == int(ratio) and _alone(findings, smaller) is None:
            joint = _find(mini, {smaller: 1, larger: int(ratio)})
            if joint.reason is None:
                findings.append(joint)
    return findings


def _alone(findings: Sequence[Finding], path: FieldPath) -> Finding | None:
    return next((f for f in findings if f.fields == (path,) and f.reason is None), None)


def _sets_outputs(mini: Miniature, path: FieldPath) -> bool:
    """Whether a field sets a width, not just a number of entries or a kernel's size."""
    for (name, dim), expression in mini.known.expressions.items():
        if path not in expression.fields or not isinstance(dim, int):
            continue
        module = mini.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.Embedding) and dim == 0:
            return False
    return mini.known.moves_shapes(path)


def _find(mini: Miniature, scales: Mapping[FieldPath, int]) -> Finding:
    """Groups of units that are ``scales[field]`` units of each field."""
    fields = tuple(scales)
    units = mini.known.values[fields[0]] // scales[fields[0]]
    if units < 2:
        return Finding(fields, reason=f"{field_name(fields[0])} is {units} in the tiny copy")
    styles: dict[tuple[tuple[Layout, ...], FieldPath], list[Dim]] = {}
    listed = dict(mini.model.named_parameters())  # a tied weight once; no buffers
    for (name, which), expression in sorted(mini.known.expressions.items(), key=str):
        for path in scales:
            if path not in expression.fields or not isinstance(which, int) or name not in listed:
                continue
            slope = expression.terms.get(frozenset({path}))
            layouts = _layouts(mini, name, which, expression.base, slope, path, scales[path])
            if not layouts:
                return Finding(fields, reason=f"{name} has no whole units along dimension {which}")
            styles.setdefault((tuple(layouts), path), []).append(Dim(name, which))
    if not styles:
        return Finding(fields, reason="it sets no parameter's dimension alone")
    test = TwinTest(mini.model, mini.inputs, units)
    best: Links | None = None
    for chosen in islice(product(*(layouts for layouts, _ in styles)), _MAX_LAYOUTS):
        sources = {
            Dim(dim.name, dim.dim, layout): path
            for layout, ((_, path), alike) in zip(chosen, styles.items(), strict=True)
            for dim in alike
        }
        links = test.links(list(sources))
        if not links.unequal:
            found = _proved(test, sources, fields, links, units)
            if found.reason is None:
                return found
            links = test.links(list(sources), thorough=True)
            return _proved(test, sources, fields, links, units)
        if best is None or len(links.unequal) < len(best.unequal):
            best = links
    names = _named(best.unequal if best else ())
    reason = f"units are not interchangeable in {names}"
    return Finding(fields, reason=reason, disproved=True)


def _named(dims: Sequence[Dim]) -> str:
    """Some parameters by name, those of alike layers once."""
    names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", dim.name) for dim in dims))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _layouts(
    mini: Miniature,
    name: str,
    dim: int,
    size: int,
    slope: Any,
    path: FieldPath,
    scale: int,
) -> list[Layout]:
    """The ways in which a field's units can stand along a dimension, likely ones first."""
    value = mini.known.values[path]
    if slope is None or slope.denominator != 1 or slope < 1:
        return []
    width = int(slope)
    rest = size - width * value
    if rest < 0:
        return []
    layer = name.rpartition(".")[0]
    pieces = mini.known.layout.pieces.get(layer, ())
    heads = {split[0] for splits in mini.known.layout.heads.values() for split in splits}
    found: list[Layout] = []
    for offset in dict.fromkeys([0, rest]):
        parts = [n for n in range(1, width + 1) if width % n == 0]
        # heads are runs; the dimensions of a head, and of gate and up, stand in every part
        parts.sort(reverse=path not in mini.known.count_fields())
        parts.sort(key=lambda n: n != len(pieces))
        found += [Layout(n, width // n, 1, offset) for n in parts]
        if width > 1 and dim == 0:
            found += [
                Layout(n, width // n, blocks, offset)
                for blocks in sorted(heads)
                if blocks > 1 and value // scale % blocks == 0
                for n in parts
                if n > 1
            ]
    return [layout.grouped(scale) for layout in found]


def _proved(
    test: TwinTest,
    sources: Mapping[Dim, FieldPath],
    fields: tuple[FieldPath, ...],
    links: Links,
    units: int,
) -> Finding:
    """The linked groups with their silent companions, each proved by permutation."""
    groups: list[Group] = []
    homeless: list[Dim] = []
    members: list[list[Dim]] = [list(group) for group in links.groups]
    for silent in links.silent:
        layer = silent.name.rpartition(".")[0]
        for group in members:
            if any(
                dim.name.rpartition(".")[0] == layer and dim.layout == silent.layout
                for dim in group
                if dim.dim == 0
            ):
                group.append(silent)
                break
        else:
            homeless.append(silent)
    for group in members:
        classes = _classes(test, group, units)
        if classes is None:
            return Finding(fields, reason=f"no permutation of units is neutral in {_named(group)}")
        by_field = tuple(sources[dim] for dim in group)
        groups.append(Group(fields, tuple(group), by_field, units, classes))
    if homeless:
        return Finding(fields, tuple(groups), f"the outputs do not depend on {_named(homeless)}")
    if not groups:
        return Finding(fields, reason="it sets no parameter that the outputs depend on")
    return Finding(fields, tuple(groups))


def _classes(test: TwinTest, dims: Sequence[Dim], units: int) -> int | None:
    """In how many runs of units a permutation has to stay to be neutral; None: none is."""
    for classes in (n for n in range(1, units) if units % n == 0):
        if test.proves(dims, list(_order(units, classes, swap=True))):
            proved = test.proves(dims, list(_order(units, classes, swap=False)))
            return classes if proved else None
    return None


def _order(units: int, classes: int, swap: bool) -> Iterator[int]:
    """An order of the units inside each class: first and last of the first exchanged, or random."""
    size = units // classes
    generator = torch.Generator().manual_seed(units)
    for start in range(0, units, size):
        if swap:
            places = list(range(size))
            if start == 0:
                places[0], places[-1] = places[-1], places[0]
        else:
            places = torch.randperm(size, generator=generator).tolist()
        yield from (start + place for place in places)
