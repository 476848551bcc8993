"""Find the values of fields that give the shapes a pruned model really has. Whole numbers only.

Each quantity (a dimension of a parameter, or the head count of a projection's output) has an
expression. Given all but one of an expression's fields, its size gives the last one: an
``Expression`` is linear in every single field, a ``Power`` is a product of powers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from ...model.config_json import FieldPath
from ..expressions import Expression, Power, Quantity


@dataclass(frozen=True)
class Conflict:
    """Why there is no single solution.

    Attributes:
        needs: field -> the value that it would need -> the quantities that need it.
        ambiguous: the solutions, where several fit and nothing tells which; each as field -> value.
    """

    needs: Mapping[FieldPath, Mapping[Fraction, Sequence[Quantity]]] = field(default_factory=dict)
    ambiguous: Sequence[Mapping[FieldPath, int]] = ()


@dataclass(frozen=True)
class Problem:
    """Sizes that quantities have to have, and how the fields make them.

    Attributes:
        expressions: for each quantity, how the fields make it.
        base: the value of each field that the expressions are written around.
        targets: the size that each quantity has to have.
        hold: fields to leave as they are where shapes alone allow several solutions, in order.
    """

    expressions: Mapping[Quantity, Expression | Power]
    base: Mapping[FieldPath, int]
    targets: Mapping[Quantity, int]
    hold: Sequence[FieldPath] = ()


def solve(problem: Problem) -> dict[FieldPath, int] | Conflict:
    """Return a value for every field so that all targets are met, or the conflict.

    Fields that no target depends on keep their base value.
    """
    steps = _search(problem, {})
    return steps if isinstance(steps, Conflict) else _values(problem, steps, problem.base)


def open_together(problem: Problem) -> list[FieldPath]:
    """Return the fields whose values the targets set only together; empty if there are none.

    Once one field of such a set has a value, the others follow from the targets.
    """
    steps = _forced(problem, {})
    return [] if isinstance(steps, Conflict) else _entangled(problem, steps)


def _search(problem: Problem, steps: Mapping[FieldPath, int]) -> dict[FieldPath, int] | Conflict:
    """Return the steps that the targets give, with those given; or the conflict.

    A step is a field's value minus its base value.
    """
    forced = _forced(problem, steps)
    if isinstance(forced, Conflict):
        return forced
    entangled = _entangled(problem, forced)
    if not entangled:
        return forced
    return _branch(problem, forced, entangled)


def _forced(problem: Problem, steps: Mapping[FieldPath, int]) -> dict[FieldPath, int] | Conflict:
    """Return these steps and those that follow from them by single equations, or the conflict."""
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
    """Return field -> step -> quantities from which it follows: those with one field still open."""
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
    """Return the conflict between these votes, or between the steps and the targets, or None.

    A field conflicts if it would need several values, or one that is no whole number above 0.
    """
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
    """Keep one entangled field at its base value and solve for the rest; try ``hold`` first.

    Return the steps, if every field that may stay gives the same ones; otherwise a conflict: the
    ambiguous one, or the one with the fewest fields.
    """
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
    """Return the values of some fields at these steps."""
    return {name: problem.base[name] + steps.get(name, 0) for name in names}
