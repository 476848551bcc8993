"""Solve for the values of fields: fit them to shapes, prove the config, or explain the conflict.

:func:`recover` has the shapes of a pruned checkpoint alone. They determine widths. A head count
that no shape shows keeps its value if it can. A config is accepted only if the class builds these
shapes from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice, product
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ConfigSyncError, listed
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name, value_at, with_values
from ..model.shapes import Mismatch, Shapes, compare, shapes
from ..model.tensors import ties_of
from .field_map import Expression, FieldMap, Power, Quantity, Values, nearest_accepted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Solution = dict[FieldPath, int]


def fit(
    field_map: FieldMap,
    sizes: Mapping[Quantity, int],
    given: Values | None = None,
    powers: bool = False,
    hold: Sequence[FieldPath] = (),
) -> Solution | Conflict:
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
    given: Values | None = None,
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
    field_map: FieldMap, base: dict[str, Any], target: Shapes, values: Values, buffers: bool = False
) -> tuple[dict[str, Any], nn.Module] | Refusal | Sequence[Mismatch]:
    """Build the class at these values and compare it with the target; return its JSON and model."""
    changed = {
        field: value
        for field, value in values.items()
        if value != field_map.sizes.get(field) or value_at(base, field) not in (value, None)
    }
    # unset fields remain unset if that suffices
    explicit = {field: values[field] for field in field_map.unset}
    attempts: list[Solution] = [{p: v for p, v in changed.items() if p not in field_map.unset}]
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
    ambiguous: Sequence[Values] = ()  # several solutions, if nothing decides


@dataclass(frozen=True)
class Problem:
    """Sizes that quantities have to have, and how the fields determine them."""

    expressions: Mapping[Quantity, Expression | Power]
    base: Values  # the field values that the expressions were learned at
    targets: Mapping[Quantity, int]
    hold: Sequence[FieldPath] = ()  # fields not to change if several solutions fit, in order


def solve(problem: Problem) -> dict[FieldPath, int] | Conflict:
    steps = _search(problem, {})
    return steps if isinstance(steps, Conflict) else _values(problem, steps, problem.base)


def open_together(problem: Problem) -> list[FieldPath]:
    """Return fields that the targets determine only together: one value settles the others."""
    steps = _forced(problem, {})
    return [] if isinstance(steps, Conflict) else _entangled(problem, steps)


def _search(problem: Problem, steps: Values) -> dict[FieldPath, int] | Conflict:
    """Return the steps (value minus base value) that the targets require; or the conflict."""
    forced = _forced(problem, steps)
    if isinstance(forced, Conflict):
        return forced
    entangled = _entangled(problem, forced)
    if not entangled:
        return forced
    return _branch(problem, forced, entangled)


def _forced(problem: Problem, steps: Values) -> dict[FieldPath, int] | Conflict:
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


def _votes(problem: Problem, steps: Values) -> dict[FieldPath, dict[Fraction, list[Quantity]]]:
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
    steps: Values,
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


def _entangled(problem: Problem, steps: Values) -> list[FieldPath]:
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


def _values(problem: Problem, steps: Values, names: Iterable[FieldPath]) -> dict[FieldPath, int]:
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


_MOST_GUESSES = 64  # values of joint fields that are tried
_LISTED = 8  # solutions that are tried, and that a conflict lists


@dataclass(frozen=True)
class Recovery:
    values: Solution  # every field that sets a size
    data: dict[str, Any]  # the config's JSON
    undecided: frozenset[FieldPath] = frozenset()  # fields of head counts that no shape shows


def recover(
    field_map: FieldMap, target: Shapes, given: Values | None = None
) -> Recovery | Conflict | Refusal:
    """Return the one config that builds these shapes, proved by building it, or why there is none.

    Of tied tensors, ``target`` has at least one. ``given`` fields have a fixed value.
    """
    given = dict(given or {})
    refusal = _other_tensors(field_map, target)
    if refusal is not None:
        return refusal
    goal = Goal(field_map, target)
    fitting, reason = _fitting(goal, given)
    if len(fitting) > 1:
        return Conflict(ambiguous=_differences(fitting[:_LISTED]))
    if not fitting:
        return reason
    (values,) = fitting
    proof = build_with_shapes(field_map, field_map.data, target, values)
    if isinstance(proof, tuple):
        return Recovery(values, proof[0], frozenset(hidden_counts(field_map)) - given.keys())
    return proof if isinstance(proof, Refusal) else _mismatched(field_map, proof)


def _other_tensors(field_map: FieldMap, target: Shapes) -> Refusal | None:
    """Return why the class builds no model with these tensors, whatever the widths, or None."""
    full = field_map.builder.build(field_map.data)
    if isinstance(full, Refusal):
        return full
    expected = shapes(full)
    name = field_map.builder.model_class.__name__
    extra = sorted(target.keys() - expected.keys())
    if extra:
        return Refusal(f"{name} builds no {extra[0]} from this config at any width")
    tied = _tied_groups(full)
    missing = sorted(
        tensor
        for tensor in expected.keys() - target.keys()
        if not tied.get(tensor, set()) & target.keys()
    )
    if missing:
        return Refusal(f"{missing[0]} is missing, which {name} builds from this config")
    return None


def _tied_groups(model: nn.Module) -> dict[str, set[str]]:
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return {name: set(tied.names) for tied in ties_of(model) for name in tied.names}


def _fitting(goal: Goal, given: Values) -> tuple[list[Solution], Conflict | Refusal]:
    """Return values that fit the field map and are accepted; and the first reason, if none are."""
    field_map, sizes = goal.field_map, goal.sizes
    fitting: list[Solution] = []
    reason: Conflict | Refusal | None = None
    for solution in islice(solutions(field_map, sizes, given), _LISTED):
        outcome = solution if isinstance(solution, Conflict) else _accepted(goal, solution, given)
        if isinstance(outcome, dict):
            fitting.append(outcome)
        else:
            reason = reason or outcome
    for solution in islice(others(field_map, sizes, given), 0 if fitting else _MOST_GUESSES):
        outcome = _accepted(goal, solution, given)
        if isinstance(outcome, dict):
            fitting.append(outcome)
    return fitting, reason or Refusal("no whole numbers give these shapes")


def _accepted(goal: Goal, solution: Solution, given: Values) -> Solution | Refusal:
    """Return the values, with head counts, that build the target, or why none of them do."""
    reason = Refusal("not tried")
    for values in islice(with_heads(goal, solution, given), SMALL):
        outcome = goal.compare_at(values)
        if not outcome:
            return values
        if not isinstance(outcome, Refusal):
            return _mismatched(goal.field_map, outcome)
        reason = outcome
    return reason


def _mismatched(field_map: FieldMap, mismatches: Sequence[Mismatch]) -> Refusal:
    name = field_map.builder.config_class.__name__
    return Refusal(f"no width of {name} gives {listed(mismatches, '; ')}")


def _differences(solutions: Sequence[Solution]) -> list[Solution]:
    """Return the fields in which several solutions differ, at their values in each."""
    differing = [
        field for field in solutions[0] if len({solution[field] for solution in solutions}) > 1
    ]
    return [{field: solution[field] for field in differing} for solution in solutions]


SMALL = 128  # combinations of head counts to try; of a joint field, four times as many values


class Goal:
    def __init__(self, field_map: FieldMap, target: Shapes):
        self.field_map = field_map
        self.target = target
        origins = {name: field_map.depth.origin(name) for name in field_map.shapes}
        # by the shallow model's names, with the pieces of all layers
        self.shallow_target = {
            name: target[full] for name, full in origins.items() if full in target
        }
        self.sizes: dict[Quantity, int] = {
            (name, dim): size for name, shape in target.items() for dim, size in enumerate(shape)
        }

    def compare_at(self, values: Solution) -> Sequence[Mismatch] | Refusal:
        """Return how the shallow build at these values differs from the target, or the refusal."""
        field_map = self.field_map
        built = field_map.shapes_at(values)
        # the class may accept a default only where it is left unset
        if isinstance(built, Refusal) and field_map.unset:
            set_values = {p: value for p, value in values.items() if p not in field_map.unset}
            built = field_map.builder.shapes_at(with_values(field_map.depth.data, set_values))
        if isinstance(built, Refusal):
            return built
        return compare(self.shallow_target, field_map.depth.with_all_pieces(built))


def solutions(
    field_map: FieldMap, sizes: Mapping[Quantity, int], given: Values
) -> Iterator[Solution | Conflict]:
    """Yield all values that fit the field map, each keeping another joint field; or a conflict."""
    result = fit(field_map, sizes, given, powers=True)
    if isinstance(result, Conflict) and result.ambiguous:
        for solution in result.ambiguous:
            yield from solutions(field_map, sizes, {**given, **solution})
    else:
        yield result


def others(
    field_map: FieldMap, sizes: Mapping[Quantity, int], given: Values, recurse: bool = True
) -> Iterator[Solution]:
    """Yield the values that fit for every value of a joint field, and of a second if need be."""
    joint_fields = open_together(problem_of(field_map, sizes, given, powers=True))
    if not joint_fields:
        return
    name = min(joint_fields, key=lambda field: field_map.sizes[field])
    for value in range(min(field_map.sizes[name], 4 * SMALL), 0, -1):
        fixed = {**given, name: value}
        for solution in solutions(field_map, sizes, fixed):
            if not isinstance(solution, Conflict):
                yield solution
            elif recurse:
                yield from others(field_map, sizes, fixed, recurse=False)


def with_heads(goal: Goal, values: Solution, given: Values) -> Iterator[Solution]:
    """Yield the values as they are, then with other head counts that divide the widths."""
    yield values
    choices: dict[FieldPath, list[int]] = {}
    for field in hidden_counts(goal.field_map):
        width = _split_width(goal, field)
        if field not in given and width % values[field]:
            choices[field] = [n for n in range(min(values[field], width), 0, -1) if width % n == 0]
    for numbers in product(*choices.values()):
        yield {**values, **dict(zip(choices, numbers, strict=True))}


def _split_width(goal: Goal, field: FieldPath) -> int:
    """Return the greatest common divisor of the widths that a field splits; 0: it splits none."""
    field_map = goal.field_map
    widths = [0]
    for (name, which), expression in field_map.expressions.items():
        if not isinstance(which, str) or expression.fields != {field}:
            continue
        pieces = field_map.splits.heads[name]
        weight = f"{name}.weight"
        rows = sum(prod(piece) for piece in pieces)
        for size, then in zip(
            field_map.shapes.get(weight, ()), goal.shallow_target.get(weight, ()), strict=False
        ):
            if size == rows:
                widths.append(then // len(pieces))
                break
    return gcd(*widths)


def hidden_counts(field_map: FieldMap) -> list[FieldPath]:
    return sorted((p for p in field_map.count_fields() if not field_map.moves_shapes(p)), key=str)
