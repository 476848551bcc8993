"""Find the field values that give the shapes a pruned model really has.  Integers only.

What a config builds is described by one expression per observable (a dimension of a parameter, or
the number of heads a projection's output is split into).  Each expression is linear in every single
field, so a field follows from any observable whose other fields are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from math import isqrt, prod

Field = tuple[str | int, ...]
Observable = tuple[str, int | str]


@dataclass(frozen=True)
class Expression:
    """``base`` plus, for every set of fields, a coefficient times the product of their moves.

    A move is ``value - base value``.  ``terms`` holds no constant term.
    """

    base: int
    terms: Mapping[frozenset[Field], Fraction]

    @property
    def fields(self) -> frozenset[Field]:
        """The fields that have a say."""
        return frozenset(name for names in self.terms for name in names)

    def evaluate(self, moves: Mapping[Field, int]) -> Fraction:
        """The value when the given fields move and all others stay."""
        total = Fraction(self.base)
        for fields, coefficient in self.terms.items():
            total += coefficient * prod(moves.get(name, 0) for name in fields)
        return total

    def monomials(self, values: Mapping[Field, int]) -> dict[frozenset[Field], Fraction]:
        """The same as a sum of products of the fields themselves: each product's factor.

        Args:
            values: base value of each field.
        """
        found: dict[frozenset[Field], Fraction] = {}
        for fields, coefficient in self.terms.items():
            for size in range(1, len(fields) + 1):
                for chosen in map(frozenset, combinations(fields, size)):
                    rest = prod(-values[name] for name in fields - chosen)
                    found[chosen] = found.get(chosen, Fraction(0)) + coefficient * rest
        return {fields: factor for fields, factor in found.items() if factor}

    def move_of(self, name: Field, moves: Mapping[Field, int], target: int) -> Fraction | None:
        """How far ``name`` must move for the expression to be ``target``; None: it has no say."""
        slope = Fraction(0)
        rest = Fraction(self.base)
        for fields, coefficient in self.terms.items():
            value = coefficient * prod(moves.get(other, 0) for other in fields if other != name)
            if name in fields:
                slope += value
            else:
                rest += value
        return (target - rest) / slope if slope else None


@dataclass(frozen=True)
class Power:
    """``base`` times a power of each field over its base value: hidden size over heads.

    Attributes:
        base: the value when no field moves.
        exponents: 1, 2, -1 or -2 for each field.
        values: base value of each field.
    """

    base: int
    exponents: Mapping[Field, int]
    values: Mapping[Field, int]

    @property
    def fields(self) -> frozenset[Field]:
        """The fields that have a say."""
        return frozenset(self.exponents)

    def evaluate(self, moves: Mapping[Field, int]) -> Fraction:
        """The value when the given fields move and all others stay."""
        return prod(
            (self._factor(name, moves) for name in self.exponents), start=Fraction(self.base)
        )

    def move_of(self, name: Field, moves: Mapping[Field, int], target: int) -> Fraction | None:
        """How far ``name`` must move for the value to be ``target``; None: it has no say."""
        if name not in self.exponents:
            return None
        others = (self._factor(other, moves) for other in self.exponents if other != name)
        ratio = target / prod(others, start=Fraction(self.base))
        exponent = self.exponents[name]
        if exponent < 0:
            ratio = 1 / ratio
        if abs(exponent) == 2:
            ratio = Fraction(isqrt(ratio.numerator), isqrt(ratio.denominator))
        return self.values[name] * (ratio - 1)

    def _factor(self, name: Field, moves: Mapping[Field, int]) -> Fraction:
        value = self.values[name]
        factor: Fraction = Fraction(value + moves.get(name, 0), value) ** self.exponents[name]
        return factor


def followed(rules: Mapping[Field, Power], values: Mapping[Field, int]) -> dict[Field, int]:
    """Fields that follow from others, of which some are at other values; whole ones only."""
    found: dict[Field, int] = {}
    for name, rule in rules.items():
        if name not in values and rule.fields & values.keys():
            moves = {p: values[p] - rule.values[p] for p in rule.fields & values.keys()}
            value = rule.evaluate(moves)
            if value.denominator == 1:
                found[name] = int(value)
    return found


def product(base: int, values: Mapping[Field, int]) -> Expression:
    """The expression of a dimension that is ``base`` times each field over its base value."""
    names = sorted(values, key=str)
    return Expression(
        base,
        {
            frozenset(chosen): Fraction(base, prod(values[name] for name in chosen))
            for size in range(1, len(names) + 1)
            for chosen in combinations(names, size)
        },
    )


@dataclass(frozen=True)
class Conflict:
    """Why no values fit.

    Attributes:
        needs: field -> value it would need -> observables that need it.
        ambiguous: several solutions fit and nothing tells which; each as field -> value.
    """

    needs: Mapping[Field, Mapping[Fraction, Sequence[Observable]]] = field(default_factory=dict)
    ambiguous: Sequence[Mapping[Field, int]] = ()


@dataclass(frozen=True)
class Problem:
    """What is known, and what has to be met.

    Attributes:
        expressions: per observable, how the fields make it.
        base: the value of each field that the expressions are written around.
        targets: what each observable has to be.
        hold: fields to leave as they are where shapes alone allow several answers, in order.
    """

    expressions: Mapping[Observable, Expression | Power]
    base: Mapping[Field, int]
    targets: Mapping[Observable, int]
    hold: Sequence[Field] = ()


def solve(problem: Problem) -> dict[Field, int] | Conflict:
    """Values for every field such that all targets are met.

    Fields that no target moves keep their base value.
    """
    moves = _search(problem, {})
    if isinstance(moves, Conflict):
        return moves
    return {name: problem.base[name] + moves.get(name, 0) for name in problem.base}


def open_together(problem: Problem) -> list[Field]:
    """Fields that the targets only set together: one of each lot has to be known for the rest."""
    moves = _forced(problem, {})
    return [] if isinstance(moves, Conflict) else _entangled(problem, moves)


def _search(problem: Problem, moves: Mapping[Field, int]) -> dict[Field, int] | Conflict:
    forced = _forced(problem, moves)
    if isinstance(forced, Conflict):
        return forced
    entangled = _entangled(problem, forced)
    if not entangled:
        return forced
    return _branch(problem, forced, entangled)


def _forced(problem: Problem, moves: Mapping[Field, int]) -> dict[Field, int] | Conflict:
    """The moves that follow from others, one after the other."""
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
    problem: Problem, moves: Mapping[Field, int]
) -> dict[Field, dict[Fraction, list[Observable]]]:
    """For each field, the moves asked for by observables in which it alone is open."""
    votes: dict[Field, dict[Fraction, list[Observable]]] = {}
    for observable, target in problem.targets.items():
        expression = problem.expressions[observable]
        free = expression.fields - moves.keys()
        if len(free) == 1:
            (name,) = free
            move = expression.move_of(name, moves, target)
            if move is not None:
                votes.setdefault(name, {}).setdefault(move, []).append(observable)
    return votes


def _contradictions(
    problem: Problem,
    votes: Mapping[Field, Mapping[Fraction, Sequence[Observable]]],
    moves: Mapping[Field, int],
) -> Conflict | None:
    needs: dict[Field, dict[Fraction, Sequence[Observable]]] = {}
    for name, by_move in votes.items():
        values = {problem.base[name] + move: who for move, who in by_move.items()}
        if len(values) > 1 or any(v.denominator != 1 or v < 1 for v in values):
            needs[name] = values
    for observable, target in problem.targets.items():
        expression = problem.expressions[observable]
        if expression.fields <= moves.keys() and expression.evaluate(moves) != target:
            for name in expression.fields or {("no field",)}:
                wanted = expression.move_of(name, moves, target)
                base = problem.base.get(name, 0)
                by_value = needs.setdefault(name, {})
                by_value.setdefault(Fraction(base + moves.get(name, 0)), [])
                if wanted is not None:
                    by_value.setdefault(base + wanted, [])
                    by_value[base + wanted] = [*by_value[base + wanted], observable]
    return Conflict(needs) if needs else None


def _entangled(problem: Problem, moves: Mapping[Field, int]) -> list[Field]:
    """Open fields that only appear together with other open ones."""
    found: set[Field] = set()
    for observable in problem.targets:
        free = problem.expressions[observable].fields - moves.keys()
        if len(free) > 1:
            found |= free
    return sorted(found, key=str)


def _branch(
    problem: Problem, moves: dict[Field, int], entangled: Sequence[Field]
) -> dict[Field, int] | Conflict:
    """Leave one entangled field as it is and see; what is to be held decides first."""
    for name in problem.hold:
        if name in entangled:
            result = _search(problem, {**moves, name: 0})
            if not isinstance(result, Conflict):
                return result
    solutions: list[dict[Field, int]] = []
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
    problem: Problem, moves: Mapping[Field, int], names: Iterable[Field]
) -> dict[Field, int]:
    return {name: problem.base[name] + moves.get(name, 0) for name in names}
