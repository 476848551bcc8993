"""Widths from shapes by the map, and the config that is proved to build them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import nn

from .learn import ConfigMap
from .reference import FieldPath, Mismatch, Refusal, compare, field_name, shapes, with_values
from .solve import Conflict, Expression, Observable, Power, Problem, solve

Shapes = Mapping[str, tuple[int, ...]]
Values = dict[FieldPath, int]


def fit(
    known: ConfigMap,
    sizes: Mapping[Observable, int],
    given: Mapping[FieldPath, int] | None = None,
    powers: bool = False,
    hold: Sequence[FieldPath] = (),
) -> Values | Conflict:
    """Values at which the map gives these sizes, in the full model's names; linked fields too.

    ``powers``: take in what the map knows along no straight line too; ``hold``: fields that stay
    where sizes alone allow several answers.
    """
    whole = replace(problem_of(known, sizes, given, powers), hold=hold)
    first: dict[tuple[str, int | str, int], Observable] = {}  # alike layers say it once
    for name, which in whole.targets:
        alike = (known.depth.canonical(name), which, whole.targets[name, which])
        first.setdefault(alike, (name, which))
    few = {observable: whole.targets[observable] for observable in first.values()}
    result = solve(replace(whole, targets=few))
    if isinstance(result, Conflict) and len(few) < len(whole.targets):
        result = solve(whole)  # names every layer
    if isinstance(result, Conflict):
        return result
    for follower, leader in known.linked.items():
        result[follower] = result[leader]
    return result


def problem_of(
    known: ConfigMap,
    sizes: Mapping[Observable, int],
    given: Mapping[FieldPath, int] | None = None,
    powers: bool = False,
) -> Problem:
    """What the map knows of these sizes; a field that is given is one more size."""
    base = known.sizes if powers else known.values
    expressions: dict[Observable, Expression | Power] = {}
    targets: dict[Observable, int] = {}
    for path, value in (given or {}).items():
        key: Observable = (field_name(path), "given")
        expressions[key] = Expression(base[path], {frozenset({path}): Fraction(1)})
        targets[key] = value
    for follower, rule in known.follows.items():
        key = (_in_words(follower, rule), "proportion")
        exponents, values = {**rule.exponents, follower: -1}, {**rule.values, follower: rule.base}
        expressions[key], targets[key] = Power(1, exponents, values), 1
    for (name, which), target in sizes.items():
        canonical = (known.depth.canonical(name), which)
        found: Expression | Power | None = known.expressions.get(canonical)
        if found is None and powers:
            found = known.powers.get(canonical)
        if found is not None:
            expressions[name, which] = found
            targets[name, which] = target
    return Problem(expressions, base, targets)


def _in_words(follower: FieldPath, rule: Power) -> str:
    """What a class keeps in proportion, for people: heads * head_dim = expand * hidden_size."""
    along = [field_name(path) for path, exponent in rule.exponents.items() if exponent > 0]
    against = [field_name(path) for path, exponent in rule.exponents.items() if exponent < 0]
    return " * ".join([field_name(follower), *against]) + " = " + " * ".join(along)


def build_as(
    known: ConfigMap,
    base: dict[str, Any],
    target: Shapes,
    values: Mapping[FieldPath, int],
    buffers: bool = False,
) -> tuple[dict[str, Any], nn.Module] | Refusal | Sequence[Mismatch]:
    """The config's JSON at these values and what it builds, where that has the target's shapes.

    Fields that are unset stay unset where that suffices.
    """
    changed = {
        path: value
        for path, value in values.items()
        if value != known.sizes.get(path) or value_at(base, path) not in (value, None)
    }
    explicit = {path: values[path] for path in known.unset}
    attempts: list[Values] = [{p: v for p, v in changed.items() if p not in known.unset}]
    attempts += [{**attempts[0], path: value} for path, value in explicit.items()]
    attempts.append({**changed, **explicit})
    outcome: Refusal | Sequence[Mismatch] = Refusal("not tried")
    for attempt in attempts:
        data = with_values(base, dict(attempt))
        built = known.builder.build(data, buffers=buffers)
        if isinstance(built, Refusal):
            outcome = built
            continue
        outcome = compare(dict(target), shapes(built))
        if not outcome:
            return data, built
    return outcome


def value_at(data: Any, path: FieldPath) -> Any:
    """What stands at a place of a config's JSON; None: nothing does."""
    for key in path:
        if isinstance(data, dict):
            data = data.get(key)
        elif isinstance(data, list) and isinstance(key, int):
            data = data[key]
        else:
            return None
    return data
