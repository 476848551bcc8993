"""Fit the values of fields to shapes, prove the config by building it, or explain the conflict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import ConfigSyncError, listed
from ...model.build import Refusal
from ...model.config_json import FieldPath, field_name, value_at, with_values
from ...model.shapes import Mismatch, Shapes, compare, shapes
from ..expressions import Expression, Power, Quantity
from ..field_map import FieldMap, nearest_accepted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Values = dict[FieldPath, int]


def fit(
    field_map: FieldMap,
    sizes: Mapping[Quantity, int],
    given: Mapping[FieldPath, int] | None = None,
    powers: bool = False,
    hold: Sequence[FieldPath] = (),
) -> Values | Conflict:
    """Return a value for every field at which the field map gives these sizes, or the conflict.

    ``powers``: also use quantities that are powers of fields. ``hold``: fields to keep if several
    solutions fit. Names are the full model's.
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
    base = field_map.sizes if powers else field_map.values
    # a given field counts as one more quantity, and so does each proportion of fields
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
    """Build the class at these values and compare it with the target; return its JSON and model."""
    changed = {
        field: value
        for field, value in values.items()
        if value != field_map.sizes.get(field) or value_at(base, field) not in (value, None)
    }
    # unset fields remain unset if that suffices
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


@dataclass(frozen=True)
class Conflict:
    """Why there is no single solution."""

    # field -> the value that it would need -> the quantities that need it
    needs: Mapping[FieldPath, Mapping[Fraction, Sequence[Quantity]]] = dataclasses.field(
        default_factory=dict
    )
    ambiguous: Sequence[Mapping[FieldPath, int]] = ()  # several solutions, if nothing decides


@dataclass(frozen=True)
class Problem:
    """Sizes that quantities have to have, and how the fields determine them."""

    expressions: Mapping[Quantity, Expression | Power]
    base: Mapping[FieldPath, int]  # the field values that the expressions were learned at
    targets: Mapping[Quantity, int]
    hold: Sequence[FieldPath] = ()  # fields not to change if several solutions fit, in order


def solve(problem: Problem) -> dict[FieldPath, int] | Conflict:
    steps = _search(problem, {})
    return steps if isinstance(steps, Conflict) else _values(problem, steps, problem.base)


def open_together(problem: Problem) -> list[FieldPath]:
    """Return fields that the targets determine only together: one value settles the others."""
    steps = _forced(problem, {})
    return [] if isinstance(steps, Conflict) else _entangled(problem, steps)


def _search(problem: Problem, steps: Mapping[FieldPath, int]) -> dict[FieldPath, int] | Conflict:
    """Return the steps (value minus base value) that the targets require; or the conflict."""
    forced = _forced(problem, steps)
    if isinstance(forced, Conflict):
        return forced
    entangled = _entangled(problem, forced)
    if not entangled:
        return forced
    return _branch(problem, forced, entangled)


def _forced(problem: Problem, steps: Mapping[FieldPath, int]) -> dict[FieldPath, int] | Conflict:
    """Add the steps that follow from single equations, or return the conflict."""
    steps = dict(steps)
    while True:
        votes = _votes(problem, steps)
        conflict = _contradictions(problem, votes, steps)
        if conflict is not None:
            return conflict
        if not votes:
            return steps
        for name, by_step in votes.items():
            steps[name] = int(next(iter(by_step)))


def _votes(
    problem: Problem, steps: Mapping[FieldPath, int]
) -> dict[FieldPath, dict[Fraction, list[Quantity]]]:
    """Return field -> step -> quantities that require it, as their only open field."""
    votes: dict[FieldPath, dict[Fraction, list[Quantity]]] = {}
    for quantity, target in problem.targets.items():
        expression = problem.expressions[quantity]
        free = expression.fields - steps.keys()
        if len(free) == 1:
            (name,) = free
            step = expression.step_to(name, steps, target)
            if step is not None:
                votes.setdefault(name, {}).setdefault(step, []).append(quantity)
    return votes


def _contradictions(
    problem: Problem,
    votes: Mapping[FieldPath, Mapping[Fraction, Sequence[Quantity]]],
    steps: Mapping[FieldPath, int],
) -> Conflict | None:
    """Return the conflict between these votes, or between the steps and the targets, or None."""
    needs: dict[FieldPath, dict[Fraction, Sequence[Quantity]]] = {}
    for name, by_step in votes.items():
        values = {problem.base[name] + step: who for step, who in by_step.items()}
        if len(values) > 1 or any(v.denominator != 1 or v < 1 for v in values):
            needs[name] = values
    for quantity, target in problem.targets.items():
        expression = problem.expressions[quantity]
        if expression.fields <= steps.keys() and expression.evaluate(steps) != target:
            for name in expression.fields or {("no field",)}:
                wanted = expression.step_to(name, steps, target)
                base = problem.base.get(name, 0)
                by_value = needs.setdefault(name, {})
                by_value.setdefault(Fraction(base + steps.get(name, 0)), [])
                if wanted is not None:
                    by_value.setdefault(base + wanted, [])
                    by_value[base + wanted] = [*by_value[base + wanted], quantity]
    return Conflict(needs) if needs else None


def _entangled(problem: Problem, steps: Mapping[FieldPath, int]) -> list[FieldPath]:
    """Return the fields without a step that share a quantity with another such field."""
    entangled: set[FieldPath] = set()
    for quantity in problem.targets:
        free = problem.expressions[quantity].fields - steps.keys()
        if len(free) > 1:
            entangled |= free
    return sorted(entangled, key=str)


