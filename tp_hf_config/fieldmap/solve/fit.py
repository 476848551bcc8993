"""Fit the values of fields to shapes by the field map, and prove the config by building it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import nn

from ...model.build import Refusal
from ...model.config_json import FieldPath, field_name, value_at, with_values
from ...model.shapes import Mismatch, Shapes, compare, shapes
from ..expressions import Expression, Power, Quantity
from ..field_map import FieldMap
from .integers import Conflict, Problem, solve

Values = dict[FieldPath, int]
"""Field -> its value."""


def fit(
    field_map: FieldMap,
    sizes: Mapping[Quantity, int],
    given: Mapping[FieldPath, int] | None = None,
    powers: bool = False,
    hold: Sequence[FieldPath] = (),
) -> Values | Conflict:
    """Return a value for every field at which the field map gives these sizes, or the conflict.

    Quantities have the full model's names. With ``powers``, those that are powers of fields are
    used too. Fields in ``hold`` stay as they are where sizes alone allow several solutions.
    """
    problem = replace(problem_of(field_map, sizes, given, powers), hold=hold)
    first: dict[tuple[str, int | str, int], Quantity] = {}  # layers of one kind count once
    for name, which in problem.targets:
        same_kind = (field_map.depth.canonical(name), which, problem.targets[name, which])
        first.setdefault(same_kind, (name, which))
    distinct = {quantity: problem.targets[quantity] for quantity in first.values()}
    result = solve(replace(problem, targets=distinct))
    if isinstance(result, Conflict) and len(distinct) < len(problem.targets):
        result = solve(problem)  # again with all, so that it names every layer
    if isinstance(result, Conflict):
        return result
    for follower, leader in field_map.must_equal.items():
        result[follower] = result[leader]
    return result


def problem_of(
    field_map: FieldMap,
    sizes: Mapping[Quantity, int],
    given: Mapping[FieldPath, int] | None = None,
    powers: bool = False,
) -> Problem:
    """Return the problem to solve: these sizes, and how the fields make them by the field map.

    A field that is given counts as one more quantity, and so does each proportion of fields.
    """
    base = field_map.sizes if powers else field_map.values
    expressions: dict[Quantity, Expression | Power] = {}
    targets: dict[Quantity, int] = {}
    for field, value in (given or {}).items():
        key: Quantity = (field_name(field), "given")
        expressions[key] = Expression(base[field], {frozenset({field}): Fraction(1)})
        targets[key] = value
    for follower, rule in field_map.ratio_rules.items():
        key = (_in_words(follower, rule), "proportion")
        exponents, values = {**rule.exponents, follower: -1}, {**rule.values, follower: rule.base}
        expressions[key], targets[key] = Power(1, exponents, values), 1
    for (name, which), target in sizes.items():
        expression: Expression | Power | None = field_map.expression_of(name, which)
        if expression is None and powers:
            expression = field_map.power_of(name, which)
        if expression is not None:
            expressions[name, which] = expression
            targets[name, which] = target
    return Problem(expressions, base, targets)


def _in_words(follower: FieldPath, rule: Power) -> str:
    """Return a proportion of fields as text: ``heads * head_dim = expand * hidden_size``."""
    direct = [field_name(field) for field, exponent in rule.exponents.items() if exponent > 0]
    inverse = [field_name(field) for field, exponent in rule.exponents.items() if exponent < 0]
    return " * ".join([field_name(follower), *inverse]) + " = " + " * ".join(direct)


def build_with_shapes(
    field_map: FieldMap,
    base: dict[str, Any],
    target: Shapes,
    values: Mapping[FieldPath, int],
    buffers: bool = False,
) -> tuple[dict[str, Any], nn.Module] | Refusal | Sequence[Mismatch]:
    """Build the class at these values and check that it has the target's shapes.

    Unset fields of ``base``, the config's JSON to start from, stay unset where that suffices.
    Return the new JSON and the built model; or the refusal or the mismatches of the last attempt.
    """
    changed = {
        field: value
        for field, value in values.items()
        if value != field_map.sizes.get(field) or value_at(base, field) not in (value, None)
    }
    explicit = {field: values[field] for field in field_map.unset}
    attempts: list[Values] = [{p: v for p, v in changed.items() if p not in field_map.unset}]
    attempts += [{**attempts[0], field: value} for field, value in explicit.items()]
    attempts.append({**changed, **explicit})
    outcome: Refusal | Sequence[Mismatch] = Refusal("not tried")
    for attempt in attempts:
        data = with_values(base, attempt)
        built = field_map.builder.build(data, buffers=buffers)
        if isinstance(built, Refusal):
            outcome = built
            continue
        outcome = compare(target, shapes(built))
        if not outcome:
            return data, built
    return outcome
