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
    """What is known, and what has to be met.

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
    moves = _search(problem, {})
    if isinstance(moves, Conflict):
        return moves
    return {name: problem.base[name] + moves.get(name, 0) for name in problem.base}


def open_together(problem: Problem) -> list[FieldPath]:
    """Return the fields that the targets only set together with others, or an empty list.

    One field of each such set has to be known for the rest to follow.
    """
    moves = _forced(problem, {})
    return [] if isinstance(moves, Conflict) else _entangled(problem, moves)


def _search(problem: Problem, moves: Mapping[FieldPath, int]) -> dict[FieldPath, int] | Conflict:
    """Return the steps of all fields that follow from the targets, or the conflict.

    A step is a field's value minus its base value.

    Args:
        problem: what has to be met.
        moves: the steps that are known already.
    """
    forced = _forced(problem, moves)
    if isinstance(forced, Conflict):
        return forced
    entangled = _entangled(problem, forced)
    if not entangled:
        return forced
    return _branch(problem, forced, entangled)


def _forced(problem: Problem, moves: Mapping[FieldPath, int]) -> dict[FieldPath, int] | Conflict:
    """Return the known steps and all that follow from them one after the other, or the conflict."""
    moves = dict(moves)
    while True:
        votes = _votes(problem, moves)
        conflict = _contradictions(problem, votes, moves)
        if conflict is not None:
            return conflict
        if not votes:
            return moves
        for name, by_move in votes.items():
            moves[name] = int(next(iter(by_move)))


def _votes(
    problem: Problem, moves: Mapping[FieldPath, int]
) -> dict[FieldPath, dict[Fraction, list[Quantity]]]:
    """Return the steps that quantities ask of a field which is the only open one in them.

    Returns:
        Field -> the step asked for -> the quantities that ask for it.
    """
    votes: dict[FieldPath, dict[Fraction, list[Quantity]]] = {}
    for quantity, target in problem.targets.items():
        expression = problem.expressions[quantity]
        free = expression.fields - moves.keys()
        if len(free) == 1:
            (name,) = free
            move = expression.move_of(name, moves, target)
            if move is not None:
                votes.setdefault(name, {}).setdefault(move, []).append(quantity)
    return votes


def _contradictions(
    problem: Problem,
    votes: Mapping[FieldPath, Mapping[Fraction, Sequence[Quantity]]],
    moves: Mapping[FieldPath, int],
) -> Conflict | None:
    """Return the conflict in what quantities ask for and what the known steps give, or None.

    A field conflicts if it would need several values, or one that is no whole number above 0.
    """
    needs: dict[FieldPath, dict[Fraction, Sequence[Quantity]]] = {}
    for name, by_move in votes.items():
        values = {problem.base[name] + move: who for move, who in by_move.items()}
        if len(values) > 1 or any(v.denominator != 1 or v < 1 for v in values):
            needs[name] = values
    for quantity, target in problem.targets.items():
        expression = problem.expressions[quantity]
        if expression.fields <= moves.keys() and expression.evaluate(moves) != target:
            for name in expression.fields or {("no field",)}:
                wanted = expression.move_of(name, moves, target)
                base = problem.base.get(name, 0)
                by_value = needs.setdefault(name, {})
                by_value.setdefault(Fraction(base + moves.get(name, 0)), [])
                if wanted is not None:
                    by_value.setdefault(base + wanted, [])
                    by_value[base + wanted] = [*by_value[base + wanted], quantity]
    return Conflict(needs) if needs else None


def _entangled(problem: Problem, moves: Mapping[FieldPath, int]) -> list[FieldPath]:
    """Return the open fields that quantities contain together with other open ones."""
    entangled: set[FieldPath] = set()
    for quantity in problem.targets:
        free = problem.expressions[quantity].fields - moves.keys()
        if len(free) > 1:
            entangled |= free
    return sorted(entangled, key=str)


def _branch(
    problem: Problem, moves: dict[FieldPath, int], entangled: Sequence[FieldPath]
) -> dict[FieldPath, int] | Conflict:
    """Leave one of several open fields as it is and solve for the rest; ``hold`` decides first.

    Returns:
        The steps, if all ways that work give the same; otherwise a conflict: the ambiguous one, or
        the one with the fewest fields.
    """
    for name in problem.hold:
        if name in entangled:
            result = _search(problem, {**moves, name: 0})
            if not isinstance(result, Conflict):
                return result
    solutions: list[dict[FieldPath, int]] = []
    failures: list[Conflict] = []
    for name in entangled:
        result = _search(problem, {**moves, name: 0})
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
    problem: Problem, moves: Mapping[FieldPath, int], names: Iterable[FieldPath]
) -> dict[FieldPath, int]:
    """Return the values of some fields at these steps."""
    return {name: problem.base[name] + moves.get(name, 0) for name in names}
