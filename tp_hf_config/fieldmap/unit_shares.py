"""How many positions of every tensor dim belong to one unit of a width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import gcd, lcm

from ..model.build import Refusal
from ..model.config_json import FieldPath
from ..model.shapes import Shapes
from .field_map import FieldMap


@dataclass(frozen=True)
class Share:
    """The part of one tensor dim that belongs to one field, or to joint fields as a whole."""

    field: FieldPath | None  # None: joint fields as a whole
    per_unit: int  # positions that one unit takes
    rest: int  # positions that belong to something else


# (tensor name, dimension) -> the shares of a width's fields in it
Shares = dict[tuple[str, int], tuple[Share, ...]]


def units_of(field_map: FieldMap, fields: tuple[FieldPath, ...]) -> int:
    """Return how many units a width has; a unit is the same fraction of each of its fields."""
    common = gcd(*(field_map.values[field] for field in fields))
    sizes = _in_proportion(
        field_map, {field: field_map.values[field] // common for field in fields}, common
    )
    # a unit holds whole positions of every dim: sixteen channels if a grouped convolution reads a
    # sixteenth of the channels (wav2vec 2.0)
    return common // lcm(*(Fraction(size, common).denominator for size in sizes.values()))


def _in_proportion(
    field_map: FieldMap,
    scales: Mapping[FieldPath, int],  # the fields' values over ``common``, their gcd
    common: int,
) -> dict[tuple[str, int], int]:
    """Return the tensor dims that are in proportion to a width, with their sizes."""
    sizes: dict[tuple[str, int], int] = {}
    for (name, dim), expression in field_map.expressions.items():
        slopes = [expression.terms.get(frozenset({field}), 0) * n for field, n in scales.items()]
        if isinstance(dim, int) and sum(slopes) * common == expression.base:
            sizes[name, dim] = expression.base
    for (name, dim), power in field_map.powers.items():
        if isinstance(dim, int) and sum(power.exponents.get(field, 0) for field in scales) == 1:
            sizes[name, dim] = power.base
    return sizes


def shares_of(field_map: FieldMap, fields: tuple[FieldPath, ...]) -> Shares | Refusal:
    """Return the shares in each tensor dim (shallow names, full sizes), or why none is whole."""
    units = units_of(field_map, fields)
    scales = {field: field_map.values[field] // units for field in fields}
    observed = _observed_steps(field_map, scales, units) if len(fields) > 1 else None
    if isinstance(observed, Refusal):
        return observed
    shares = _by_expressions(field_map, scales, observed)
    return shares if isinstance(shares, Refusal) else _with_all_pieces(field_map, shares)


def _with_all_pieces(field_map: FieldMap, shares: Shares) -> Shares | Refusal:
    """Return the shares at full size, where a dim holds an equal piece for each layer."""
    for (name, dim), ratio in field_map.depth.pieces.items():
        if (name, dim) not in shares:
            continue
        full = [(ratio * share.per_unit, ratio * share.rest) for share in shares[name, dim]]
        if any(size.denominator != 1 for sizes in full for size in sizes):
            return Refusal(f"dimension {dim} of {name} is no whole number of units")
        shares[name, dim] = tuple(
            Share(share.field, int(per_unit), int(rest))
            for share, (per_unit, rest) in zip(shares[name, dim], full, strict=True)
        )
    return shares


def strides_in(shares: Shares) -> dict[int, set[int]]:
    """Return positions per unit -> numbers of equal parts (a grouped convolution's outputs)."""
    strides: dict[int, set[int]] = {}
    for name, dim in shares:
        for own, other in product(shares[name, dim], shares.get((name, 1 - dim), ())):
            parts, rest = divmod(own.per_unit, other.per_unit)
            if parts > 1 and not rest:
                strides.setdefault(own.per_unit, set()).add(parts)
    return strides


def _by_expressions(
    field_map: FieldMap,
    scales: Mapping[FieldPath, int],  # by how much each field changes for one unit
    observed: dict[tuple[str, int], int] | None,  # None for a single field
) -> Shares | Refusal:
    """Return a share for each field if these add up to the observed steps, else one for all."""
    units = units_of(field_map, tuple(scales))
    shares: Shares = {}
    for (name, dim), power in field_map.powers.items() if observed is None else ():
        if isinstance(dim, int) and all(power.exponents.get(field) == 1 for field in scales):
            shares[name, dim] = tuple(Share(field, power.base // units, 0) for field in scales)
    for (name, dim), expression in sorted(field_map.expressions.items(), key=str):
        if not isinstance(dim, int) or not expression.fields & scales.keys():
            continue
        by_field: list[Share] = []
        for field in sorted(expression.fields & scales.keys(), key=list(scales).index):
            per_unit = expression.terms.get(frozenset({field}), Fraction(0)) * scales[field]
            rest = expression.base - per_unit * units
            if per_unit.denominator != 1 or per_unit < 1 or rest < 0:
                if observed is None:
                    return Refusal(f"dimension {dim} of {name} is no whole number of units")
                break
            by_field.append(Share(field, int(per_unit), int(rest)))
        else:
            if observed is None or observed.get((name, dim)) == sum(
                share.per_unit for share in by_field
            ):
                shares[name, dim] = tuple(by_field)
    for (name, dim), step in (observed or {}).items():
        if (name, dim) not in shares:
            remaining = field_map.shapes[name][dim] - step * units
            if step < 1 or remaining < 0:
                return Refusal(f"dimension {dim} of {name} is no whole number of units")
            shares[name, dim] = (Share(None, step, remaining),)
    return dict(sorted(shares.items(), key=str))


def _observed_steps(
    field_map: FieldMap, scales: Mapping[FieldPath, int], units: int
) -> dict[tuple[str, int], int] | Refusal:
    """Return by how many positions each tensor dim changes per unit, from two builds."""
    builds: list[tuple[int, Shapes]] = []
    reason = ""
    for removed_units in dict.fromkeys([1, -1, -2, 2, *range(3, units)]):
        built = field_map.shapes_at(
            {p: field_map.values[p] - removed_units * s for p, s in scales.items()}
        )
        if isinstance(built, Refusal):
            reason = built.reason
            continue
        if built.keys() != field_map.shapes.keys():
            reason = "the class then builds other layers"
            continue
        builds.append((removed_units, built))
        if len(builds) == 2:
            break
    if len(builds) < 2:
        return Refusal(f"the class accepts no other number: {reason}")
    result: dict[tuple[str, int], int] = {}
    for name, shape in field_map.shapes.items():
        if field_map.depth.first(name) != name:
            continue  # the first layer of each kind is enough
        for dim, now in enumerate(shape):
            slopes = {
                Fraction(now - built[name][dim], removed_units) for removed_units, built in builds
            }
            if len(slopes) > 1 or next(iter(slopes)).denominator != 1:
                return Refusal(f"dimension {dim} of {name} does not change by whole units")
            if any(slopes):
                result[name, dim] = int(next(iter(slopes)))
    return result
