"""Propose the field values behind some shapes, and compare what they build with these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import gcd, isqrt, prod

from ...model.build import Refusal
from ...model.config_json import FieldPath, with_values
from ...model.shapes import Mismatch, Shapes, compare
from ..expressions import Quantity
from ..field_map import FieldMap
from .fit import Values, fit, problem_of
from .integers import Conflict, open_together

SMALL = 128
"""How many combinations of head counts are tried; of a joint field, four times as many values."""


class Goal:
    """Shapes that a class has to build.

    Attributes:
        field_map: the class.
        target: the shapes, in the full model's names.
        shallow_target: the target's shapes of the shallow model's tensors, by their names there
            and with the pieces of all layers.
        sizes: the tensor dims of the target with their sizes; layers of one kind and size count
            once.
    """

    def __init__(self, field_map: FieldMap, target: Shapes):
        self.field_map = field_map
        self.target = target
        origins = {name: field_map.depth.origin(name) for name in field_map.shapes}
        self.shallow_target = {
            name: target[full] for name, full in origins.items() if full in target
        }
        self.sizes: dict[Quantity, int] = {}
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
    """Yield the values that fit the field map, or the conflict if none do.

    If joint fields allow several solutions, all are yielded; each keeps another field as it is.
    """
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
    """Yield the values that fit the field map for every value of a joint field.

    With ``recurse``, those of a second one are tried where the first does not settle the rest.
    """
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
    """Yield the values as they are, then with other head counts that divide the widths.

    Only head counts that no shape shows get other values.
    """
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


def with_other_size(
    goal: Goal, values: Values, given: Mapping[FieldPath, int], mismatches: Sequence[Mismatch]
) -> Values | None:
    """Return the values with another size of an image, say, that build the target; None: none do.

    Such a field sets mismatched dimensions along no straight line: they tell what it may be.
    """
    choices: dict[tuple[FieldPath, int], None] = {}
    for mismatch in mismatches:
        pairs = zip(mismatch.shape, mismatch.expected or (), strict=False)
        for dim, (want, have) in enumerate(pairs):
            setting = goal.field_map.unfitted.get((mismatch.name, dim), frozenset())
            for field in sorted(setting - given.keys(), key=str) if want != have else ():
                for number in _scaled(values[field], have, want):
                    choices[field, number] = None
    for field, number in choices:
        candidate = {**values, field: number}
        if number > 0 and not goal.compare_at(candidate):
            return candidate
    return None


def _scaled(value: int, have: int, want: int) -> Iterator[int]:
    """Yield what a field may be if a dimension has to be ``want`` where it is built as ``have``.

    The dimension may be proportional to the field, to its inverse or its square (images), or a sum.
    """
    if have and want:
        yield value * want // have
        yield -(-value * want // have)
    yield max(0, value + want - have)
    if have and want:
        yield value * have // want
        yield -(-value * have // want)
        yield isqrt(value * value * want // have)
        yield isqrt(value * value * want // have) + 1


def hidden_counts(field_map: FieldMap) -> list[FieldPath]:
    """Return the fields of head counts that no shape shows."""
    return sorted((p for p in field_map.count_fields() if not field_map.moves_shapes(p)), key=str)
