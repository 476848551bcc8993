"""Guesses at the config behind some shapes, and how far the class builds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import gcd, isqrt, prod

from .fit import Shapes, Values, fit, problem_of
from .learn import ConfigMap
from .reference import FieldPath, Mismatch, Refusal, compare, shapes, with_values
from .solve import Conflict, Observable, open_together

SMALL = 128
_ASKED = 512


class Asked:
    """The class, asked whether it builds the target at some values; each build is counted."""

    def __init__(self, known: ConfigMap, target: Shapes):
        self.known = known
        self.target = target
        origins = {name: known.depth.origin(name) for name in known.shapes}
        self.few = {name: target[full] for name, full in origins.items() if full in target}
        self.sizes: dict[Observable, int] = {}
        seen = set()
        for name, shape in target.items():
            for dim, size in enumerate(shape):
                alike = (known.depth.canonical(name), dim, size)
                if alike not in seen:
                    seen.add(alike)
                    self.sizes[name, dim] = size
        self.builds = 0

    def wrong(self, values: Values) -> Sequence[Mismatch] | Refusal:
        """What it builds otherwise at its learned depth, or its own words."""
        self.builds += 1
        built = self.known.build_at(values)
        if isinstance(built, Refusal) and self.known.unset:  # it may take a default unsaid
            said = {path: value for path, value in values.items() if path not in self.known.unset}
            built = self.known.builder.build(with_values(self.known.depth.data, dict(said)))
        return built if isinstance(built, Refusal) else compare(self.few, shapes(built))


def solutions(
    known: ConfigMap, sizes: Mapping[Observable, int], given: Mapping[FieldPath, int]
) -> Iterator[Values | Conflict]:
    """Values that fit the map, with one of the fields that only go together left as it is."""
    found = fit(known, sizes, given, powers=True)
    if isinstance(found, Conflict) and found.ambiguous:
        for one in found.ambiguous:
            yield from solutions(known, sizes, {**given, **one})
    else:
        yield found


def others(
    known: ConfigMap,
    sizes: Mapping[Observable, int],
    given: Mapping[FieldPath, int],
    deeper: bool = True,
) -> Iterator[Values]:
    """Values that fit the map, whatever the fields are that only go together."""
    together = open_together(problem_of(known, sizes, given, powers=True))
    if not together:
        return
    name = min(together, key=lambda path: known.sizes[path])
    for value in range(min(known.sizes[name], 4 * SMALL), 0, -1):
        fixed = {**given, name: value}
        for found in solutions(known, sizes, fixed):
            if not isinstance(found, Conflict):
                yield found
            elif deeper:
                yield from others(known, sizes, fixed, deeper=False)


def with_heads(asked: Asked, values: Values, given: Mapping[FieldPath, int]) -> Iterator[Values]:
    """The same widths, split into as many heads as they were, else into another number."""
    yield values
    choices: dict[FieldPath, list[int]] = {}
    for path in unseen(asked.known):
        width = _split_width(asked, path)
        if path not in given and width % values[path]:
            choices[path] = [n for n in range(min(values[path], width), 0, -1) if width % n == 0]
    for numbers in product(*choices.values()):
        yield {**values, **dict(zip(choices, numbers, strict=True))}


def _split_width(asked: Asked, path: FieldPath) -> int:
    """What a number of heads has to divide: the width of each piece that it splits."""
    known = asked.known
    widths = [0]
    for (name, which), expression in known.expressions.items():
        if not isinstance(which, str) or expression.fields != {path}:
            continue
        pieces = known.layout.heads[name]
        weight = f"{name}.weight"
        rows = sum(prod(piece) for piece in pieces)
        for size, then in zip(
            known.shapes.get(weight, ()), asked.few.get(weight, ()), strict=False
        ):
            if size == rows:
                widths.append(then // len(pieces))
                break
    return gcd(*widths)


def nearest(
    known: ConfigMap, sizes: Mapping[Observable, int], given: Mapping[FieldPath, int]
) -> Values:
    """Values that give most of these sizes: what few ask for, against many, is left aside."""
    base = {**known.sizes, **given}
    left = dict(sizes)
    for _ in range(SMALL):
        found = fit(known, left, given, powers=True)
        if not isinstance(found, Conflict):
            return found
        if found.ambiguous:
            given = {**given, **found.ambiguous[0]}
            continue
        against: set[Observable] = set()
        for by_value in found.needs.values():
            whole = {v: who for v, who in by_value.items() if v.denominator == 1 and v >= 1}
            most = max(whole, key=lambda value: len(whole[value]), default=None)
            against.update(key for v, who in by_value.items() if v != most for key in who)
        if not against & left.keys():
            break
        left = {key: size for key, size in left.items() if key not in against}
    return base


def search(
    asked: Asked,
    values: Values,
    given: Mapping[FieldPath, int],
    wrong: Sequence[Mismatch] | Refusal | None = None,
) -> Values | None:
    """Ask the class, one field after the other, for what comes nearer to the target."""
    wrong = asked.wrong(values) if wrong is None else wrong
    if not wrong:
        return values
    for path, value in _steps(asked, values, wrong):
        if asked.builds >= _ASKED:
            return None
        if path in given:
            continue
        trial = {**values, path: value}
        then = asked.wrong(trial)
        if _distance(asked, then) < _distance(asked, wrong):
            found = search(asked, trial, given, then)
            if found is not None:
                return found
    return None


def _distance(asked: Asked, wrong: Sequence[Mismatch] | Refusal) -> int:
    """How many dimensions are wrong; a refusal is farther than any."""
    if isinstance(wrong, Refusal):
        return len(asked.sizes) + 1
    return sum(
        have != want
        for one in wrong
        for want, have in zip(one.found, one.expected or (), strict=False)
    )


def _steps(
    asked: Asked, values: Values, wrong: Sequence[Mismatch] | Refusal
) -> Iterator[tuple[FieldPath, int]]:
    """Other values of one field: those that the wrong dimensions ask for, then any small ones."""
    known = asked.known
    influence: dict[FieldPath, dict[tuple[int, int], None]] = {}
    for one in () if isinstance(wrong, Refusal) else wrong:
        for dim, (want, have) in enumerate(zip(one.found, one.expected or (), strict=False)):
            if want != have:
                for path in _fields_of(known, (one.name, dim)):
                    influence.setdefault(path, {})[have, want] = None
    tried = set()
    for path, ratios in influence.items():
        for have, want in list(ratios)[:4]:
            for number in _scaled(values[path], have, want):
                if number not in (0, values[path]) and (path, number) not in tried:
                    tried.add((path, number))
                    yield path, number
    highest = {path: known.sizes[path] for path in [*influence, *unseen(known)]}
    if isinstance(wrong, Refusal):  # whatever the class may have meant
        highest.update({**known.sizes, **known.silent})
    for path, most in highest.items():
        for number in range(most, 0, -1) if most <= SMALL else ():
            if number != values.get(path, most) and (path, number) not in tried:
                tried.add((path, number))
                yield path, number


def _scaled(value: int, have: int, want: int) -> Iterator[int]:
    """What a field may be where a dimension is another: along, against, or as a square (images)."""
    if have and want:
        yield value * want // have
        yield -(-value * want // have)
    yield max(0, value + want - have)
    if have and want:
        yield value * have // want
        yield -(-value * have // want)
        yield isqrt(value * value * want // have)
        yield isqrt(value * value * want // have) + 1


def _fields_of(known: ConfigMap, key: Observable) -> frozenset[FieldPath]:
    """The fields that move a dimension, along whatever line."""
    expression = known.expressions.get(key) or known.powers.get(key)
    return expression.fields if expression is not None else known.loose.get(key, frozenset())


def unseen(known: ConfigMap) -> list[FieldPath]:
    """Numbers of heads that no shape shows."""
    return sorted((p for p in known.count_fields() if not known.moves_shapes(p)), key=str)
