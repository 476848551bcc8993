"""Fit an expression to the probes of each quantity."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from math import prod

from ..model.config_json import FieldPath
from .expressions import Expression, Power, Quantity, product
from .probe import Probe, Sizes, Study


def expressions(
    study: Study, values: Mapping[FieldPath, int], probes: Mapping[FieldPath, list[Probe]]
) -> dict[Quantity, Expression]:
    """Return an expression for each quantity that changes along straight lines.

    Quantities on no straight line (an image's number of patches) get none; only the proof looks at
    them. ``values`` are the fields' own values.
    """
    slopes: dict[Quantity, dict[FieldPath, Fraction]] = {}
    inexact: set[Quantity] = set()
    for field, field_probes in probes.items():
        for key in {key for probe in field_probes for key in probe.sizes}:
            field_slopes = {
                Fraction(probe.sizes.get(key, study.base[key]) - study.base[key])
                / (probe.value - values[field])
                for probe in field_probes
                if probe.sizes.get(key) != 0
            }
            if len(field_slopes) == 1:
                slope = field_slopes.pop()
                if slope:
                    slopes.setdefault(key, {})[field] = slope
            elif field_slopes:
                inexact.add(key)
    pairs = _pairs(study, values, probes, slopes)
    return {
        key: _expression(study.base[key], key, by_field, values, pairs)
        for key, by_field in slopes.items()
        if key not in inexact
    }


def powers(
    study: Study,
    values: Mapping[FieldPath, int],
    probes: Mapping[FieldPath, list[Probe]],
    straight: Collection[Quantity],
) -> tuple[dict[Quantity, Power], dict[Quantity, frozenset[FieldPath]]]:
    """Return the quantities on no straight line: those that are powers of fields, and the rest.

    The rest come with the fields that change them. Those in ``straight`` have an expression
    already.
    """
    sizes: dict[Quantity, dict[FieldPath, list[tuple[int, int]]]] = {}
    for field, field_probes in probes.items():
        for probe in field_probes:
            for key, size in probe.sizes.items():
                if key not in straight and size:
                    sizes.setdefault(key, {}).setdefault(field, []).append((probe.value, size))
    fitted: dict[Quantity, Power] = {}
    unfitted: dict[Quantity, frozenset[FieldPath]] = {}
    for key, by_field in sizes.items():
        exponents = {
            field: _exponent(values[field], study.base[key], points)
            for field, points in by_field.items()
        }
        if all(exponents.values()):
            fitted[key] = Power(
                study.base[key], exponents, {field: values[field] for field in exponents}
            )
        else:
            unfitted[key] = frozenset(by_field)
    return fitted, unfitted


def _pairs(
    study: Study,
    values: Mapping[FieldPath, int],
    probes: Mapping[FieldPath, list[Probe]],
    slopes: Mapping[Quantity, Mapping[FieldPath, Fraction]],
) -> list[tuple[dict[FieldPath, int], Sizes]]:
    """Build with two fields changed at once, where a quantity mixes fields and is no plain product.

    Return the steps of both fields and the size of every quantity, for each build.
    """
    wanted = {
        frozenset(pair)
        for key, by_field in slopes.items()
        if len(by_field) > 1 and not _is_product(study.base[key], by_field, values)
        for pair in combinations(by_field, 2)
    }
    result: list[tuple[dict[FieldPath, int], Sizes]] = []
    for pair in wanted:
        pair_values = {field: probes[field][0].value for field in pair}
        sizes = study.at(pair_values)
        if isinstance(sizes, dict):
            steps = {field: pair_values[field] - values[field] for field in pair}
            result.append((steps, {**study.base, **sizes}))
    return result


def _expression(
    base: int,
    key: Quantity,
    slopes: Mapping[FieldPath, Fraction],
    values: Mapping[FieldPath, int],
    pairs: list[tuple[dict[FieldPath, int], Sizes]],
) -> Expression:
    """Return the expression of one quantity; ``pairs`` gives the products of fields in it."""
    if len(slopes) > 1 and _is_product(base, slopes, values):
        return product(base, {field: values[field] for field in slopes})
    terms = {frozenset({field}): slope for field, slope in slopes.items()}
    for steps, sizes in pairs:
        if steps.keys() <= slopes.keys():
            straight = base + sum((slopes[p] * step for p, step in steps.items()), Fraction(0))
            cross = (sizes[key] - straight) / prod(steps.values())
            if cross:
                terms[frozenset(steps)] = cross
    return Expression(base, terms)


def _is_product(
    base: int, slopes: Mapping[FieldPath, Fraction], values: Mapping[FieldPath, int]
) -> bool:
    """True if a size is in proportion to every one of these fields."""
    return all(slope * values[field] == base for field, slope in slopes.items())


def _exponent(value: int, base: int, points: Sequence[tuple[int, int]]) -> int:
    """Return the power of a field that a size follows: 1, -1, 2, -2, or 0 if none of them fits.

    ``points`` are other values of the field, each with the size there. A quotient that is not whole
    everywhere is rounded down: 40 channels have 20 dimensions in each of 2 heads, 6 in each of 6.
    """
    for exponent in (1, -1, 2, -2):
        powers = [base * Fraction(then, value) ** exponent for then, _ in points]
        exact = [size == power for power, (_, size) in zip(powers, points, strict=True)]
        rounded = exponent < 0 and [*map(int, powers)] == [size for _, size in points]
        if all(exact) or (rounded and any(exact)):
            return exponent
    return 0
