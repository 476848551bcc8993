"""Fewer layers for learning: the cost must not grow with the depth of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .kinds import Kinds, facts_in, kinds_in, lists_of
from .layer_counts import Shapes, changes, holds, width_lists
from .reference import Builder, FieldPath, Refusal, shapes, with_values

Numbers = Mapping[str, tuple[int, ...]]
"""Name of a list of layers -> for each of its layers, the number of another one."""


@dataclass(frozen=True)
class Depth:
    """A config with as few layers as show every kind of layer, and how names map onto it.

    Attributes:
        data: the shallow config's JSON.
        steps: one for each change that took layers away: for each layer that was there before, the
            first one like it that is left.
        alike: for each layer of the shallow model's lists, the first one like it.
        stands_for: for each of them, a layer of the full model like it, each another one.
    """

    data: dict[str, Any]
    steps: tuple[Numbers, ...] = ()
    alike: Numbers = field(default_factory=dict)
    stands_for: tuple[Numbers, ...] = ()

    def canonical(self, name: str) -> str:
        """The name, in the shallow model, of what is like a tensor or module of the full one."""
        for step in self.steps:
            name = _renumbered(name, step)
        return name

    def first(self, name: str) -> str:
        """The name of what is like a tensor or module of the shallow model in the first such layer.

        A layer of the shallow model need not have the number that it has in the full one.
        """
        return _renumbered(name, self.alike)

    def origin(self, name: str) -> str:
        """The name, in the full model, of what a tensor or module of the shallow one is like."""
        for step in reversed(self.stands_for):
            name = _renumbered(name, step, new=True)
        return name


def _renumbered(name: str, numbers: Numbers, new: bool = False) -> str:
    """A name with other numbers; lists go by their names with those (``new``: with the old)."""
    if not numbers:
        return name
    parts: list[str] = []
    looked: list[str] = []
    for part in name.split("."):
        of = numbers.get(".".join(looked))
        number = str(of[int(part)]) if of is not None and part.isdigit() else part
        parts.append(number)
        looked.append(part if new else number)
    return ".".join(parts)


def shallow(builder: Builder, data: dict[str, Any], full: nn.Module) -> Depth:
    """Find the settings that only repeat layers, and lower them.

    A setting counts when a lower value takes layers away, leaves one of each kind, and changes no
    other tensor's shape.  Where nothing can be lowered, the result is the config itself.
    """
    lowering = _Lowering(builder, data, full)
    widths = width_lists(builder, data, lowering.shapes)
    for length, choices in _choices(lowering.kinds):
        for left in choices:
            before = lowering.data
            refused = lowering.try_all(changes(data, length, left, widths), length, len(left))
            if lowering.data is not before or not (refused or left[-1] >= len(left)):
                break  # more may do: CvT looks up a list by its stage, Zamba ties every sixth
    return lowering.depth()


def _choices(kinds: Mapping[str, Kinds]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Which layers may be left of lists of one length, the fewest first.

    The first of each kind, or all up to the last of those; a few more where the class refuses that.
    Lists of one length need not have as many kinds of layers.
    """
    firsts = {name: one.first for name, one in kinds.items() if len(set(one.first)) < len(one.of)}
    for length in sorted({len(first) for first in firsts.values()}, reverse=True):
        same = [first for first in firsts.values() if len(first) == length]
        together = list(zip(*same, strict=True))
        joint = tuple(together.index(one) for one in together)
        tried: set[tuple[int, ...]] = set()
        for first in sorted({*same, joint}, key=lambda one: (max(one), one)):
            chosen = tuple(sorted({*first, *range(2)} if len(set(first)) == 1 else set(first)))
            upto = max(2, max(first) + 1)
            choices = [chosen, *(tuple(range(n)) for n in (upto, upto + 1, 3 * upto) if n < length)]
            if chosen not in tried and len(chosen) < length:
                tried.add(chosen)
                yield length, list(dict.fromkeys(choices))


@dataclass
class _Step:
    """What one change of the config did to lists of layers.

    Attributes:
        numbers: for each layer that was there, the first one like it that is left.
        alike: for each layer that is left, the first one like it.
        stands_for: for each of them, one that was there and is like it.
    """

    numbers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    alike: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stands_for: dict[str, tuple[int, ...]] = field(default_factory=dict)


