"""Exact expressions for sizes: sums of products, and products of powers, of config fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from math import isqrt, prod

from ..model.config_json import FieldPath

# (tensor name, dimension), or (layer name, name of its head count as ``heads_of`` returns it)
Quantity = tuple[str, int | str]


@dataclass(frozen=True)
class Expression:
    """``base`` plus, for sets of fields, a coefficient times their steps (changes of value)."""

    base: int  # the size when no field changes
    terms: Mapping[frozenset[FieldPath], Fraction]  # fields -> coefficient; no constant term

    @property
    def fields(self) -> frozenset[FieldPath]:
        return frozenset(name for names in self.terms for name in names)

    def evaluate(self, steps: Mapping[FieldPath, int]) -> Fraction:
        total = Fraction(self.base)
        for fields, coefficient in self.terms.items():
            total += coefficient * prod(steps.get(name, 0) for name in fields)
        return total

    def times(self, ratio: Fraction) -> Expression:
        if ratio == 1:
            return self
        terms = {fields: coefficient * ratio for fields, coefficient in self.terms.items()}
        return Expression(int(self.base * ratio), terms)

    def around(
        self, steps: Mapping[FieldPath, int], renamed: Mapping[FieldPath, FieldPath] | None = None
    ) -> Expression:
        """Return the same size around other field values (``steps`` away), with fields renamed."""
        names, terms = renamed or {}, dict[frozenset[FieldPath], Fraction]()
        for fields, coefficient in self.terms.items():
            for size in range(1, len(fields) + 1):
                for chosen in map(frozenset, combinations(fields, size)):
                    rest = prod(steps.get(name, 0) for name in fields - chosen)
                    moved = frozenset(names.get(name, name) for name in chosen)
                    terms[moved] = terms.get(moved, Fraction(0)) + coefficient * rest
        base = int(self.evaluate(steps))
        return Expression(base, {fields: factor for fields, factor in terms.items() if factor})

    def monomials(self, values: Mapping[FieldPath, int]) -> Mapping[frozenset[FieldPath], Fraction]:
        """Return the size as a sum of products of field values: fields -> factor, no constant."""
        return self.around({name: -value for name, value in values.items()}).terms

    def step_to(
        self, name: FieldPath, steps: Mapping[FieldPath, int], target: int
    ) -> Fraction | None:
        """Return the step of one field that makes the size ``target``; None: it has no effect."""
        slope = Fraction(0)
        rest = Fraction(self.base)
        for fields, coefficient in self.terms.items():
            value = coefficient * prod(steps.get(other, 0) for other in fields if other != name)
            if name in fields:
                slope += value
            else:
                rest += value
        return (target - rest) / slope if slope else None


@dataclass(frozen=True)
class Power:
    """``base`` times a power of each field over its base value (hidden size over heads)."""

    base: int  # the size when no field changes
    exponents: Mapping[FieldPath, int]  # each is 1, 2, -1 or -2
    values: Mapping[FieldPath, int]  # the base value of each field

    @property
    def fields(self) -> frozenset[FieldPath]:
        return frozenset(self.exponents)

    def evaluate(self, steps: Mapping[FieldPath, int]) -> Fraction:
        return prod(
            (self._factor(name, steps) for name in self.exponents), start=Fraction(self.base)
        )

    def times(self, ratio: Fraction) -> Power:
        return self if ratio == 1 else replace(self, base=int(self.base * ratio))

    def step_to(
        self, name: FieldPath, steps: Mapping[FieldPath, int], target: int
    ) -> Fraction | None:
        """Return the step to ``target``; roots are rounded down: check it with ``evaluate``."""
        if name not in self.exponents:
            return None
        others = (self._factor(other, steps) for other in self.exponents if other != name)
        ratio = target / prod(others, start=Fraction(self.base))
        exponent = self.exponents[name]
        if exponent < 0:
            ratio = 1 / ratio
        if abs(exponent) == 2:
            ratio = Fraction(isqrt(ratio.numerator), isqrt(ratio.denominator))
        return self.values[name] * (ratio - 1)

    def _factor(self, name: FieldPath, steps: Mapping[FieldPath, int]) -> Fraction:
        value = self.values[name]
        factor: Fraction = Fraction(value + steps.get(name, 0), value) ** self.exponents[name]
        return factor


def followed(
    rules: Mapping[FieldPath, Power], values: Mapping[FieldPath, int]
) -> dict[FieldPath, int]:
    """Return the values that the rules set for fields not given; none that is not whole."""
    following: dict[FieldPath, int] = {}
    for name, rule in rules.items():
        if name not in values and rule.fields & values.keys():
            steps = {p: values[p] - rule.values[p] for p in rule.fields & values.keys()}
            value = rule.evaluate(steps)
            if value.denominator == 1:
                following[name] = int(value)
    return following


def product(base: int, values: Mapping[FieldPath, int]) -> Expression:
    """Return the expression for ``base`` times each field over its base value."""
    names = sorted(values, key=str)
    return Expression(
        base,
        {
            frozenset(chosen): Fraction(base, prod(values[name] for name in chosen))
            for size in range(1, len(names) + 1)
            for chosen in combinations(names, size)
        },
    )
