"""Find head counts that no shape shows by trying other values with which the same tensors load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

from ..fieldmap.field_map import FieldMap
from ..fieldmap.solve.fit import Values
from ..model.config_json import FieldPath, field_name
from .words import number

_FACTORS = tuple(Fraction(*ratio) for ratio in ((1, 2), (2, 1), (1, 4), (4, 1), (1, 3), (3, 1)))
_SHOWN = 2


@dataclass(frozen=True)
class UndecidedHeads:
    """Fields that set head counts (and head sizes), and other values that build the same tensors.

    Attributes:
        values: field -> value, as config.json has it or implies it.
        others: the same fields at other values.
    """

    values: Values
    others: tuple[Values, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the fields as people write them."""
        return tuple(map(field_name, self.values))

    def __str__(self) -> str:
        says = "says" if len(self.values) == 1 else "say"
        others = " or ".join(_numbers(other) for other in self.others)
        return (
            f"taken as config.json says: {', '.join(self.names)} {says} "
            f"{_numbers(self.values)}; {others} have the same shapes"
        )


def _numbers(values: Values) -> str:
    """Return the values as text, separated by commas."""
    return ", ".join(map(number, values.values()))


def undecided_heads(field_map: FieldMap) -> Iterator[UndecidedHeads]:
    """Yield a class's head counts and head sizes for which other values build the same tensors.

    Head counts are tried alone first; only if this shows nothing, together with their sizes.
    """
    for counts in _joint_counts(field_map):
        sizes = {size for term in _terms(field_map) if term & counts for size in term - counts}
        nothing: set[FieldPath] = set()
        for changed_sizes in (nothing, sizes) if sizes else (nothing,):
            fields = sorted(counts | changed_sizes, key=field_name, reverse=True)
            values = {
                path: field_map.values.get(path) or field_map.sizes.get(path, 0) for path in fields
            }
            others = tuple(islice(_other_values(field_map, values, counts), _SHOWN))
            if others:
                yield UndecidedHeads(values, others)
                break


def _other_values(field_map: FieldMap, values: Values, counts: set[FieldPath]) -> Iterator[Values]:
    """Yield other values that build the same tensors: counts times a factor, sizes divided by it.

    Args:
        field_map: the field map.
        values: the fields to change, with their values now.
        counts: the fields among them that count heads.
    """
    for factor in _FACTORS:
        scaled = {p: v * factor if p in counts else v / factor for p, v in values.items()}
        if all(value and value.denominator == 1 for value in scaled.values()):
            others = {path: int(value) for path, value in scaled.items()}
            if field_map.shapes_at(others) == field_map.shapes:
                yield others


def _terms(field_map: FieldMap) -> Iterator[frozenset[FieldPath]]:
    """Yield each product of fields that sets a quantity, as the set of its fields."""
    for expression in field_map.expressions.values():
        yield from expression.terms


def _joint_counts(field_map: FieldMap) -> list[set[FieldPath]]:
    """Return the fields that count heads in sets; fields that share a size or a quotient join."""
    counts = field_map.count_fields()
    groups: list[set[FieldPath]] = [{path} for path in sorted(counts, key=field_name)]
    sharing = [set(power.fields) for power in field_map.powers.values()]
    by_size: dict[FieldPath, set[FieldPath]] = {}
    for term in _terms(field_map):
        for size in term - counts:
            by_size.setdefault(size, set()).update(term & counts)
    for joint in (*by_size.values(), *sharing):
        touched = [group for group in groups if group & joint]
        if len(touched) > 1:
            others = [group for group in groups if group not in touched]
            groups = [*others, set().union(*touched)]
    return groups
