"""Recover the config of a pruned checkpoint from its shapes alone.

Shapes determine widths. A head count that no shape shows keeps its value if it can. A config is
accepted only if the class builds these shapes from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import gcd, prod
from typing import Any

from torch import nn

from ...errors import listed
from ...model.build import Refusal
from ...model.config_json import FieldPath, with_values
from ...model.shapes import Mismatch, Shapes, compare, shapes
from ...model.tensors import ties_of
from ..expressions import Quantity
from ..field_map import FieldMap
from .fit import Conflict, Values, build_with_shapes, fit, open_together, problem_of

_MOST_GUESSES = 64  # values of joint fields that are tried
_LISTED = 8  # solutions that are tried, and that a conflict lists


@dataclass(frozen=True)
class Recovery:
    values: Values  # every field that sets a size
    data: dict[str, Any]  # the config's JSON
    undecided: frozenset[FieldPath] = frozenset()  # fields of head counts that no shape shows


def recover(
    field_map: FieldMap, target: Shapes, given: Mapping[FieldPath, int] | None = None
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


def _fitting(goal: Goal, given: Mapping[FieldPath, int]) -> tuple[list[Values], Conflict | Refusal]:
    """Return values that fit the field map and are accepted; and the first reason, if none are."""
    field_map, sizes = goal.field_map, goal.sizes
    fitting: list[Values] = []
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
    if isinstance(reason, Conflict):  # fit all layers: it names each
        everywhere: dict[Quantity, int] = {
            (n, dim): s for n, shape in goal.target.items() for dim, s in enumerate(shape)
        }
        full = fit(field_map, everywhere, given, powers=True)
        reason = full if isinstance(full, Conflict) and full.needs else reason
    return fitting, reason or Refusal("no whole numbers give these shapes")


def _accepted(goal: Goal, solution: Values, given: Mapping[FieldPath, int]) -> Values | Refusal:
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


def _differences(solutions: Sequence[Values]) -> list[Values]:
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
        self.sizes: dict[Quantity, int] = {}  # layers of one kind and size count once
        counted = set()
        for name, shape in target.items():
            for dim, size in enumerate(shape):
                kind_and_size = (field_map.depth.canonical(name), dim, size)
                if kind_and_size not in counted:
                    counted.add(kind_and_size)
                    self.sizes[name, dim] = size

    def compare_at(self, values: Values) -> Sequence[Mismatch] | Refusal:
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
    field_map: FieldMap, sizes: Mapping[Quantity, int], given: Mapping[FieldPath, int]
) -> Iterator[Values | Conflict]:
    """Yield all values that fit the field map, each keeping another joint field; or a conflict."""
    result = fit(field_map, sizes, given, powers=True)
    if isinstance(result, Conflict) and result.ambiguous:
        for solution in result.ambiguous:
            yield from solutions(field_map, sizes, {**given, **solution})
    else:
        yield result


def others(
    field_map: FieldMap,
    sizes: Mapping[Quantity, int],
    given: Mapping[FieldPath, int],
    recurse: bool = True,
) -> Iterator[Values]:
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


def with_heads(goal: Goal, values: Values, given: Mapping[FieldPath, int]) -> Iterator[Values]:
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