def _branch(
    problem: Problem, steps: dict[FieldPath, int], entangled: Sequence[FieldPath]
) -> dict[FieldPath, int] | Conflict:
    """Keep one entangled field at its base value and solve for the rest; try ``hold`` first."""
    for name in problem.hold:
        if name in entangled:
            result = _search(problem, {**steps, name: 0})
            if not isinstance(result, Conflict):
                return result
    solutions: list[dict[FieldPath, int]] = []
    failures: list[Conflict] = []
    for name in entangled:
        result = _search(problem, {**steps, name: 0})
        if isinstance(result, Conflict):
            if result.ambiguous:
                return result
            failures.append(result)
        elif result not in solutions:
            solutions.append(result)
    if len(solutions) == 1:
        return solutions[0]
    if solutions:
        return Conflict(ambiguous=[_values(problem, s, entangled) for s in solutions])
    return min(failures, key=lambda conflict: len(conflict.needs))


def _values(
    problem: Problem, steps: Mapping[FieldPath, int], names: Iterable[FieldPath]
) -> dict[FieldPath, int]:
    return {name: problem.base[name] + steps.get(name, 0) for name in names}


AGAIN = "Nothing was written. Continue to prune, then call hook.sync()."  # how messages end


def explain_conflict(
    model: PreTrainedModel, field_map: FieldMap, conflict: Conflict
) -> ConfigSyncError:
    """Return the error for a conflict: which layers need which value, or the several solutions."""
    name = type(model).__name__
    if conflict.ambiguous:
        choices = " or ".join(
            ", ".join(f"{field_name(field)}={value}" for field, value in solution.items())
            for solution in conflict.ambiguous
        )
        return ConfigSyncError(
            f"{name}: the shapes fit {choices}, and the hook did not see which channels were "
            "removed. Prune with the pruner's groups, so that it does."
        )
    needs = {
        field_name(field): {
            int(value) if value.denominator == 1 else float(value): list(dict(who))
            for value, who in values.items()
        }
        for field, values in conflict.needs.items()
    }
    parts = [
        f"{named}: {_needs(by_value, field_map.values.get(field))}"
        for (named, by_value), field in zip(needs.items(), conflict.needs, strict=True)
    ]
    return ConfigSyncError(
        f"no {type(model.config).__name__} describes {name} with these widths. "
        + "; ".join(parts)
        + ". One field sets all of these, so each has to lose the same number of channels: prune "
        "them all at one ratio with local ranking (global_pruning=False), or keep them all "
        f"(ignored_layers=). {AGAIN}",
        {named: {int(v): who for v, who in by.items()} for named, by in needs.items()},
    )


def explain_refusal(
    model: PreTrainedModel, field_map: FieldMap, values: dict[FieldPath, int], refusal: Refusal
) -> ConfigSyncError:
    """Return the error for values that the class refuses: its words, and the nearest it accepts."""
    changed = {field: value for field, value in values.items() if value != field_map.values[field]}
    changes = ", ".join(
        f"{field_name(field)} {field_map.values[field]} -> {value}"
        for field, value in changed.items()
    )
    advice = []
    for field in changed:
        if field not in field_map.must_equal:
            nearest = nearest_accepted(field_map, changed, field)
            if nearest:
                advice.append(f"{field_name(field)} {' or '.join(map(str, nearest))}")
    hint = f" The nearest values that it accepts: {'; '.join(advice)}." if advice else ""
    return ConfigSyncError(
        f"{type(model.config).__name__} refuses the values of the pruned weights ({changes}). Its "
        f"message: {refusal.reason!r}.{hint} Choose ratios that give accepted values after every "
        f"step, or set round_to= to a number that the class accepts. {AGAIN}"
    )


def explain_mismatch(model: PreTrainedModel, mismatches: Sequence[Mismatch]) -> ConfigSyncError:
    return ConfigSyncError(
        f"no {type(model.config).__name__} describes {type(model).__name__} with these widths: "
        f"{listed(mismatches, '; ')}. No field of the config sets these dimensions separately: "
        f"keep the layers (ignored_layers=). {AGAIN}"
    )


def explain_vanished(model: PreTrainedModel, names: Sequence[str]) -> ConfigSyncError:
    """Return the error for a count that becomes 0, which would break some forward pass."""
    return ConfigSyncError(
        f"{type(model).__name__} with these widths has {names[0]} 0. Another field, which sets no "
        f"shape, would have to change too. Keep this width (prune=, ignored_layers=). {AGAIN}"
    )


def explain_unfilled(model: PreTrainedModel, names: Sequence[str]) -> ConfigSyncError:
    """Return the error for buffers that are neither saved nor computed from the config alone."""
    return ConfigSyncError(
        f"{type(model).__name__} with these widths has another shape of {names[0]}. This buffer is "
        "not saved, and its new values cannot be computed from the config. Keep this width "
        f"(prune=, ignored_layers=). {AGAIN}"
    )


def _needs(by_value: dict[int | float, list[str]], base: int | None) -> str:
    parts = []
    for value, names in sorted(by_value.items()):
        if names:
            parts.append(f"{listed(names)} {'need' if len(names) > 1 else 'needs'} {value:g}")
        else:
            parts.append(f"the rest needs {value:g}")
    return ", ".join(parts) + (f" (it was {base})" if base is not None else "")
