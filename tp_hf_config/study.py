"""Ask a class what moves: change one config field, build again, compare.

Everything here happens around one shallow config, on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, permutations
from math import prod

from torch import nn

from .depth import Depth
from .heads import Layout, counts_of, observe
from .reference import Builder, FieldPath, Refusal, shapes, vanished_counts, with_values
from .solve import Expression, Observable, product

Sizes = dict[Observable, int]

_UNSET_PROBES = (24, 40, 8, 2, 4, 1)


@dataclass(frozen=True)
class Move:
    """One field at another value, and the observables that the class then builds differently."""

    value: int
    sizes: Sizes


class Study:
    """Builds around one shallow config."""

    def __init__(self, builder: Builder, depth: Depth, implied: Mapping[FieldPath, int]):
        self.builder = builder
        self.canonical = depth.canonical
        self.data = with_values(depth.data, dict(implied))
        model = self._build({})
        if isinstance(model, Refusal):
            raise ValueError(f"the class does not build its own config: {model.reason}")
        self.names = set(shapes(model))
        self.layout = observe(model)
        self.base = self._sizes(model, self.layout)
        self.attributes = _numbers(model)
        self.split_weights = {f"{name}.weight" for name in self.layout.heads}
        self.bound: dict[FieldPath, tuple[FieldPath, ...]] = {}

    def _build(self, values: Mapping[FieldPath, int | None]) -> nn.Module | Refusal:
        return self.builder.build(with_values(self.data, dict(values)))

    def at(self, values: Mapping[FieldPath, int], watch: bool = True) -> Sizes | Refusal | None:
        """What is built differently at ``values``; None: other tensors altogether.

        An observable that was not looked at there is listed with size 0.
        """
        model = self._build(values)
        if isinstance(model, Refusal):
            return model
        if set(shapes(model)) != self.names:
            return None
        sizes = self._sizes(model, Layout())
        moved = {key[0] for key, size in sizes.items() if self.base[key] != size}
        if not moved and _numbers(model) == self.attributes:
            return {}
        sizes = dict.fromkeys(self.base, 0) | sizes
        if watch:  # numbers of heads may move where no projection does (Swin)
            sizes |= self._sizes(model, observe(model))
        elif not moved & self.split_weights:
            sizes = self.base | sizes  # heads stay where no projection moves
            sizes |= {key: self.base[key] for key, size in sizes.items() if not size}
        return {key: size for key, size in sizes.items() if self.base.get(key, size) != size}

    def _sizes(self, model: nn.Module, layout: Layout) -> Sizes:
        """The observables of a built model, one of each kind of layer."""
        sizes: Sizes = {
            (name, dim): size
            for name, shape in shapes(model).items()
            for dim, size in enumerate(shape)
        }
        for name, splits in layout.heads.items():
            counts = counts_of(splits, self.layout.heads.get(name, ()))
            sizes.update({(name, which): count for which, count in counts.items()})
        return {key: size for key, size in sizes.items() if self.canonical(key[0]) == key[0]}

    def implied(self, path: FieldPath) -> int | None:
        """The value that an unset field stands for: setting it changes nothing."""
        points: list[Move] = []
        for probe in _UNSET_PROBES:
            sizes = self.at({path: probe}, watch=False)
            if isinstance(sizes, Refusal) and "'int' object" in sizes.reason:
                break  # Python's words: no number will do
            if isinstance(sizes, dict):
                if not any(sizes.values()):
                    break
                points.append(Move(probe, sizes))
            if len(points) == 2:
                break
        if len(points) < 2:
            return None
        first, second = points
        candidates: set[Fraction] = set()
        for key in first.sizes.keys() & second.sizes.keys():
            if not first.sizes[key] or not second.sizes[key]:
                continue
            slope = Fraction(first.sizes[key] - second.sizes[key], first.value - second.value)
            if slope:
                candidates.add(first.value + (self.base[key] - first.sizes[key]) / slope)
        if len(candidates) != 1:
            return None
        (value,) = candidates
        if value.denominator != 1 or value < 1:
            return None
        same = self.at({path: int(value)}, watch=False)
        if not isinstance(same, dict) or any(same.values()):
            return None
        return int(value)

    def free(
        self, implied: Mapping[FieldPath, int], values: Mapping[FieldPath, int]
    ) -> dict[FieldPath, int]:
        """Those of the unset fields that another may move without.

        DeBERTa's ``attention_head_size`` has to follow the hidden size: kept, the forward pass
        breaks off earlier than where it is left unset.
        """
        result = dict(implied)
        for path, value in implied.items():
            for other in (field for field in values if values[field] % value == 0):
                moved = {other: 2 * values[other]}
                followed, kept = self._build(moved), self._build({**moved, path: value})
                if isinstance(followed, Refusal) or isinstance(kept, Refusal):
                    continue
                if shapes(followed) == shapes(kept):
                    continue
                if observe(kept).steps < observe(followed).steps:
                    result.pop(path, None)
        return result

    def moves(
        self, values: Mapping[FieldPath, int]
    ) -> tuple[dict[FieldPath, list[Move]], dict[FieldPath, FieldPath]]:
        """Up to two moves of every field that sets something, and the fields that move as one."""
        moves: dict[FieldPath, list[Move]] = {}
        refused: list[FieldPath] = []
        rebuilt: list[FieldPath] = []
        for path, value in values.items():
            points = self._alone(path, value)
            if isinstance(points, Refusal):
                refused.append(path)
            elif points is None:
                rebuilt.append(path)
            elif points:
                moves[path] = points
        for path in refused:
            points = self._together(path, values, list(moves))
            if points:
                moves[path] = points
        linked: dict[FieldPath, FieldPath] = {}
        for path, other in combinations(rebuilt, 2):
            if values[path] == values[other] and not {path, other} & (moves.keys() | linked):
                points = self._as_one(path, other, values[path])
                if points:
                    moves[path], linked[other] = points, path
        self.bound = self._bound([path for path in refused if path not in moves], values)
        return moves, linked

    def _bound(
        self, refused: Sequence[FieldPath], values: Mapping[FieldPath, int]
    ) -> dict[FieldPath, tuple[FieldPath, ...]]:
        """Widths that the class only takes in proportion with another, and those others."""
        found: dict[FieldPath, tuple[FieldPath, ...]] = {}
        for path, other in permutations(refused, 2):
            sizes = self.at({path: 2 * values[path], other: 2 * values[other]}, watch=False)
            if isinstance(sizes, dict) and any(sizes.values()):
                found[path] = (*found.get(path, ()), other)
        return found

    def _alone(self, path: FieldPath, value: int) -> list[Move] | Refusal | None:
        """Two moves of one field; empty: it sets nothing; otherwise why it does not move alone."""
        points: list[Move] = []
        others: list[Refusal | None] = []
        for probe in _probes(value):
            heads = any(isinstance(which, str) for point in points for _, which in point.sizes)
            sizes = self.at({path: probe}, watch=heads or not points)
            if not isinstance(sizes, dict):
                others.append(sizes)
                continue
            if not sizes:
                return points
            points.append(Move(probe, sizes))
            if len(points) == 2:
                break
        if len(points) == 2 and all(_blind(point.sizes) for point in points):
            for probe in (probe for probe in reversed(_probes(value)) if probe < value):
                sizes = self.at({path: probe})
                if isinstance(sizes, dict) and not _blind(sizes):
                    points[1] = Move(probe, sizes)
                    break
        return points or (None if None in others else others[0])

    def dragged(
        self, values: Mapping[FieldPath, int], moving: Collection[FieldPath]
    ) -> dict[FieldPath, FieldPath]:
        """Fields that set no shape, but without which some count becomes 0: field -> leader.

        DeepSeek's latent attention has no key/value heads, but ``num_key_value_groups`` is heads
        over ``num_key_value_heads``.
        """
        base = self._build({})
        found: dict[FieldPath, FieldPath] = {}
        for path in moving:
            less = values[path] * 3 // 4
            alone = self._build({path: less}) if less else base
            if isinstance(base, Refusal) or isinstance(alone, Refusal):
                continue
            if not vanished_counts(base, alone):
                continue
            for other in values.keys() - set(moving):
                both = self._build({path: less, other: less})
                if values[other] != values[path] or isinstance(both, Refusal):
                    continue
                if not vanished_counts(base, both):
                    found[other] = path
                    break
        return found

    def _as_one(self, path: FieldPath, other: FieldPath, value: int) -> list[Move]:
        """Moves of two fields of equal value, always at the same value."""
        found = ((probe, self.at({path: probe, other: probe})) for probe in (2 * value, 3 * value))
        return [Move(probe, sizes) for probe, sizes in found if isinstance(sizes, dict) and sizes]

    def _together(
        self, path: FieldPath, values: Mapping[FieldPath, int], partners: list[FieldPath]
    ) -> list[Move]:
        """A move of a field that the class only accepts together with another one's."""
        for partner in partners:
            for factor in (2, 3):
                both = {path: factor * values[path], partner: factor * values[partner]}
                alone = self.at({partner: both[partner]}, watch=False)
                together = self.at(both, watch=False)
                if not isinstance(alone, dict) or not isinstance(together, dict):
                    continue
                sizes = {
                    key: size + together.get(key, size) - alone.get(key, size)
                    for key, size in self.base.items()
                    if together.get(key, size) != alone.get(key, size)
                    and together.get(key, size)
                    and alone.get(key, size)
                }
                if sizes:
                    return [Move(both[path], sizes)]
        return []

    def expressions(
        self, values: Mapping[FieldPath, int], moves: Mapping[FieldPath, list[Move]]
    ) -> dict[Observable, Expression]:
        """One expression per observable that moves along straight lines.

        The others (an image's number of patches) are looked at by the proof alone.
        """
        slopes: dict[Observable, dict[FieldPath, Fraction]] = {}
        inexact: set[Observable] = set()
        for path, points in moves.items():
            for key in {key for point in points for key in point.sizes}:
                found = {
                    Fraction(point.sizes.get(key, self.base[key]) - self.base[key])
                    / (point.value - values[path])
                    for point in points
                    if point.sizes.get(key) != 0
                }
                if len(found) == 1:
                    slope = found.pop()
                    if slope:
                        slopes.setdefault(key, {})[path] = slope
                elif found:
                    inexact.add(key)
        pairs = self._pairs(values, moves, slopes)
        return {
            key: self._expression(key, by_field, values, pairs)
            for key, by_field in slopes.items()
            if key not in inexact
        }

    def _pairs(
        self,
        values: Mapping[FieldPath, int],
        moves: Mapping[FieldPath, list[Move]],
        slopes: Mapping[Observable, Mapping[FieldPath, Fraction]],
    ) -> list[tuple[dict[FieldPath, int], Sizes]]:
        """Builds with two fields moved at once, where a dimension mixes them: moves and sizes."""
        wanted = {
            frozenset(pair)
            for key, by_field in slopes.items()
            if len(by_field) > 1 and not _is_product(self.base[key], by_field, values)
            for pair in combinations(by_field, 2)
        }
        result: list[tuple[dict[FieldPath, int], Sizes]] = []
        for pair in wanted:
            at = {path: moves[path][0].value for path in pair}
            sizes = self.at(at)
            if isinstance(sizes, dict):
                steps = {path: at[path] - values[path] for path in pair}
                result.append((steps, {**self.base, **sizes}))
        return result

    def _expression(
        self,
        key: Observable,
        slopes: Mapping[FieldPath, Fraction],
        values: Mapping[FieldPath, int],
        pairs: list[tuple[dict[FieldPath, int], Sizes]],
    ) -> Expression:
        base = self.base[key]
        if len(slopes) > 1 and _is_product(base, slopes, values):
            return product(base, {path: values[path] for path in slopes})
        terms = {frozenset({path}): slope for path, slope in slopes.items()}
        for steps, sizes in pairs:
            if steps.keys() <= slopes.keys():
                straight = base + sum((slopes[p] * step for p, step in steps.items()), Fraction(0))
                cross = (sizes[key] - straight) / prod(steps.values())
                if cross:
                    terms[frozenset(steps)] = cross
        return Expression(base, terms)


def _is_product(
    base: int, slopes: Mapping[FieldPath, Fraction], values: Mapping[FieldPath, int]
) -> bool:
    return all(slope * values[path] == base for path, slope in slopes.items())


def _blind(sizes: Sizes) -> bool:
    """Whether a projection moved, and the forward pass stopped before it was taken apart.

    Falcon's heads stand in groups of whole numbers; twice as many groups need not divide them.
    """
    return any(
        not size and sizes.get((f"{name}.weight", 0))
        for (name, which), size in sizes.items()
        if isinstance(which, str)
    )


def _probes(value: int) -> list[int]:
    probes = [2 * value, 3 * value, value + 1, 4 * value]
    if value > 1:
        if value % 2 == 0 and value > 2:  # one head is no split
            probes.insert(1, value // 2)
        probes += [value - 1, 1]
        probes += [value // factor for factor in (3, 5, 7) if value % factor == 0]
    return list(dict.fromkeys(probe for probe in probes if probe != value and probe > 0))


def _numbers(model: nn.Module) -> dict[tuple[str, str], float]:
    """Numeric attributes of every module."""
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
