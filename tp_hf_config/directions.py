"""In which directions a class's config can be made smaller: one field, or several in proportion.

Query heads go with key/value heads; where a class makes the head dim from hidden size and heads
(BERT), whole heads go with the hidden size; widths that have to stay equal go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, reduce
from itertools import combinations, permutations, product
from math import gcd, lcm

from .heads import observe
from .learn import ConfigMap
from .reference import FieldPath, Refusal, shapes


@dataclass(frozen=True)
class Share:
    """What one field, or a direction as a whole (``field`` is None), has of one dimension.

    Attributes:
        field: the field.
        per_unit: positions that one unit of the direction takes.
        rest: positions of the dimension that belong to something else.
    """

    field: FieldPath | None
    per_unit: int
    rest: int


Shares = dict[tuple[str, int], tuple[Share, ...]]


def units_of(known: ConfigMap, fields: tuple[FieldPath, ...]) -> int:
    """How many units a direction has: each is the same share of every one of its fields.

    It holds whole positions of every dimension that is in proportion: where a convolution in groups
    reads a sixteenth of the channels in each (wav2vec 2.0), a unit is sixteen channels.
    """
    common = reduce(gcd, (known.values[path] for path in fields))
    sizes = _in_proportion(known, {path: known.values[path] // common for path in fields}, common)
    return common // lcm(*(Fraction(size, common).denominator for size in sizes.values()))


def _in_proportion(
    known: ConfigMap, scales: Mapping[FieldPath, int], common: int
) -> dict[tuple[str, int], int]:
    """The dimensions that are a multiple, or a fraction, of a direction, with their sizes."""
    found: dict[tuple[str, int], int] = {}
    for (name, dim), expression in known.expressions.items():
        slopes = [expression.terms.get(frozenset({path}), 0) * n for path, n in scales.items()]
        if isinstance(dim, int) and sum(slopes) * common == expression.base:
            found[name, dim] = expression.base
    for (name, dim), power in known.powers.items():
        if isinstance(dim, int) and sum(power.exponents.get(path, 0) for path in scales) == 1:
            found[name, dim] = power.base
    return found


def shares_of(known: ConfigMap, fields: tuple[FieldPath, ...]) -> Shares | str:
    """What the units of a direction have of each dimension, or why there are no whole units."""
    units = units_of(known, fields)
    scales = {path: known.values[path] // units for path in fields}
    if len(fields) == 1:
        return _along_lines(known, scales, None)
    moved = _moved(known, scales, units)
    return moved if isinstance(moved, str) else _along_lines(known, scales, moved)


def strides_in(shares: Shares) -> dict[int, set[int]]:
    """Positions that a unit takes -> in how many parts they may stand.

    A convolution in groups has as many output channels for each input channel of a group.
    """
    found: dict[int, set[int]] = {}
    for name, dim in shares:
        for own, other in product(shares[name, dim], shares.get((name, 1 - dim), ())):
            parts, rest = divmod(own.per_unit, other.per_unit)
            if parts > 1 and not rest:
                found.setdefault(own.per_unit, set()).add(parts)
    return found


def _along_lines(
    known: ConfigMap, scales: Mapping[FieldPath, int], moved: dict[tuple[str, int], int] | None
) -> Shares | str:
    """The shares by field where they add up to what moves, else what moves as one share."""
    units = units_of(known, tuple(scales))
    shares: Shares = {}
    for (name, dim), power in known.powers.items() if moved is None else ():
        if isinstance(dim, int) and all(power.exponents.get(path) == 1 for path in scales):
            shares[name, dim] = tuple(Share(path, power.base // units, 0) for path in scales)
    for (name, dim), expression in sorted(known.expressions.items(), key=str):
        if not isinstance(dim, int) or not expression.fields & scales.keys():
            continue
        found: list[Share] = []
        for path in sorted(expression.fields & scales.keys(), key=list(scales).index):
            per_unit = expression.terms.get(frozenset({path}), Fraction(0)) * scales[path]
            rest = expression.base - per_unit * units
            if per_unit.denominator != 1 or per_unit < 1 or rest < 0:
                if moved is None:
                    return f"{name} has no whole units along dimension {dim}"
                break
            found.append(Share(path, int(per_unit), int(rest)))
        else:
            if moved is None or moved.get((name, dim)) == sum(share.per_unit for share in found):
                shares[name, dim] = tuple(found)
    for (name, dim), step in (moved or {}).items():
        if (name, dim) not in shares:
            left = known.shapes[name][dim] - step * units
            if step < 1 or left < 0:
                return f"{name} has no whole units along dimension {dim}"
            shares[name, dim] = (Share(None, step, left),)
    return dict(sorted(shares.items(), key=str))


def _moved(
    known: ConfigMap, scales: Mapping[FieldPath, int], units: int
) -> dict[tuple[str, int], int] | str:
    """By how much each dimension moves for one unit, seen in two builds of the class."""
    builds: list[tuple[int, dict[str, tuple[int, ...]]]] = []
    reason = ""
    for less in dict.fromkeys([1, -1, -2, 2, *range(3, units)]):
        model = known.build_at({p: known.values[p] - less * s for p, s in scales.items()})
        if isinstance(model, Refusal):
            reason = model.reason
            continue
        built = shapes(model)
        if built.keys() != known.shapes.keys():
            reason = "it builds other layers then"
            continue
        builds.append((less, built))
        if len(builds) == 2:
            break
    if len(builds) < 2:
        return f"the class takes no other number: {reason}"
    result: dict[tuple[str, int], int] = {}
    for name, shape in known.shapes.items():
        if known.depth.first(name) != name:
            continue
        for dim, now in enumerate(shape):
            slopes = {Fraction(now - built[name][dim], less) for less, built in builds}
            if len(slopes) > 1 or next(iter(slopes)).denominator != 1:
                return f"{name} does not follow in whole units along dimension {dim}"
            if any(slopes):
                result[name, dim] = int(next(iter(slopes)))
    return result


def grouped_heads(known: ConfigMap, failed: set[FieldPath]) -> Iterator[tuple[FieldPath, ...]]:
    """Numbers of heads that cannot go alone, with another that is a multiple of them."""
    counts = sorted((p for p in known.count_fields() if known.moves_shapes(p)), key=str)
    for smaller, larger in permutations(counts, 2):
        if smaller in failed and known.values[larger] % known.values[smaller] == 0:
            yield smaller, larger


def whole_heads(known: ConfigMap) -> Iterator[tuple[FieldPath, ...]]:
    """Widths that are split into a number of heads that their layers do not show, with it."""
    tied: dict[FieldPath, set[FieldPath]] = {}
    for (name, which), expression in known.expressions.items():
        if isinstance(which, str):
            weight = f"{name}.weight"
            widths = known.fields_of(weight, 0) | known.fields_of(weight, 1)
            for width in widths if not widths & expression.fields else ():
                tied.setdefault(width, set()).update(expression.fields)
    for width, counts in tied.items():
        several = {path for path in counts if known.values[path] > 1}  # one head for all stays
        yield (*sorted(several or counts, key=str), width)


def equal_fields(known: ConfigMap, failed: set[FieldPath]) -> Iterator[tuple[FieldPath, ...]]:
    """Pairs of widths of equal size that cannot go alone, both of them if there are such."""
    widths = [path for path in known.values if known.moves_shapes(path)]
    pairs = [
        pair
        for pair in combinations(widths, 2)
        if known.values[pair[0]] == known.values[pair[1]] and failed & set(pair)
    ]
    yield from [pair for pair in pairs if failed >= set(pair)] or pairs


def equal_together(known: ConfigMap, failed: set[FieldPath]) -> Iterator[tuple[FieldPath, ...]]:
    """Three or four widths of equal size of which fewer cannot go, seen in runs without data.

    What a tower makes of images and another of sound stands in one text (Qwen2.5-Omni).
    """
    alike: dict[int, list[FieldPath]] = {}
    for path in sorted(failed, key=str):
        if known.moves_shapes(path):
            alike.setdefault(known.values[path], []).append(path)

    @cache
    def runs(fields: tuple[FieldPath, ...]) -> bool:
        """Where there are more features than places for them, only more places show it."""
        value = known.values[fields[0]]
        builds = (known.build_at(dict.fromkeys(fields, other)) for other in (2 * value, value // 2))
        return all(not isinstance(model, Refusal) and observe(model).ended for model in builds)

    for size, paths in product((3, 4), alike.values()):
        for fields in combinations(paths, size):
            if runs(fields) and not any(map(runs, combinations(fields, size - 1))):
                yield fields


def heads_with_width(known: ConfigMap, failed: set[FieldPath]) -> Iterator[tuple[FieldPath, ...]]:
    """Widths that cannot go alone, with the numbers of heads that are as wide together.

    Helium's last projection of attention reads the hidden size, and gets heads times head dim.
    """
    counts = known.count_fields() & failed
    for width in sorted(failed - counts, key=str):
        value = known.values[width]
        whole = {
            path
            for expression in known.expressions.values()
            if expression.base == value and width not in expression.fields
            for path in expression.fields & counts
            if value % known.values[path] == 0
        }
        for path in sorted(whole, key=str):
            among = [
                other for other in counts - {path} if not known.values[path] % known.values[other]
            ]
            yield (*sorted(among, key=str), path, width)
            if among:
                yield path, width


def proportional(known: ConfigMap) -> list[tuple[FieldPath, ...]]:
    """Pairs of fields that the class takes in proportion, most units first."""
    pairs = {
        tuple(sorted((path, other), key=lambda one: (known.values[one], str(one))))
        for path, others in known.bound.items()
        for other in others
        if {path, other} <= known.values.keys()
    }
    return sorted(pairs, key=lambda fields: (-units_of(known, fields), str(fields)))