class _Lowering:
    """A config from which layers are taken, one change after the other.

    Attributes:
        data: the config so far.
        shapes: what it builds.
        kinds: how the layers of each list differ.
    """

    def __init__(self, builder: Builder, data: dict[str, Any], full: nn.Module):
        self.data, self.shapes, self.kinds = data, shapes(full), kinds_in(full)
        self._builder = builder
        self._steps: list[_Step] = []

    def try_all(self, changes: Sequence[dict[FieldPath, Any]], length: int, left: int) -> bool:
        """Make those changes that only take layers away; whether the class refused any.

        Args:
            changes: values of fields.
            length: how long lists are that are to be shorter.
            left: how long they are to be.
        """
        refused = False
        for change in changes:
            if all(holds(self.data, path) for path in change):
                refused |= self._try(change, length, left)
        return refused

    def _try(self, change: dict[FieldPath, Any], length: int, left: int) -> bool:
        model = self._builder.build(with_values(self.data, change))
        if isinstance(model, Refusal):
            return True
        step = self._step(model) if _counted(model, self.kinds, length, left) else None
        if step is not None:
            self.shapes, self.kinds = shapes(model), kinds_in(model)
            self.data = _without_chance(self._builder, self.data, change, self.shapes)
            self._steps.append(step)
        return False

    def _step(self, model: nn.Module) -> _Step | None:
        """What is left of which layers; ``None``: not all kinds, or something else changed."""
        after, lists, step = shapes(model), lists_of(model), _Step()
        shorter = [name for name, layers in lists.items() if self._is_shorter(name, len(layers))]
        shorter = [name for name in shorter if not _inside(name, shorter)]
        if len(after) >= len(self.shapes) or not shorter:
            return None
        for name in shorter:
            kinds = self.kinds[name]
            found = kinds.places(facts_in(model, name, shorter=True))
            if found is None or set(found) != set(kinds.first):
                return None
            step.numbers[name] = tuple(found.index(one) for one in kinds.first)
            step.alike[name] = tuple(map(found.index, found))
            step.stands_for[name] = tuple(_one_by_one(kinds.first, found))
        names = {name: _renumbered(name, step.numbers) for name in self.shapes}
        if any(after.get(names[name]) != shape for name, shape in self.shapes.items()):
            return None
        others = (name for name in after if not _inside(name, shorter))
        if any(self.shapes.get(name) != after[name] for name in others):
            return None
        return step if self._rest_as_before(model, shorter) else None

    def _is_shorter(self, name: str, now: int) -> bool:
        return name in self.kinds and len(self.kinds[name].of) > now

    def _rest_as_before(self, model: nn.Module, shorter: Sequence[str]) -> bool:
        """Whether the layers of the other lists are of the kinds that they were of."""
        looked: list[str] = []
        lists = lists_of(model)
        for name, kinds in self.kinds.items():
            around = any(other.startswith(f"{name}.") for other in shorter)
            if around or name in shorter or _inside(name, [*shorter, *looked]):
                continue
            looked.append(name)
            if name not in lists or kinds.places(facts_in(model, name)) != kinds.first:
                return False
        return True

    def depth(self) -> Depth:
        """The config that is left, and how names map onto it."""
        alike: dict[str, tuple[int, ...]] = {}
        for number, step in enumerate(self._steps):
            for name, first in step.alike.items():
                for later in self._steps[number + 1 :]:
                    name = _renumbered(name, later.numbers)
                alike[name] = first
        steps = tuple(step.numbers for step in self._steps)
        return Depth(self.data, steps, alike, tuple(step.stands_for for step in self._steps))


def _inside(name: str, lists: Sequence[str]) -> bool:
    """Whether something stands inside of one of some lists."""
    return any(name.startswith(f"{one}.") for one in lists)


def _one_by_one(kinds: Sequence[int], found: Sequence[int]) -> Iterator[int]:
    """For each layer that is left, one that was there of its kind, each another if there is one."""
    for place, kind in enumerate(found):
        like = [number for number, one in enumerate(kinds) if one == kind]
        yield like[min(found[:place].count(kind), len(like) - 1)]


def layers_left(builder: Builder, data: dict[str, Any], live: Shapes) -> dict[FieldPath, Any]:
    """The settings by which the class builds a model some of whose layers are gone.

    Returns:
        Field -> number of layers, or a list with an entry for each; empty: no such settings.
    """
    found: dict[FieldPath, Any] = {}
    built = builder.build(data)
    if isinstance(built, Refusal):
        return {}
    now = shapes(built)
    for name, layers in lists_of(built).items():
        length, keep = len(layers), _layers_in(live, name)
        for change in changes(data, length, tuple(range(keep)), set()) if keep < length else ():
            if _layers_in(now, name) == keep or not all(holds(data, path) for path in change):
                continue
            model = builder.build(with_values(data, {**found, **change}))
            after = {} if isinstance(model, Refusal) else shapes(model)
            if live.items() <= after.items() < now.items():
                found, now = {**found, **change}, after
    return found if now == live else {}


def _without_chance(
    builder: Builder, data: dict[str, Any], change: dict[FieldPath, Any], lowered: Shapes
) -> dict[str, Any]:
    """The config with a change, but for a field in it that is as large as a list by chance.

    An image has three channels, and PP-DocLayout takes three feature maps of it.
    """
    rest = {path: value for path, value in change.items() if type(value) is not int}
    if 0 < len(rest) < len(change):
        fewer = with_values(data, rest)
        model = builder.build(fewer)
        if not isinstance(model, Refusal) and shapes(model) == lowered:
            return fewer
    return with_values(data, change)


def _layers_in(all_shapes: Shapes, name: str) -> int:
    """How many layers of a list have tensors."""
    rest = [key.removeprefix(f"{name}.") for key in all_shapes if key.startswith(f"{name}.")]
    return len({key.partition(".")[0] for key in rest})


def kinds_of_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """For every list in which layers repeat: the index of the first layer like each."""
    firsts = {name: kinds.first for name, kinds in kinds_in(model).items()}
    return {name: first for name, first in firsts.items() if len(set(first)) < len(first)}


def _counted(model: nn.Module, kinds: Mapping[str, Kinds], length: int, left: int) -> bool:
    """Whether the lists that got shorter are as short as was said, one of them at least.

    Phi-4-multimodal's eight steps of sound that become one are no layers: of eight are left five.
    """
    shorter = {
        len(layers)
        for name, layers in lists_of(model).items()
        if name in kinds and len(layers) != length == len(kinds[name].of)
    }
    return not shorter or left in shorter
