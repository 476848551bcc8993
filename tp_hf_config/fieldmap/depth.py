"""Find a config with fewer layers to learn from: the cost must not grow with a model's depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

from torch import nn

from ..model.build import Builder, Refusal
from ..model.config_json import FieldPath, with_values
from ..model.shapes import Shapes, shapes
from .layer_counts import changes, holds, width_lists
from .layer_kinds import Kinds, facts_in, kinds_in, lists_of

Numbers = Mapping[str, tuple[int, ...]]
"""Name of a list of layers -> for each of its layers, the number of another layer."""


@dataclass(frozen=True)
class Depth:
    """A config with the fewest layers that contain every kind, and how names map onto it.

    Attributes:
        data: the shallow config's JSON.
        steps: for each change that removed layers: for each layer before it, the number of the
            first remaining layer of its kind.
        first_of_kind: for each layer of the shallow model's lists, the number of the first layer
            of its kind.
        stands_for: for each change: for each remaining layer, the number that a layer of its kind
            had before; a different one for each while there are enough.
    """

    data: dict[str, Any]
    steps: tuple[Numbers, ...] = ()
    first_of_kind: Numbers = dataclasses.field(default_factory=dict)
    stands_for: tuple[Numbers, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def canonical(self, name: str) -> str:
        """Return the shallow model's name for a tensor or module of the full model."""
        if name not in self._canonical:
            self._canonical[name] = reduce(_renumbered, self.steps, name)
        return self._canonical[name]

    @cached_property
    def _canonical(self) -> dict[str, str]:
        """Cache: a deep model's names are asked for often."""
        return {}

    def first(self, name: str) -> str:
        """Return a shallow model's name as it is in the first layer of the same kind.

        A layer of the shallow model need not have the number that it has in the full one.
        """
        return _renumbered(name, self.first_of_kind)

    def origin(self, name: str) -> str:
        """Return the full model's name for a tensor or module of the shallow model."""
        for step in reversed(self.stands_for):
            name = _renumbered(name, step, new=True)
        return name


def _renumbered(name: str, numbers: Numbers, new: bool = False) -> str:
    """Return a name with other numbers of layers.

    ``numbers`` names lists as ``name`` does if ``new``, otherwise as the returned name does.
    """
    if not numbers:
        return name
    parts: list[str] = []
    prefix: list[str] = []
    for part in name.split("."):
        list_numbers = numbers.get(".".join(prefix))
        number = (
            str(list_numbers[int(part)]) if list_numbers is not None and part.isdigit() else part
        )
        parts.append(number)
        prefix.append(part if new else number)
    return ".".join(parts)


def shallow(builder: Builder, data: dict[str, Any], full: nn.Module) -> Depth:
    """Lower the settings that only repeat layers, and return the shallow config.

    A setting counts if a lower value removes layers, leaves one of each kind, and changes no other
    tensor's shape. If nothing can be lowered, the result is the config itself.
    """
    lowering = _Lowering(builder, data, full)
    widths = width_lists(builder, data, lowering.shapes)
    for length, choices in _choices(lowering.kinds):
        for keep in choices:
            before = lowering.data
            refused = lowering.try_all(changes(data, length, keep, widths), length, len(keep))
            if lowering.data is not before or not (refused or keep[-1] >= len(keep)):
                break  # else more may do: CvT looks up a list by its stage, Zamba ties every sixth
    return lowering.depth()


