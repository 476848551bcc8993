"""Fields that a class takes only in proportion: Mamba 2's heads times head dim is its inner width.

No such field moves alone.  One of them follows from the others in every build, so that those move
like any other field; which one does not matter to the class, only to how simple its dimensions are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from .lines import expressions, powers
from .moves import Move
from .reference import FieldPath
from .solve import Power
from .study import Study

Partners = dict[FieldPath, tuple[FieldPath, ...]]
"""Fields, and those that have to move with each, as many times."""


def partners(study: Study, values: Mapping[FieldPath, int]) -> Partners:
    """The refused fields that the class takes in proportion with another, and those others."""
    found: Partners = {}
    for path, other in combinations(study.refused, 2):
        sizes = study.at({path: 2 * values[path], other: 2 * values[other]}, watch=False)
        if isinstance(sizes, dict) and any(sizes.values()):
            found[path] = (*found.get(path, ()), other)
            found[other] = (*found.get(other, ()), path)
    return found


def let_follow(
    study: Study, bound: Partners, values: Mapping[FieldPath, int]
) -> dict[FieldPath, list[Move]]:
    """Let one field of each proportion follow in all builds from now on; moves of the others."""
    moves: dict[FieldPath, list[Move]] = {}
    for fields in _proportions(bound):
        before = study.follows
        tried: list[tuple[tuple[int, ...], Power, FieldPath, dict[FieldPath, list[Move]]]] = []
        for follower in fields:
            rule = _rule(follower, fields, bound, values)
            study.follows = {**before, follower: rule}
            found = _moves(study, rule, values)
            if found is not None:
                tried.append((_tangled(study, values, found), rule, follower, found))
        study.follows = before
        if tried:
            _, rule, follower, found = min(tried, key=lambda one: one[0])
            study.follows = {**before, follower: rule}
            moves |= found
    return moves


def _proportions(bound: Partners) -> Iterator[list[FieldPath]]:
    """Fields that belong to one proportion."""
    left = sorted(bound, key=str)
    while left:
        found = [left[0]]
        for path in found:
            found += [other for other in bound[path] if other not in found]
        left = [path for path in left if path not in found]
        yield sorted(found, key=str)


def _rule(
    follower: FieldPath,
    fields: Sequence[FieldPath],
    bound: Partners,
    values: Mapping[FieldPath, int],
) -> Power:
    """As many times as its partners, and as many times less as what stands beside it."""
    others = {path: values[path] for path in fields if path != follower}
    exponents = {path: 1 if path in bound[follower] else -1 for path in others}
    return Power(values[follower], exponents, others)


def _moves(
    study: Study, rule: Power, values: Mapping[FieldPath, int]
) -> dict[FieldPath, list[Move]] | None:
    """Moves of the fields that another follows from; ``None``: the class has another rule."""
    found: dict[FieldPath, list[Move]] = {}
    for path in rule.exponents:
        points = study.alone(path, values[path])
        if not isinstance(points, list) or not points:
            return None
        found[path] = points
    return found


def _tangled(
    study: Study, values: Mapping[FieldPath, int], moves: Mapping[FieldPath, list[Move]]
) -> tuple[int, ...]:
    """How many dimensions follow no rule, in how many a field has several parts, and all parts."""
    straight = expressions(study, values, moves)
    curved, loose = powers(study, values, moves, straight)
    several = parts = 0
    for expression in straight.values():
        products = expression.monomials(values)
        own = [sum(path in fields for fields in products) for path in moves]
        several += sum(number > 1 for number in own)
        parts += sum(own)
    return len(loose), several, parts + sum(len(power.fields) for power in curved.values())
