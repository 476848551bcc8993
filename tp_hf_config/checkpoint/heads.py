"""Numbers of heads that no shape shows: other values with which the same tensors load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

from ..fit import Values
from ..learn import ConfigMap
from ..reference import FieldPath, Refusal, field_name, shapes
from .words import number

_FACTORS = tuple(Fraction(*one) for one in ((1, 2), (2, 1), (1, 4), (4, 1), (1, 3), (3, 1)))
_SHOWN = 2


@dataclass(frozen=True)
class Untold:
    """Fields that set how many heads there are, and other values that build the same tensors.

    Attributes:
        values: the fields, as config.json has them or implies them.
        others: the same fields at other values.
    """

    values: Values
    others: tuple[Values, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The fields as people write them."""
        return tuple(map(field_name, self.values))

    def __str__(self) -> str:
        says = "says" if len(self.values) == 1 else "say"
        others = " or ".join(_numbers(one) for one in self.others)
        return (
            f"no shape tells heads from their size: {', '.join(self.names)} {says} "
            f"{_numbers(self.values)}; {others} would load the same tensors and compute something "
            "else"
        )


def _numbers(values: Values) -> str:
    return ", ".join(map(number, values.values()))


def untold(known: ConfigMap) -> Iterator[Untold]:
    """The numbers of heads of a class, and sizes of them, that its tensors do not decide."""
    for counts in _together(known):
        sizes = {size for term in _terms(known) if term & counts for size in term - counts}
        without: set[FieldPath] = set()
        for beside in (without, sizes) if sizes else (without,):
            fields = sorted(counts | beside, key=field_name, reverse=True)
            values = {path: known.values.get(path) or known.sizes.get(path, 0) for path in fields}
            others = tuple(islice(_alike(known, values, counts), _SHOWN))
            if others:
                yield Untold(values, others)
                break


def _alike(known: ConfigMap, values: Values, counts: set[FieldPath]) -> Iterator[Values]:
    """As many heads times a factor, each smaller by it, as far as the same tensors are built."""
    for factor in _FACTORS:
        moved = {p: v * factor if p in counts else v / factor for p, v in values.items()}
        if all(value and value.denominator == 1 for value in moved.values()):
            whole = {path: int(value) for path, value in moved.items()}
            built = known.build_at(whole)
            if not isinstance(built, Refusal) and shapes(built) == known.shapes:
                yield whole


def _terms(known: ConfigMap) -> Iterator[frozenset[FieldPath]]:
    """Every product of fields that sets a dimension."""
    for expression in known.expressions.values():
        yield from expression.terms


def _together(known: ConfigMap) -> list[set[FieldPath]]:
    """The fields that count heads; those that share a head's size, or a quotient, in one set."""
    counts = known.count_fields()
    groups: list[set[FieldPath]] = [{path} for path in sorted(counts, key=field_name)]
    sharing = [set(power.fields) for power in known.powers.values()]
    by_size: dict[FieldPath, set[FieldPath]] = {}
    for term in _terms(known):
        for size in term - counts:
            by_size.setdefault(size, set()).update(term & counts)
    for joint in (*by_size.values(), *sharing):
        touched = [group for group in groups if group & joint]
        if len(touched) > 1:
            apart = [group for group in groups if group not in touched]
            groups = [*apart, {path for group in touched for path in group}]
    return groups
