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

_FACTORS = tuple(Fraction(*one) for one in ((1, 2), (2, 1), (1, 4), (4, 1), (1, 3), (3, 1)))
_SHOWN = 2


@dataclass(frozen=True)
class Untold:
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
            f"no shape tells heads from their size: {', '.join(self.names)} {says} "
            f"{_numbers(self.values)}; {others} would load the same tensors and compute something "
            "else"
        )


def _numbers(values: Values) -> str:
    """Return the values as text, separated by commas."""
    return ", ".join(map(number, values.values()))


def untold(field_map: FieldMap) -> Iterator[Untold]:
    """Yield the head counts of a class, and head sizes, that its tensors do not decide.

    Head counts are tried alone first; only if this shows nothing, together with their sizes.
    """
    for counts in _together(field_map):
        sizes = {size for term in _terms(field_map) if term & counts for size in term - counts}
        without: set[FieldPath] = set()
        for beside in (without, sizes) if sizes else (without,):
            fields = sorted(counts | beside, key=field_name, reverse=True)
            values = {
                path: field_map.values.get(path) or field_map.sizes.get(path, 0) for path in fields
            }
            others = tuple(islice(_alike(field_map, values, counts), _SHOWN))
            if others:
                yield Untold(values, others)
                break


def _alike(field_map: FieldMap, values: Values, counts: set[FieldPath]) -> Iterator[Values]:
    """Yield values that build the same tensors: head counts times a factor, sizes over it.

    Args:
        field_map: the field map.
        values: the fields to change, with their values now.
        counts: the fields among them that count heads.
    """
    for factor in _FACTORS:
        moved = {p: v * factor if p in counts else v / factor for p, v in values.items()}
        if all(value and value.denominator == 1 for value in moved.values()):
            whole = {path: int(value) for path, value in moved.items()}
            if field_map.shapes_at(whole) == field_map.shapes:
                yield whole


def _terms(field_map: FieldMap) -> Iterator[frozenset[FieldPath]]:
    """Yield each product of fields that sets a quantity, as the set of its fields."""
    for expression in field_map.expressions.values():
        yield from expression.terms


def _together(field_map: FieldMap) -> list[set[FieldPath]]:
    """Return the fields that count heads; those that share a head size or a quotient in one set."""
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
            apart = [group for group in groups if group not in touched]
            groups = [*apart, {path for group in touched for path in group}]
    return groups
