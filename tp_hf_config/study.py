"""Ask a class what moves: change one config field, build again, compare.

Everything here happens around one shallow config, on the meta device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations
from typing import Any

from torch import nn

from .at_once import each_of, may_matter, show_heads, without_effect
from .depth import Depth
from .fields import is_everyones
from .heads import Layout, counts_of, observe
from .moves import UNSET_PROBES, Move, Sizes, blind, further, is_rounded, on_a_line, probes_of
from .reference import (
    Builder,
    FieldPath,
    Refusal,
    named_modules,
    shapes,
    vanished_counts,
    with_values,
)
from .solve import Power, followed

_OTHER_TENSORS = 5
"""Values at which a class has other tensors that are tried before a field is said to set none."""
_ROUNDED = 3
"""Values at which something is rounded that are tried before one of them is taken."""


class Study:
    """Builds around one shallow config.

    Attributes:
        refused: fields that the class takes no other value of, alone or with one that it does.
        follows: fields that follow from others in every build.
    """

    def __init__(self, builder: Builder, depth: Depth, implied: Mapping[FieldPath, int]):
        self.builder = builder
        self.refused: list[FieldPath] = []
        self.follows: dict[FieldPath, Power] = {}
        self.first = cache(depth.first)
        self.data = with_values(depth.data, dict(implied))
        model = self._build({})
        if isinstance(model, Refusal):
            raise ValueError(f"the class does not build its own config: {model.reason}")
        self.model = model
        self.shapes = shapes(model)
        self.layout = observe(model)
        self.base = self._sizes(self.shapes, self.layout)
        self.attributes = _numbers(model)
        self.split_weights = {f"{name}.weight" for name in self.layout.heads}
        self._repeating: Counter[FieldPath] = Counter()
        self._vanishing: dict[FieldPath, bool] = {}

    def _build(self, values: Mapping[FieldPath, int]) -> nn.Module | Refusal:
        return self.builder.build(
            with_values(self.data, {**values, **followed(self.follows, values)})
        )

    def at(self, values: Mapping[FieldPath, int], watch: bool = True) -> Sizes | Refusal | None:
        """What is built differently at ``values``; None: other tensors altogether.

        An observable that was not looked at there is listed with size 0.
        """
        model = self._build(values)
        if isinstance(model, Refusal):
            return model
        built = shapes(model)
        if built.keys() != self.shapes.keys():
            alike = all(self.shapes.get(name, shape) == shape for name, shape in built.items())
            self._repeating.update(list(values) if alike and len(values) == 1 else [])
            return None
        if any(len(shape) != len(self.shapes[name]) for name, shape in built.items()):
            return None  # a dense layer in groups (ConvBERT)
        lower = [path for path, value in values.items() if value < self._value(path)]
        if lower:
            vanished = bool(vanished_counts(self.model, model))
            self._vanishing.update(
                dict.fromkeys(lower, vanished) if len(values) == 1 or not vanished else {}
            )
        sizes = self._sizes(built, Layout())
        moved = {key[0] for key, size in sizes.items() if self.base[key] != size}
        changed = _changed(self.attributes, _numbers(model))
        if not moved and not changed:
            return {}
        sizes = dict.fromkeys(self.base, 0) | sizes
        may_split = bool(moved & self.split_weights) or self._around_splits(changed)
        if watch and may_split:  # numbers of heads may move where no projection does (Swin)
            sizes |= self._sizes(built, observe(model))
        elif not moved & self.split_weights:
            sizes = self.base | sizes  # heads stay where no projection moves
            sizes |= {key: self.base[key] for key, size in sizes.items() if not size}
        return {key: size for key, size in sizes.items() if self.base.get(key, size) != size}

    def _around_splits(self, changed: Collection[str]) -> bool:
        """Whether a module changed that may split a projection into heads: one around it."""
        around = set()
        for name in self.layout.heads:
            parent = name.rpartition(".")[0]
            around |= {parent, parent.rpartition(".")[0]}
        return bool(around & set(changed))

    def _value(self, path: FieldPath) -> int:
        """A field's value in the config that is studied; 0: it has none."""
        node: Any = self.data
        for key in path:
            node = node.get(key) if isinstance(node, dict) else node[key]
        return node if isinstance(node, int) else 0

    def _counts_layers(self, path: FieldPath) -> bool:
        """Whether other values of a field only gave more or fewer tensors, none in another shape.

        Once may be a projection between two widths that are equal then.
        """
        return self._repeating[path] > 1

    def quiet(self, values: Mapping[FieldPath, int]) -> bool | Refusal:
        """Whether the class builds the same shapes at these values, and splits as many heads."""
        model = self._build(values)
        if isinstance(model, Refusal) or shapes(model) != self.shapes:
            return model if isinstance(model, Refusal) else False
        return not self._around_splits(_changed(self.attributes, _numbers(model)))

    def _sizes(self, built: Mapping[str, tuple[int, ...]], layout: Layout) -> Sizes:
        """The observables of a built model, one of each kind of layer."""
        sizes: Sizes = {
            (name, dim): size for name, shape in built.items() for dim, size in enumerate(shape)
        }
        for name, splits in layout.heads.items():
            counts = counts_of(splits, self.layout.heads.get(name, ()))
            sizes.update({(name, which): count for which, count in counts.items()})
        return {key: size for key, size in sizes.items() if self.first(key[0]) == key[0]}

    def all_implied(self, unset: Sequence[FieldPath]) -> dict[FieldPath, int]:
        """The unset fields that set something, with the values that they stand for."""
        quiet = without_effect(self, dict.fromkeys(unset, UNSET_PROBES[0]))
        found = {path: self.implied(path) for path in unset if path not in quiet}
        return {path: value for path, value in found.items() if value is not None}

    def implied(self, path: FieldPath) -> int | None:
        """The value that an unset field stands for: setting it changes nothing."""
        points: list[Move] = []
        for probe in UNSET_PROBES:
            sizes = self.at({path: probe}, watch=False)
            if isinstance(sizes, Refusal) and "'int' object" in sizes.reason:
                break  # Python's words: no number will do
            if self._counts_layers(path):
                break
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
        for other in values:
            may_follow = [
                (path, value)
                for path, value in result.items()
                if values[other] % value == 0 and not is_everyones(path)
            ]
            if not may_follow:
                continue
            moved = {other: 2 * values[other]}
            followed = self._build(moved)
            if isinstance(followed, Refusal) or shapes(followed) == self.shapes:
                continue
            for path, value in may_follow:
                kept = self._build({**moved, path: value})
                if isinstance(kept, Refusal) or shapes(followed) == shapes(kept):
                    continue
                if observe(kept).steps < observe(followed).steps:
                    del result[path]
        return result

    def moves(
        self, values: Mapping[FieldPath, int]
    ) -> tuple[dict[FieldPath, list[Move]], dict[FieldPath, FieldPath]]:
        """Up to two moves of every field that sets something, and the fields that move as one."""
        moves: dict[FieldPath, list[Move]] = {}
        refused: list[FieldPath] = []
        rebuilt: list[FieldPath] = []
        for path, value in values.items():
            points = self.alone(path, value, enough=1)
            if isinstance(points, Refusal):
                refused.append(path)
            elif points is None:
                rebuilt.append(path)
            elif points:
                moves[path] = points
        self._add_second(values, moves)
        for path in refused:
            points = self._together(path, values, moves)
            if points:
                moves[path] = points
        linked: dict[FieldPath, FieldPath] = {}
        alone = [path for path in refused if path not in moves]
        for path, other in (*combinations(rebuilt, 2), *combinations(alone, 2)):
            if {path, other} & (moves.keys() | linked.keys()):
                continue
            if values[path] == values[other] and not self._counts_layers(path):
                points = self._as_one(path, other, values[path])
                if points:
                    moves[path], linked[other] = points, path
        self.refused = [path for path in alone if path not in moves.keys() | linked]
        show_heads(self, values, moves)
        return moves, linked

    def _partners(
        self, path: FieldPath, others: Sequence[FieldPath], values: Mapping[FieldPath, int]
    ) -> Iterator[FieldPath]:
        """Those with which a class may take a field's double, of others that it takes alone.

        The rest changes nothing in its words.
        """
        alone = self._build({path: 2 * values[path]})

        def in_vain(some: Sequence[FieldPath]) -> bool:
            if not isinstance(alone, Refusal):
                return False
            both = self._build({one: 2 * values[one] for one in (path, *some)})
            return isinstance(both, Refusal) and both.reason == alone.reason

        return may_matter(others, in_vain)

    def alone(
        self, path: FieldPath, value: int, points: Sequence[Move] = (), enough: int = 2
    ) -> list[Move] | Refusal | None:
        """Moves of one field; empty: it sets nothing; otherwise why it does not move alone."""
        points, rounded = list(points), list[Move]()
        others: list[Refusal | None] = []
        for probe in probes_of(value):
            if any(point.value == probe for point in points):
                continue
            heads = any(isinstance(which, str) for point in points for _, which in point.sizes)
            sizes = self.at({path: probe}, watch=heads or not points)
            if not isinstance(sizes, dict):
                others.append(sizes)
                if self._counts_layers(path) or others.count(None) == _OTHER_TENSORS:
                    break
                continue
            if not sizes:
                return points
            if not any(sizes.values()):
                continue  # the forward pass broke off earlier (a router short of experts)
            move = Move(probe, sizes)
            uneven = bool(points) and is_rounded(self.base, value, points[0], move)
            (rounded if uneven else points).append(move)
            if len(points) >= enough or len(rounded) == _ROUNDED:
                break
        points += rounded[: max(0, enough - len(points))]
        if points or not others:
            return points
        return None if None in others else others[0]

    def _add_second(
        self, values: Mapping[FieldPath, int], moves: dict[FieldPath, list[Move]]
    ) -> None:
        """A second move of each field, several fields in one build where that can be told apart."""
        first = {path: points[0] for path, points in moves.items()}
        probes = {
            path: next(p for p in probes_of(values[path]) if p != point.value)
            for path, point in first.items()
        }
        moved = {path: point.sizes for path, point in first.items()}
        for path, probe, sizes in each_of(self, probes, moved):
            second = Move(probe, sizes)
            if on_a_line(self.base, values[path], first[path], second):
                moves[path].append(second)  # else another field of that build may count
        for path, points in moves.items():
            if len(points) == 1:
                more = self.alone(path, values[path], points)
                moves[path] = more if isinstance(more, list) else points
            if len(moves[path]) == 2 and all(blind(point.sizes) for point in moves[path]):
                self._seeing(path, values[path], moves[path])

    def _seeing(self, path: FieldPath, value: int, points: list[Move]) -> None:
        """Put a lower value at which the forward pass goes further in the place of the second."""
        for probe in (probe for probe in reversed(probes_of(value)) if probe < value):
            sizes = self.at({path: probe})
            move = Move(probe, sizes) if isinstance(sizes, dict) and not blind(sizes) else None
            if move and on_a_line(self.base, value, points[0], move):  # else something was rounded
                points[1] = move
                break

    def dragged(
        self, values: Mapping[FieldPath, int], moving: Collection[FieldPath]
    ) -> dict[FieldPath, FieldPath]:
        """Fields that set no shape, but without which some count becomes 0: field -> leader.

        DeepSeek's latent attention has no key/value heads, but ``num_key_value_groups`` is heads
        over ``num_key_value_heads``.
        """
        found: dict[FieldPath, FieldPath] = {}
        unknown = [path for path in values if path in moving and self._vanishing.get(path, True)]

        def in_vain(some: Sequence[FieldPath]) -> bool:
            less = {path: values[path] // 2 for path in some if values[path] > 1}
            return self._vanishes(less) is False

        for path in may_matter(unknown, in_vain):
            tried = (values[path] * 3 // 4, values[path] // 2)  # some divide another width
            less = next((one for one in tried if one and self._vanishes({path: one})), None)
            if less is None:
                continue
            equal = [p for p in values.keys() - set(moving) if values[p] == values[path]]
            for other in equal:
                if self._vanishes({path: less, other: less}) is False:
                    found[other] = path
                    break
        return found

    def _vanishes(self, values: Mapping[FieldPath, int]) -> bool | None:
        """Whether some count becomes 0 at these values; ``None``: the class refuses them."""
        model = self._build(values)
        return None if isinstance(model, Refusal) else bool(vanished_counts(self.model, model))

    def _as_one(self, path: FieldPath, other: FieldPath, value: int) -> list[Move]:
        """Moves of two fields of equal value, always at the same value."""
        found: list[Move] = []
        for probe in (2 * value, 3 * value):
            sizes = self.at({path: probe, other: probe})
            if sizes is None:
                break
            if isinstance(sizes, dict) and sizes:
                found.append(Move(probe, sizes))
        return found

    def _together(
        self,
        path: FieldPath,
        values: Mapping[FieldPath, int],
        moves: Mapping[FieldPath, Sequence[Move]],
    ) -> list[Move]:
        """A move of a field that the class only accepts together with another one's."""
        for partner in self._partners(path, list(moves), values):
            points = moves[partner]
            for factor in (2, 3):
                both = {path: factor * values[path], partner: factor * values[partner]}
                together = self.at(both, watch=False)
                if not isinstance(together, dict):
                    continue
                seen = [point.sizes for point in points if point.value == both[partner]]
                alone = seen[0] if seen else self.at({partner: both[partner]}, watch=False)
                if isinstance(alone, Refusal):  # only a little more is taken alone (Phi-3)
                    alone = further(self.base, values[partner], points, both[partner])
                    together = self.at(both)  # heads too: no move of the field alone shows them
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


def _numbers(model: nn.Module) -> dict[str, dict[str, float]]:
    """Numeric attributes of every module."""
    return {
        name: {key: value for key, value in vars(module).items() if type(value) in (int, float)}
        for name, module in named_modules(model)
    }


def _changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """The modules whose attributes are others now."""
    return [name for name, numbers in after.items() if before.get(name) != numbers]