def _choices(kinds: Mapping[str, Kinds]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Yield the length of lists, and choices of the layers to keep of them, the fewest first.

    A choice keeps the first layer of each kind, or all layers up to the last of those, or a few
    more in case the class refuses that. Lists of one length need not have as many kinds of layers.
    """
    firsts = _repeating(kinds).values()
    for length in sorted({len(first) for first in firsts}, reverse=True):
        equally_long = [first for first in firsts if len(first) == length]
        joint_kinds = list(zip(*equally_long, strict=True))
        joint_first = tuple(map(joint_kinds.index, joint_kinds))
        tried: set[tuple[int, ...]] = set()
        for first in sorted({*equally_long, joint_first}, key=lambda first: (max(first), first)):
            chosen = tuple(sorted({*first, *range(2)} if len(set(first)) == 1 else set(first)))
            upto = max(2, max(first) + 1)
            choices = [chosen, *(tuple(range(n)) for n in (upto, upto + 1, 3 * upto) if n < length)]
            if chosen not in tried and len(chosen) < length:
                tried.add(chosen)
                yield length, list(dict.fromkeys(choices))


@dataclass
class _Step:
    """What one change of the config did to lists of layers; see :class:`Depth`."""

    numbers: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    first_of_kind: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    stands_for: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


class _Lowering:
    """A config from which changes remove layers one by one, and what it builds so far."""

    def __init__(self, builder: Builder, data: dict[str, Any], full: nn.Module):
        self.data, self.shapes, self.kinds = data, shapes(full), kinds_in(full)
        self._builder = builder
        self._steps: list[_Step] = []

    def try_all(self, changes: Sequence[dict[FieldPath, Any]], length: int, keep: int) -> bool:
        """Make the changes that only shorten lists; return True if the class refused any change.

        The lists go from ``length`` to ``keep`` layers.
        """
        refused = False
        for change in changes:
            if all(holds(self.data, field) for field in change):
                refused |= self._try(change, length, keep)
        return refused

    def _try(self, change: dict[FieldPath, Any], length: int, keep: int) -> bool:
        """Make a change if it only removes layers; return True if the class refuses it."""
        model = self._builder.build(with_values(self.data, change))
        if isinstance(model, Refusal):
            return True
        step = self._step(model, change) if _has_length(model, self.kinds, length, keep) else None
        if step is not None:
            self.shapes, self.kinds = shapes(model), kinds_in(model)
            self.data = _without_coincidence(self._builder, self.data, change, self.shapes)
            self._steps.append(step)
        return False

    def _step(self, model: nn.Module, change: Collection[FieldPath]) -> _Step | None:
        """Return which layers a build kept; None if a kind is lost or anything else changed."""
        after, lists, step = shapes(model), lists_of(model), _Step()
        before = {name: len(kinds.first) for name, kinds in self.kinds.items()}
        shorter = [name for name, layers in lists.items() if len(layers) < before.get(name, 0)]
        shorter = [name for name in shorter if not _inside(name, shorter)]
        if len(after) >= len(self.shapes) or not shorter:
            return None
        for name in shorter:
            kinds = self.kinds[name]
            remaining = kinds.match(facts_in(model, name, shorter=True))
            if remaining is None or set(remaining) != set(kinds.first):
                return None
            step.numbers[name] = tuple(map(remaining.index, kinds.first))
            step.first_of_kind[name] = tuple(map(remaining.index, remaining))
            step.stands_for[name] = tuple(_represented(kinds.first, remaining))
        names = {name: _renumbered(name, step.numbers) for name in self.shapes}
        if any(after.get(names[name]) != shape for name, shape in self.shapes.items()):
            return None
        others = (name for name in after if not _inside(name, shorter))
        if any(self.shapes.get(name) != after[name] for name in others):
            return None
        return step if self._rest_as_before(model, shorter, change) else None

    def _rest_as_before(
        self, model: nn.Module, shorter: Sequence[str], change: Collection[FieldPath]
    ) -> bool:
        """True if the layers of the other lists are of the same kinds as before.

        What the changed settings say of them may differ: the norms behind the stages of a backbone
        are as many as the stages, of which one has fewer layers now.
        """
        checked: list[str] = []
        settings = {key for field in change for key in field if isinstance(key, str)}
        lists = lists_of(model)
        for name, kinds in self.kinds.items():
            around = any(other.startswith(f"{name}.") for other in shorter)
            if around or name in shorter or _inside(name, [*shorter, *checked]):
                continue
            checked.append(name)
            kinds = kinds.without_settings(settings)
            if name not in lists or kinds.match(facts_in(model, name)) != kinds.first:
                return False
        return True

    def depth(self) -> Depth:
        """Return the config after all changes, and how names map onto it."""
        first_of_kind: dict[str, tuple[int, ...]] = {}
        for number, step in enumerate(self._steps):
            for name, first in step.first_of_kind.items():
                for later in self._steps[number + 1 :]:
                    name = _renumbered(name, later.numbers)
                first_of_kind[name] = first
        steps = tuple(step.numbers for step in self._steps)
        return Depth(
            self.data, steps, first_of_kind, tuple(step.stands_for for step in self._steps)
        )


def _inside(name: str, lists: Sequence[str]) -> bool:
    """True if a name stands inside one of these lists."""
    return any(name.startswith(f"{one}.") for one in lists)


def _represented(kinds: Sequence[int], remaining: Sequence[int]) -> Iterator[int]:
    """Yield, for each remaining layer, the number that a layer of its kind had before.

    Each gets a different one while there are enough.
    """
    for number, kind in enumerate(remaining):
        same_kind = [before for before, other in enumerate(kinds) if other == kind]
        yield same_kind[min(remaining[:number].count(kind), len(same_kind) - 1)]


def layer_settings(builder: Builder, data: dict[str, Any], live: Shapes) -> dict[FieldPath, Any]:
    """Return the settings with which the class builds a model that lost layers, by their fields.

    A setting is a number of layers, or a list with an entry for each. Empty: there are none.
    """
    settings: dict[FieldPath, Any] = {}
    built = builder.build(data)
    if isinstance(built, Refusal):
        return {}
    now: Shapes = shapes(built)
    for name, layers in lists_of(built).items():
        length, keep = len(layers), _layers_in(live, name)
        for change in changes(data, length, tuple(range(keep)), set()) if keep < length else ():
            if _layers_in(now, name) == keep or not all(holds(data, field) for field in change):
                continue
            after = builder.shapes_at(with_values(data, {**settings, **change}))
            if isinstance(after, Mapping) and live.items() <= after.items() < now.items():
                settings, now = {**settings, **change}, after
    return settings if now == live else {}


def _without_coincidence(
    builder: Builder, data: dict[str, Any], change: dict[FieldPath, Any], lowered: Shapes
) -> dict[str, Any]:
    """Return the config with a change, without a field that equals a list's length by coincidence.

    An image has three channels, and PP-DocLayout takes three feature maps of it. The field is
    omitted if the lists in the change suffice to build the same shapes.
    """
    rest = {field: value for field, value in change.items() if type(value) is not int}
    if 0 < len(rest) < len(change):
        fewer = with_values(data, rest)
        if builder.shapes_at(fewer) == lowered:
            return fewer
    return with_values(data, change)


def _layers_in(all_shapes: Shapes, name: str) -> int:
    """Return how many layers of a list have tensors."""
    rest = [key.removeprefix(f"{name}.") for key in all_shapes if key.startswith(f"{name}.")]
    return len({key.partition(".")[0] for key in rest})


def kinds_of_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return, for each list in which layers repeat, the number of the first layer like each."""
    return _repeating(kinds_in(model))


def _repeating(kinds: Mapping[str, Kinds]) -> dict[str, tuple[int, ...]]:
    """Return ``Kinds.first`` of each list that has several layers of one kind, by its name."""
    firsts = {name: list_kinds.first for name, list_kinds in kinds.items()}
    return {name: first for name, first in firsts.items() if len(set(first)) < len(first)}


def _has_length(model: nn.Module, kinds: Mapping[str, Kinds], length: int, keep: int) -> bool:
    """True if one of the lists that got shorter went from ``length`` to ``keep``, or if none did.

    A field may equal the length by chance: Phi-4-multimodal's eight steps of sound that become one
    are no layers, and with fewer of them, five of eight layers remain.
    """
    shorter = {
        len(layers)
        for name, layers in lists_of(model).items()
        if name in kinds and len(layers) != length == len(kinds[name].first)
    }
    return not shorter or keep in shorter
