"""Guess at the config behind some shapes, and see how close the class's build comes to them."""

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
"""Limit for values that are tried one by one, and for how often guesses are repeated."""
_ASKED = 512
"""Builds after which a search gives up."""


class Asked:
    """A class and the shapes that it has to build; it counts the builds.

    Attributes:
        field_map: the class.
        target: the shapes, in the full model's names.
        few: the target's shapes of the shallow model's tensors, in the shallow model's names.
        sizes: the tensor dims of the target with their sizes; layers of one kind and size count
            once.
        builds: how many builds were made to compare.
    """

    def __init__(self, field_map: FieldMap, target: Shapes):
        self.field_map = field_map
        self.target = target
        origins = {name: field_map.depth.origin(name) for name in field_map.shapes}
        self.few = {name: target[full] for name, full in origins.items() if full in target}
        self.sizes: dict[Quantity, int] = {}
        counted = set()
        for name, shape in target.items():
            for dim, size in enumerate(shape):
                kind_and_size = (field_map.depth.canonical(name), dim, size)
                if kind_and_size not in counted:
                    counted.add(kind_and_size)
                    self.sizes[name, dim] = size
        self.builds = 0

    def wrong(self, values: Values) -> Sequence[Mismatch] | Refusal:
        """Return how the shallow build at these values differs from the target, or the refusal."""
        self.builds += 1
        field_map = self.field_map
        built = field_map.shapes_at(values)
        # the class may accept a default only where it is left unset
        if isinstance(built, Refusal) and field_map.unset:
            set_values = {p: value for p, value in values.items() if p not in field_map.unset}
            built = field_map.builder.shapes_at(with_values(field_map.depth.data, set_values))
        return built if isinstance(built, Refusal) else compare(self.few, built)


def solutions(
    field_map: FieldMap, sizes: Mapping[Quantity, int], given: Mapping[FieldPath, int]
) -> Iterator[Values | Conflict]:
    """Yield the values that fit the field map, or the conflict if none do.

    If joint fields leave several solutions, each is yielded: every one leaves another field as it
    is.
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
    deeper: bool = True,
) -> Iterator[Values]:
    """Yield the values that fit the field map for every value of a joint field.

    Args:
        field_map: the class.
        sizes: quantities of the full model, with their sizes.
        given: fields whose value is known.
        deeper: do the same once more for what is still open then.
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
            elif deeper:
                yield from others(field_map, sizes, fixed, deeper=False)


def with_heads(asked: Asked, values: Values, given: Mapping[FieldPath, int]) -> Iterator[Values]:
    """Yield the values, with the head counts as they are, then with others that divide the widths.

    Only head counts that no shape shows are changed.
    """
    yield values
    choices: dict[FieldPath, list[int]] = {}
    for field in unseen(asked.field_map):
        width = _split_width(asked, field)
        if field not in given and width % values[field]:
            choices[field] = [n for n in range(min(values[field], width), 0, -1) if width % n == 0]
    for numbers in product(*choices.values()):
        yield {**values, **dict(zip(choices, numbers, strict=True))}


