"""From moves to lines: how the fields make each dimension."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from math import prod

from .moves import Move, Sizes
from .reference import FieldPath
from .solve import Expression, Observable, Power, product
from .study import Study


def expressions(
    study: Study, values: Mapping[FieldPath, int], moves: Mapping[FieldPath, list[Move]]
) -> dict[Observable, Expression]:
    """One expression per observable that moves along straight lines.

    The others (an image's number of patches) are looked at by the proof alone.
    """
    slopes: dict[Observable, dict[FieldPath, Fraction]] = {}
    inexact: set[Observable] = set()
    for path, points in moves.items():
        for key in {key for point in points for key in point.sizes}:
            found = {
                Fraction(point.sizes.get(key, study.base[key]) - study.base[key])
                / (point.value - values[path])
                for point in points
                if point.sizes.get(key) != 0
            }
            if len(found) == 1:
                slope = found.pop()
                if slope:
                    slopes.setdefault(key, {})[path] = slope
            elif found:
                inexact.add(key)
    pairs = _pairs(study, values, moves, slopes)
    return {
        key: _expression(study.base[key], key, by_field, values, pairs)
        for key, by_field in slopes.items()
        if key not in inexact
    }


def powers(
    study: Study,
    values: Mapping[FieldPath, int],
    moves: Mapping[FieldPath, list[Move]],
    straight: Collection[Observable],
) -> tuple[dict[Observable, Power], dict[Observable, frozenset[FieldPath]]]:
    """Observables on no straight line: those that are powers of the fields, and the rest."""
    sizes: dict[Observable, dict[FieldPath, list[tuple[int, int]]]] = {}
    for path, points in moves.items():
        for point in points:
            for key, size in point.sizes.items():
                if key not in straight and size:
                    sizes.setdefault(key, {}).setdefault(path, []).append((point.value, size))
    powers: dict[Observable, Power] = {}
    loose: dict[Observable, frozenset[FieldPath]] = {}
    for key, by_field in sizes.items():
        exponents = {
            path: _exponent(values[path], study.base[key], points)
            for path, points in by_field.items()
        }
        if all(exponents.values()):
            powers[key] = Power(
                study.base[key], exponents, {path: values[path] for path in exponents}
            )
        else:
            loose[key] = frozenset(by_field)
    return powers, loose


def _pairs(
    study: Study,
    values: Mapping[FieldPath, int],
    moves: Mapping[FieldPath, list[Move]],
    slopes: Mapping[Observable, Mapping[FieldPath, Fraction]],
) -> list[tuple[dict[FieldPath, int], Sizes]]:
    """Builds with two fields moved at once, where a dimension mixes them: moves and sizes."""
    wanted = {
        frozenset(pair)
        for key, by_field in slopes.items()
        if len(by_field) > 1 and not _is_product(study.base[key], by_field, values)
        for pair in combinations(by_field, 2)
    }
    result: list[tuple[dict[FieldPath, int], Sizes]] = []
    for pair in wanted:
        at = {path: moves[path][0].value for path in pair}
        sizes = study.at(at)
        if isinstance(sizes, dict):
            steps = {path: at[path] - values[path] for path in pair}
            result.append((steps, {**study.base, **sizes}))
    return result


def _expression(
    base: int,
    key: Observable,
    slopes: Mapping[FieldPath, Fraction],
    values: Mapping[FieldPath, int],
    pairs: list[tuple[dict[FieldPath, int], Sizes]],
) -> Expression:
    if len(slopes) > 1 and _is_product(base, slopes, values):
        return product(base, {path: values[path] for path in slopes})
    terms = {frozenset({path}): slope for path, slope in slopes.items()}
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
    return all(slope * values[path] == base for path, slope in slopes.items())


def _exponent(value: int, base: int, points: Sequence[tuple[int, int]]) -> int:
    """The power of a field that a size follows; 0: none."""
    for exponent in (1, -1, 2, -2):
        if all(size == base * Fraction(then, value) ** exponent for then, size in points):
            return exponent
    return 0
