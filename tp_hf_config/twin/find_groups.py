"""Find the groups of tensor dims that config fields set, and prove them on a tiny model.

The field map says which tensor dims a field sets. The twin test shows which of them belong
together, and in which layout. The proof is a permutation of units that does not change the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache, reduce
from itertools import chain, combinations, permutations, product
from math import gcd

from torch import nn

from ..fieldmap.field_map import FieldMap, Values
from ..fieldmap.unit_shares import Shares, shares_of, strides_in, units_of
from ..forward.coverage import forward_error
from ..forward.head_splits import observe
from ..forward.run_recipe import AXIS, encoder_states_of
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name, with_values
from ..model.tensors import is_matrix_stack, saved_buffers
from .layout import Finding, Places, Sources, TensorDim, TinyGroup, UnitLayout, all_alike, places_of
from .layout_search import Style, layouts_of, searched
from .masked_check import rehearse
from .prove import channel_groups_of, companion, named, order_of, proved, second_look
from .tiny.tiny_model import TinyModel, once
from .twin_test import Links, TwinTest


def find_groups(tiny: TinyModel) -> list[Finding]:
    """Return a finding for each width: of every field of a class, then of its joint fields."""
    field_map = tiny.field_map
    singly = [_find_alone(field, tiny) for field in field_map.values if _moves_alone(tiny, field)]
    told_apart = {f.fields[0]: f.told_apart for f in singly if f.reason is not None}
    failed = set(told_apart)
    findings = [_rehearsed(tiny, finding) for finding in singly]
    refused = {f.fields[0] for f in findings if f.reason is not None} - failed
    stuck = failed | {field for field in refused if not _takes_less(field_map, field)}
    equal = [
        *equal_fields(_widths(tiny), failed, tiny.equal_by_chance),
        *equal_together(field_map, failed, tiny.equal_by_chance),
    ]
    tried: set[frozenset[FieldPath]] = set()
    for fields in chain(equal, grouped_heads(field_map, stuck), heads_with_width(field_map, stuck)):
        if frozenset(fields) not in tried:
            tried.add(frozenset(fields))
            alone = [told_apart[field] for field in fields if field in told_apart]
            everywhere: Places = frozenset(chain(*alone)) if all(alone) else frozenset()
            joint = _find(tiny, fields, (), everywhere)
            if joint.reason is None:
                findings.append(joint)

    def is_new(fields: tuple[FieldPath, ...]) -> bool:
        return all(set(fields) != set(other.fields) for other in findings)

    for fields in filter(is_new, whole_heads(field_map)):
        groups = next((f.groups for f in findings if f.fields == fields[-1:]), ())
        several = [_find(tiny, fields, groups)]
        for pair in equal:
            if several[-1].reason is not None and fields[-1] in pair:
                several.append(_find(tiny, (*fields[:-1], *pair)))
        findings.append(several[-1] if several[-1].reason is None else several[0])
    findings += [_in_proportion(tiny, fields) for fields in proportional(field_map)]
    joint_findings = findings[len(singly) :]
    return findings[: len(singly)] + [_rehearsed(tiny, finding) for finding in joint_findings]


def find_alone(tiny: TinyModel, field: FieldPath) -> Finding | None:
    """Return the proved groups of one field, without experiments with other fields, or None."""
    # a head count may have to change with other fields
    if field in tiny.field_map.count_fields() or not _moves_alone(tiny, field):
        return None
    finding = _rehearsed(tiny, _find_alone(field, tiny))
    return finding if finding.reason is None else None


def may_be_unobserved(tiny: TinyModel, field: FieldPath) -> bool:
    """True if a finding with this field may say that no output depends on a part of the model."""
    # the experiments of joint fields are not run just for this
    joint = chain(whole_heads(tiny.field_map), proportional(tiny.field_map))
    if any(field in fields for fields in joint):
        return True
    return _moves_alone(tiny, field) and _find_alone(field, tiny).unobserved


def _moves_alone(tiny: TinyModel, field: FieldPath) -> bool:
    field_map = tiny.field_map
    if field not in field_map.values or field in field_map.must_equal | field_map.ratio_partners:
        return False
    return _sets_channels(tiny, field)


@once
def _find_alone(field: FieldPath, tiny: TinyModel) -> Finding:
    return _find(tiny, (field,))


def _takes_less(field_map: FieldMap, field: FieldPath) -> bool:
    value = field_map.values[field]
    tried = {value * 3 // 4, value // 2, value - 1} - {0}
    return any(not isinstance(field_map.build_at({field: less}), Refusal) for less in tried)


def _in_proportion(tiny: TinyModel, fields: tuple[FieldPath, ...]) -> Finding:
    """Return the finding for two fields in proportion: units are heads, or a part of every head."""
    finding = _find(tiny, fields, heads=True)
    if finding.reason is not None or not all(map(_scales, finding.groups)):
        finding = _find(tiny, fields)
    if finding.reason is None and not all(map(_scales, finding.groups)):
        return Finding(
            fields,
            reason="the tiny model does not show how many neighbouring channels a unit has at full "
            "size",
        )
    return finding


def _scales(group: TinyGroup) -> bool:
    """True if the runs of a group are heads, which something counts, or no dim has runs."""
    alone = any(dim.layout.parts == dim.layout.run == 1 for dim in group.dims)
    return alone or all(dim.layout.run == 1 for dim in group.dims)


def _rehearsed(tiny: TinyModel, finding: Finding) -> Finding:
    """Return the finding, refused if it fails the masked check."""
    refusal = rehearse(tiny, finding) if finding.reason is None else None
    if refusal is None:
        return finding
    return replace(finding, reason=refusal.reason, disproved=True)


def _widths(tiny: TinyModel) -> dict[FieldPath, int]:
    values = tiny.field_map.values
    return {field: value for field, value in values.items() if _sets_channels(tiny, field)}


def _sets_channels(tiny: TinyModel, field: FieldPath) -> bool:
    """True if a field sets a number of channels, not of embedding rows or a kernel size."""
    channels = False
    for (name, dim), expression in tiny.field_map.expressions.items():
        if field not in expression.fields or not isinstance(dim, int):
            continue
        module = tiny.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Embedding) and dim == 0:
            return False
        channels |= dim < 2 or not isinstance(module, nn.modules.conv._ConvNd)
    return channels


def _find(
    tiny: TinyModel,
    fields: tuple[FieldPath, ...],
    alone: Sequence[TinyGroup] = (),  # the groups that one of the fields sets alone
    apart_alone: Places = frozenset(),  # where the units of each field alone are distinguishable
    heads: bool = False,  # units are likely to be heads, though no layer shows it
) -> Finding:
    """Find the groups of units that are the same share of every one of the fields."""
    field_map = tiny.field_map
    units = units_of(field_map, fields)
    if units < 2:
        return Finding(fields, reason=f"{field_name(fields[0])} is {units} in the tiny model")
    shares = shares_of(field_map, fields)
    if isinstance(shares, Refusal):
        return Finding(fields, reason=shares.reason)
    shares |= _shares_of_states(tiny, shares)
    styles: dict[Style, list[TensorDim]] = {}
    tensors = {**saved_buffers(tiny.model), **dict(tiny.model.named_parameters())}  # tied ones once
    tensors |= tiny.encoder_states
    heads = heads or bool(set(fields) & field_map.count_fields())
    for (name, dim), parts in shares.items():
        for share in parts if name in tensors else ():
            layouts = layouts_of(tiny, name, dim, share, units, heads)
            styles.setdefault((tuple(layouts), share.field), []).append(TensorDim(name, dim))
    if not styles:
        return Finding(fields, reason="no parameter has a dimension that it sets alone")
    runs = {field_map.values[field] // units for field in fields}
    held = {share.per_unit for parts in shares.values() for share in parts}
    if len(fields) > 1:  # an output may be several times as wide as a field
        runs |= held
    by_itself = [group.dims for group in alone]
    split = _split_into(field_map, fields) if alone else frozenset()

    def look(runs: set[int]) -> tuple[TwinTest, Sources, tuple[Sources, Links]]:
        test = tiny.test(units, sorted(runs))
        return (test, *searched(test, styles, strides_in(shares), by_itself, apart_alone, split))

    finding: Finding | None = None
    test, first, (sources, links) = look(runs)
    if links.unequal and (more_runs := test.multiples(held) - runs):  # RADIO: tokens side by side
        test, first, (sources, links) = look(runs | more_runs)
    if not links.unequal:
        finding = proved(test, sources, fields, links)
        if finding.reason is not None:
            finding = second_look(test, sources, fields, links) or finding
        if tiny.partial:  # no part that reads images ran
            finding = _given_text_alone(finding)
    if finding is None:
        reason = f"units are not interchangeable in {named(links.unequal)}"
        told_apart = places_of(links.unequal)
        finding = Finding(fields, reason=reason, disproved=True, told_apart=told_apart)
    if finding.disproved and len(fields) == 1:
        # units that compete (routed experts) are exchangeable, but never have equal gradients
        finding = _without_twins(test, first, fields) or finding
    states = tuple(
        n for n in tiny.encoder_states if any(d.name == n for g in finding.groups for d in g.dims)
    )
    finding = replace(finding, outward=test.shows_outside(), encoder_states=states)
    if len(fields) > 1 or units < field_map.values[fields[0]]:
        return _refined(tiny, finding)
    dims = (dim for group in finding.groups for dim in group.dims if dim.dim == 0)
    stacked = any(is_matrix_stack(tiny.model, dim.name) for dim in dims)
    return replace(finding, minimum=_least(tiny, fields[0])) if stacked else finding


def _given_text_alone(finding: Finding) -> Finding:
    """Return the finding, refused if parts of the width may only run with images or sound."""
    unobserved = finding.unobserved_parameters
    if not finding.unobserved and not unobserved:
        return finding
    reason = finding.reason or f"the outputs do not depend on {', '.join(unobserved[:3])}"
    reason = f"{reason} when the model gets only text"
    return replace(finding, reason=reason, unobserved=True, unobserved_parameters=())


def _split_into(field_map: FieldMap, fields: Collection[FieldPath]) -> frozenset[str]:
    """Return the parameters of layers whose outputs some of these fields split into heads."""
    layers = {
        name
        for (name, which), expression in field_map.expressions.items()
        if isinstance(which, str) and expression.fields & set(fields)
    }
    return frozenset(name for name in field_map.shapes if name.rpartition(".")[0] in layers)


def _shares_of_states(tiny: TinyModel, shares: Shares) -> Shares:
    """Return the shares of fields in encoder states: those in the parameter that reads them."""
    read = encoder_states_of(tiny.model, tiny.recipe.encoder_states)
    if read is None or not tiny.encoder_states:
        return {}
    reader = (tiny.field_map.depth.first(read.reader), read.dim)
    return {(read.argument, AXIS): shares[reader]} if reader in shares else {}


def _least(tiny: TinyModel, field: FieldPath) -> int:
    field_map = tiny.field_map
    for value in range(1, field_map.values[field]):
        model = field_map.builder.build_real(with_values(field_map.depth.data, {field: value}))
        if isinstance(model, Refusal):
            continue
        if forward_error(model, tiny.inputs, tiny.recipe) is None:
            return value
    return field_map.values[field]


def _without_twins(
    test: TwinTest, sources: Sources, fields: tuple[FieldPath, ...]
) -> Finding | None:
    """Return a finding with one group for each layer, proved by permutation alone, or None."""
    layers: dict[str, list[TensorDim]] = {}
    for dim in sources:
        layers.setdefault(re.split(r"(?<=\.\d)\d*\.", dim.name)[0], []).append(dim)
    groups: list[TinyGroup] = []
    for dims in layers.values():
        channel_groups = channel_groups_of(test, dims)
        if channel_groups is None:
            return None
        orders = [list(order_of(test.units, channel_groups, swap)) for swap in (True, False)]
        rest = [(dim, [other for other in dims if other != dim]) for dim in dims]
        # a dim that can be left out has to accompany one that cannot
        idle = [dim for dim, others in rest if all(test.proves(others, order) for order in orders)]
        busy = [dim for dim in dims if dim not in idle]
        if any(companion(dim, [busy]) is None for dim in idle):
            return None
        groups.append(
            TinyGroup(
                fields, tuple(dims), tuple(sources[dim] for dim in dims), test.units, channel_groups
            )
        )
    return Finding(fields, tuple(groups))


def _refined(tiny: TinyModel, finding: Finding) -> Finding:
    """Return the finding, with smaller units in groups where those are interchangeable too."""
    # a head is coupled to a number of the residual stream's channels, but to none in particular
    groups = finding.groups
    if not set(finding.fields) & tiny.field_map.count_fields():
        groups = all_alike(groups, tuple(_by_position(tiny, group) for group in groups))
    finer = tuple(_finest(tiny, group) for group in groups)
    return replace(finding, groups=all_alike(groups, finer))


def with_single_positions(tiny: TinyModel, finding: Finding) -> Finding | None:
    """Return the finding with units of single positions, or None if they are not proved."""
    # a unit of Swin's first stage is several dimensions of every head in its last one; at full size
    # there may be more of these heads than a unit has dimensions
    groups = tuple(_by_position(tiny, group) for group in finding.groups)
    finer = replace(finding, groups=all_alike(finding.groups, groups))
    if finer == finding or rehearse(tiny, finer) is not None:
        return None
    return finer


def _by_position(tiny: TinyModel, group: TinyGroup) -> TinyGroup:
    """Return the group with units of single positions if those may be exchanged, else the group."""
    sizes = {dim.layout.parts * dim.layout.run for dim in group.dims}
    if len(sizes) > 1 or any(dim.layout.offset or dim.layout.gap for dim in group.dims):
        return group
    (per_field_unit,) = sizes
    if per_field_unit == 1:
        return group
    dims = tuple(replace(dim, layout=UnitLayout()) for dim in group.dims)
    units = group.units * per_field_unit
    test = tiny.test(units)
    channel_groups = channel_groups_of(test, dims)
    if channel_groups is None or not test.alike(dims, channel_groups):
        return group
    return replace(
        group, dims=dims, units=units, channel_groups=channel_groups, per_field_unit=per_field_unit
    )


def _finest(tiny: TinyModel, group: TinyGroup) -> TinyGroup:
    """Return the group with the smallest interchangeable parts of its runs as units."""
    # heads remain whole: where attention weighs all tokens alike, dimensions of different heads are
    # interchangeable
    split = _split_into(tiny.field_map, group.fields)
    heads = [dim for dim in group.dims if dim.dim == 0 and dim.name in split]
    run = reduce(gcd, (dim.layout.run for dim in group.dims))
    for per_field_unit in (n for n in range(run, 1, -1) if run % n == 0):
        if any(dim.layout.run // per_field_unit % _head_dim(tiny, dim) for dim in heads):
            continue
        dims = tuple(
            replace(dim, layout=replace(dim.layout, run=dim.layout.run // per_field_unit))
            for dim in group.dims
        )
        units = group.units * per_field_unit
        widths = {dim.layout.parts * dim.layout.run for dim in dims}
        test = tiny.test(units, sorted(widths))
        orders = (list(order_of(units, group.channel_groups, swap)) for swap in (True, False))
        if all(test.proves(dims, order) for order in orders) and test.alike(
            dims, group.channel_groups
        ):
            return replace(group, dims=dims, units=units, per_field_unit=per_field_unit)
    return group


def _head_dim(tiny: TinyModel, dim: TensorDim) -> int:
    splits = tiny.field_map.splits_of(dim.layer)
    return splits[0][-1] if splits else 1


def grouped_heads(field_map: FieldMap, failed: set[FieldPath]) -> Iterator[tuple[FieldPath, ...]]:
    """Yield head counts that fail alone, with a multiple that splits layers of the same modules."""
    counts = sorted((p for p in field_map.count_fields() if field_map.moves_shapes(p)), key=str)
    modules = {field: _modules_of(field_map, field) for field in counts}
    for smaller, larger in permutations(counts, 2):
        multiple = field_map.values[larger] % field_map.values[smaller] == 0
        if smaller in failed and multiple and modules[smaller] & modules[larger]:
            yield smaller, larger


def _modules_of(field_map: FieldMap, field: FieldPath) -> set[str]:
    """Return the layers in which a field sets some quantity, and the modules around these."""
    modules: set[str] = set()
    for (name, which), expression in field_map.expressions.items():
        if field in expression.fields:
            layer = name.rpartition(".")[0] if isinstance(which, int) else name
            holder = layer.rpartition(".")[0]
            around = holder.rpartition(".")[0]
            modules |= {layer, holder}
            # a projection may hold the layer (Inkling's); a whole layer of a list is too much,
            # because its cross-attention has heads of its own
            if not around.rpartition(".")[2].isdigit():
                modules.add(around)
    return modules - {""}


def whole_heads(field_map: FieldMap) -> Iterator[tuple[FieldPath, ...]]:
    """Yield head counts that no shape shows (BERT's), with the width that they split (last)."""
    counts_of: dict[FieldPath, set[FieldPath]] = {}
    for (name, which), expression in field_map.expressions.items():
        if isinstance(which, str):
            weight = f"{name}.weight"
            widths = field_map.fields_of(weight, 0) | field_map.fields_of(weight, 1)
            for width in widths if not widths & expression.fields else ():
                counts_of.setdefault(width, set()).update(expression.fields)
    for width, counts in counts_of.items():
        several = {field for field in counts if field_map.values[field] > 1}  # not a single head
        yield (*sorted(several or counts, key=str), width)


def equal_fields(
    values: Values, failed: set[FieldPath], by_chance: frozenset[frozenset[FieldPath]]
) -> Iterator[tuple[FieldPath, ...]]:
    """Yield pairs of equal widths that both cannot be pruned alone, or else one of which cannot."""
    pairs = [
        pair
        for pair in combinations(values, 2)
        if values[pair[0]] == values[pair[1]] and failed & set(pair)
        if frozenset(pair) not in by_chance
    ]
    yield from [pair for pair in pairs if failed >= set(pair)] or pairs


def equal_together(
    field_map: FieldMap, failed: set[FieldPath], by_chance: frozenset[frozenset[FieldPath]]
) -> Iterator[tuple[FieldPath, ...]]:
    """Yield three or four equal widths that the class runs with only if all change together."""
    by_value: dict[int, list[FieldPath]] = {}
    for field in sorted(failed, key=str):
        by_value.setdefault(field_map.values[field], []).append(field)

    @cache
    def runs(fields: tuple[FieldPath, ...]) -> bool:
        # both: if there are more features than places for them, only more places show it
        value = field_map.values[fields[0]]
        builds = (
            field_map.build_at(dict.fromkeys(fields, other)) for other in (2 * value, value // 2)
        )
        return all(
            not isinstance(model, Refusal) and observe(model, field_map.recipe).ended
            for model in builds
        )

    # features of images and of sound, from a tower each, replace tokens of one text (Qwen2.5-Omni)
    for size, paths in product((3, 4), by_value.values()):
        for fields in combinations(paths, size):
            if not by_chance.isdisjoint(map(frozenset, combinations(fields, 2))):
                continue
            if runs(fields) and not any(map(runs, combinations(fields, size - 1))):
                yield fields


def heads_with_width(
    field_map: FieldMap, failed: set[FieldPath]
) -> Iterator[tuple[FieldPath, ...]]:
    """Yield the head counts of layers that are as wide as a width, with that width (last)."""
    # Helium's last projection of attention reads the hidden size, and gets heads times head dim
    counts = field_map.count_fields() & failed
    for width in sorted(failed - counts, key=str):
        value = field_map.values[width]
        whole = {
            field
            for expression in field_map.expressions.values()
            if expression.base == value and width not in expression.fields
            for field in expression.fields & counts
            if value % field_map.values[field] == 0
        }
        for field in sorted(whole, key=str):
            divisors = [
                other
                for other in counts - {field}
                if not field_map.values[field] % field_map.values[other]
            ]
            # head counts that divide this one (key/value heads) change with it, or do not
            yield (*sorted(divisors, key=str), field, width)
            if divisors:
                yield field, width


def proportional(field_map: FieldMap) -> list[tuple[FieldPath, ...]]:
    """Return the pairs of fields that the class takes only in proportion, most units first."""
    pairs = {
        tuple(sorted((field, other), key=lambda path: (field_map.values[path], str(path))))
        for field, others in field_map.ratio_partners.items()
        for other in others
        if {field, other} <= field_map.values.keys()
    }
    return sorted(pairs, key=lambda fields: (-units_of(field_map, fields), str(fields)))
