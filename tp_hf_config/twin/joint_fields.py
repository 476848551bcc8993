"""Propose the joint fields of a class: fields of its config that can only shrink together.

Query heads go with key/value heads. Where a class makes the head dim from hidden size and heads
(BERT), whole heads go with the hidden size. Widths that have to stay equal go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations, permutations, product

from ..fieldmap.field_map import FieldMap
from ..fieldmap.unit_shares import units_of
from ..forward.head_splits import observe
from ..model.build import Refusal
from ..model.config_json import FieldPath


def grouped_heads(field_map: FieldMap, failed: set[FieldPath]) -> Iterator[tuple[FieldPath, ...]]:
    """Yield head counts that cannot be pruned alone, each with another that is a multiple of it.

    Both split layers of one module, as query and key/value heads do.
    """
    counts = sorted((p for p in field_map.count_fields() if field_map.moves_shapes(p)), key=str)
    modules = {field: _modules_of(field_map, field) for field in counts}
    for smaller, larger in permutations(counts, 2):
        multiple = field_map.values[larger] % field_map.values[smaller] == 0
        if smaller in failed and multiple and modules[smaller] & modules[larger]:
            yield smaller, larger


def _modules_of(field_map: FieldMap, field: FieldPath) -> set[str]:
    """Return the layers of which a field sets some quantity, and the modules that hold these.

    A projection may hold the layer (Inkling's), so the module around it counts too, but no whole
    layer of a list: its attention to others has heads of its own.
    """
    modules: set[str] = set()
    for (name, which), expression in field_map.expressions.items():
        if field in expression.fields:
            layer = name.rpartition(".")[0] if isinstance(which, int) else name
            holder = layer.rpartition(".")[0]
            around = holder.rpartition(".")[0]
            modules |= {layer, holder}
            if not around.rpartition(".")[2].isdigit():
                modules.add(around)
    return modules - {""}


def whole_heads(field_map: FieldMap) -> Iterator[tuple[FieldPath, ...]]:
    """Yield widths with the head counts that split them, where their layers do not show these.

    No shape of BERT's layers depends on the number of heads. The width is the last field.
    """
    counts_of: dict[FieldPath, set[FieldPath]] = {}
    for (name, which), expression in field_map.expressions.items():
        if isinstance(which, str):
            weight = f"{name}.weight"
            widths = field_map.fields_of(weight, 0) | field_map.fields_of(weight, 1)
            for width in widths if not widths & expression.fields else ():
                counts_of.setdefault(width, set()).update(expression.fields)
    for width, counts in counts_of.items():
        several = {field for field in counts if field_map.values[field] > 1}  # a single head stays
        yield (*sorted(several or counts, key=str), width)


def equal_by_chance(field_map: FieldMap, full: FieldMap) -> frozenset[frozenset[FieldPath]]:
    """Return the pairs of fields that are equal in the tiny model alone: there are few numbers."""
    widths = [field for field in field_map.values if field in full.values]
    return frozenset(
        frozenset(pair)
        for pair in combinations(widths, 2)
        if field_map.values[pair[0]] == field_map.values[pair[1]]
        and full.values[pair[0]] != full.values[pair[1]]
    )


def equal_fields(
    values: Mapping[FieldPath, int],
    failed: set[FieldPath],
    by_chance: frozenset[frozenset[FieldPath]],
) -> Iterator[tuple[FieldPath, ...]]:
    """Yield pairs of equal widths that both cannot be pruned alone.

    ``values`` are those of all widths. If there are no such pairs, yield those of which one cannot
    be pruned alone. Those equal ``by_chance`` are left out.
    """
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
    """Yield three or four equal widths that the class runs with only if all change together.

    Passes without data show this. Features of images and of sound, from a tower each, stand in one
    text (Qwen2.5-Omni). Widths that are equal ``by_chance`` are not tried.
    """
    by_value: dict[int, list[FieldPath]] = {}
    for field in sorted(failed, key=str):
        by_value.setdefault(field_map.values[field], []).append(field)

    @cache
    def runs(fields: tuple[FieldPath, ...]) -> bool:
        """True if the class runs with these fields at double and at half of their value.

        Both are tried: where there are more features than places for them, only more places show
        it.
        """
        value = field_map.values[fields[0]]
        builds = (
            field_map.build_at(dict.fromkeys(fields, other)) for other in (2 * value, value // 2)
        )
        return all(
            not isinstance(model, Refusal) and observe(model, field_map.recipe).ended
            for model in builds
        )

    for size, paths in product((3, 4), by_value.values()):
        for fields in combinations(paths, size):
            if not by_chance.isdisjoint(map(frozenset, combinations(fields, 2))):
                continue
            if runs(fields) and not any(map(runs, combinations(fields, size - 1))):
                yield fields


def heads_with_width(
    field_map: FieldMap, failed: set[FieldPath]
) -> Iterator[tuple[FieldPath, ...]]:
    """Yield widths that cannot be pruned alone, with the head counts of layers that are as wide.

    Helium's last projection of attention reads the hidden size, and gets heads times head dim. If
    other failed head counts divide this one (key/value heads), it comes once with them and once
    without. The width is the last field.
    """
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