def _split_width(asked: Asked, field: FieldPath) -> int:
    """Return the number that a head count has to divide, or 0 if it splits nothing.

    It is the greatest common divisor of the target's widths of all pieces that the field splits.
    """
    field_map = asked.field_map
    widths = [0]
    for (name, which), expression in field_map.expressions.items():
        if not isinstance(which, str) or expression.fields != {field}:
            continue
        pieces = field_map.layout.heads[name]
        weight = f"{name}.weight"
        rows = sum(prod(piece) for piece in pieces)
        for size, then in zip(
            field_map.shapes.get(weight, ()), asked.few.get(weight, ()), strict=False
        ):
            if size == rows:
                widths.append(then // len(pieces))
                break
    return gcd(*widths)


def nearest(
    field_map: FieldMap, sizes: Mapping[Quantity, int], given: Mapping[FieldPath, int]
) -> Values:
    """Return values that give most of these sizes.

    Where sizes ask for different values of a field, those that are outvoted are ignored.
    """
    base = {**field_map.sizes, **given}
    remaining = dict(sizes)
    for _ in range(SMALL):
        result = fit(field_map, remaining, given, powers=True)
        if not isinstance(result, Conflict):
            return result
        if result.ambiguous:
            given = {**given, **result.ambiguous[0]}
            continue
        against: set[Quantity] = set()
        for by_value in result.needs.values():
            whole = {v: who for v, who in by_value.items() if v.denominator == 1 and v >= 1}
            most = max(whole, key=lambda value: len(whole[value]), default=None)
            against.update(key for v, who in by_value.items() if v != most for key in who)
        if not against & remaining.keys():
            break
        remaining = {key: size for key, size in remaining.items() if key not in against}
    return base


def search(
    asked: Asked,
    values: Values,
    given: Mapping[FieldPath, int],
    wrong: Sequence[Mismatch] | Refusal | None = None,
) -> Values | None:
    """Change one field after the other, each time so that the build comes closer to the target.

    Args:
        asked: the class and its target.
        values: the values to start from.
        given: fields that stay as they are.
        wrong: what ``asked.wrong`` returns for the values, if known.

    Returns:
        The values that build the target; None if none are found.
    """
    wrong = asked.wrong(values) if wrong is None else wrong
    if not wrong:
        return values
    for field, value in _steps(asked, values, wrong):
        if asked.builds >= _ASKED:
            return None
        if field in given:
            continue
        candidate = {**values, field: value}
        outcome = asked.wrong(candidate)
        if _distance(asked, outcome) < _distance(asked, wrong):
            solution = search(asked, candidate, given, outcome)
            if solution is not None:
                return solution
    return None


def _distance(asked: Asked, wrong: Sequence[Mismatch] | Refusal) -> int:
    """Return how many dimensions differ from the target; a refusal counts more than any."""
    if isinstance(wrong, Refusal):
        return len(asked.sizes) + 1
    return sum(
        have != want
        for mismatch in wrong
        for want, have in zip(mismatch.found, mismatch.expected or (), strict=False)
    )


def _steps(
    asked: Asked, values: Values, wrong: Sequence[Mismatch] | Refusal
) -> Iterator[tuple[FieldPath, int]]:
    """Yield other values of single fields to try.

    First come those that the wrong dimensions ask for, then any small ones.
    """
    field_map = asked.field_map
    influence: dict[FieldPath, dict[tuple[int, int], None]] = {}
    for mismatch in () if isinstance(wrong, Refusal) else wrong:
        for dim, (want, have) in enumerate(
            zip(mismatch.found, mismatch.expected or (), strict=False)
        ):
            if want != have:
                for field in _fields_of(field_map, (mismatch.name, dim)):
                    influence.setdefault(field, {})[have, want] = None
    tried = set()
    for field, ratios in influence.items():
        for have, want in list(ratios)[:4]:
            for number in _scaled(values[field], have, want):
                if number not in (0, values[field]) and (field, number) not in tried:
                    tried.add((field, number))
                    yield field, number
    highest = {field: field_map.sizes[field] for field in [*influence, *unseen(field_map)]}
    if isinstance(wrong, Refusal):  # the class may mean any field
        highest.update({**field_map.sizes, **field_map.silent})
    for field, most in highest.items():
        for number in range(most, 0, -1) if most <= SMALL else ():
            if number != values.get(field, most) and (field, number) not in tried:
                tried.add((field, number))
                yield field, number


def _scaled(value: int, have: int, want: int) -> Iterator[int]:
    """Yield what a field may be if a dimension has to be ``want`` where it is built as ``have``.

    The dimension may follow the field in proportion, by a sum, inversely, or as a square (images).
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


def _fields_of(field_map: FieldMap, key: Quantity) -> frozenset[FieldPath]:
    """Return the fields that change a quantity, along a straight line or not."""
    expression = field_map.expressions.get(key) or field_map.powers.get(key)
    return expression.fields if expression is not None else field_map.loose.get(key, frozenset())


def unseen(field_map: FieldMap) -> list[FieldPath]:
    """Return the fields of head counts that no shape shows."""
    return sorted((p for p in field_map.count_fields() if not field_map.moves_shapes(p)), key=str)
