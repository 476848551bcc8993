"""Find a config with fewer layers to learn from, so that learning costs the same at any depth."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

from torch import nn

from ..model.build import Builder, Refusal
from ..model.config_json import EntryOfKind, FieldPath, plain_fields, value_at, with_values
from ..model.shapes import Shapes, shapes
from .field_map import Depth, renumbered
from .layer_kinds import (
    Kinds,
    by_number,
    facts_in,
    is_whole_number_list,
    kinds_in,
    lists_of,
    may_name_layers,
    rises,
)


def shallow(builder: Builder, data: dict[str, Any], full: nn.Module) -> Depth:
    """Lower the settings that only repeat layers, and return the shallow config.

    Lower values have to remove layers, keep one of each kind, and change no other shape, except of
    tensors that hold an equal piece for each layer.
    """
    lowering = _Lowering(builder, data, full)
    widths = width_lists(builder, data, lowering.shapes)
    for length, choices in _choices(lowering.kinds):
        before = lowering.data
        for keep in choices:
            refused = lowering.try_all(changes(data, length, keep, widths), length, len(keep))
            if lowering.data is not before or not (refused or keep[-1] >= len(keep)):
                break  # else keep more: CvT indexes a list by stage, Zamba ties every sixth layer
        keep = choices[0]
        if lowering.data is before and len(keep) < length / 2:  # worth restating a rule
            plain = changes(data, length, keep, widths)
            restated = chain.from_iterable(with_rules(c, data, length, keep) for c in plain)
            lowering.restate(restated, length, len(keep))
    return lowering.depth()


def _choices(kinds: Mapping[str, Kinds]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Yield lengths of lists, each with choices of the layers to keep, the fewest first."""
    # lists of one length need not have as many kinds of layers
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
        self._full_shapes = self.shapes
        self._by_layer: dict[FieldPath, tuple[EntryOfKind, ...]] = {}
        self._builder = builder
        self._steps: list[_Step] = []

    def try_all(self, changes: Sequence[dict[FieldPath, Any]], length: int, keep: int) -> bool:
        """Make the changes that only shorten lists; return True if the class refused any change."""
        refused = False
        for change in changes:
            if all(holds(self.data, field) for field in change):
                before = self.data
                # without numbers first: one may equal a list's length by chance (PP-DocLayout
                # takes three feature maps of an image with three channels)
                lists = {field: value for field, value in change.items() if type(value) is not int}
                if 0 < len(lists) < len(change):
                    self._try(lists, length, keep)
                if self.data is before:
                    refused |= self._try(change, length, keep, others=True)
        return refused

    def restate(self, changes: Iterable[dict[FieldPath, Any]], length: int, keep: int) -> None:
        """Make the first change after which lists of ``length`` layers have ``keep``."""
        before = self.data
        for change in changes:
            self._try(change, length, keep)
            if self.data is not before:
                return

    def _try(
        self, change: dict[FieldPath, Any], length: int, keep: int, others: bool = False
    ) -> bool:
        """Make a change if it only removes layers; return True if the class refuses it.

        Some list of ``length`` layers has to get ``keep``; with ``others``, only other lists may
        get shorter instead.
        """
        model = self._builder.build(with_values(self.data, change))
        if isinstance(model, Refusal):
            return True
        shorter = {
            len(layers)
            for name, layers in lists_of(model).items()
            if name in self.kinds and len(layers) != length == len(self.kinds[name].first)
        }
        # eight steps of sound in Phi-4-multimodal are no layers; if they become one, five remain
        step = self._step(model, change) if keep in shorter or (others and not shorter) else None
        entries = None if step is None else self._entries(step, change)
        if step is not None and entries is not None:
            self._by_layer |= entries
            self.shapes, self.kinds = shapes(model), kinds_in(model)
            self.data = with_values(self.data, change)
            self._steps.append(step)
        return False

    def _entries(
        self, step: _Step, change: Mapping[FieldPath, Any]
    ) -> dict[FieldPath, tuple[EntryOfKind, ...]] | None:
        """Return the entries of each kind of layer in lists that change; None: some have none."""
        result: dict[FieldPath, tuple[EntryOfKind, ...]] = {}
        for field, after in change.items():
            before = value_at(self.data, field)
            if not is_whole_number_list(before) or not isinstance(after, list):
                continue
            lists = [
                name
                for name, numbers in step.numbers.items()
                if len(numbers) == len(before) and len(step.first_of_kind[name]) == len(after)
            ]
            if not lists:
                continue  # it names layers
            full = list(zip(*(step.numbers[name] for name in lists), strict=True))
            few = list(zip(*(step.first_of_kind[name] for name in lists), strict=True))
            if field in self._by_layer or set(full) != set(few):
                return None
            result[field] = tuple(
                EntryOfKind(
                    few.index(kind), {len(kinds): _numbers(kinds, kind) for kinds in (few, full)}
                )
                for kind in dict.fromkeys(few)
            )
        return result

    def _step(self, model: nn.Module, change: Mapping[FieldPath, Any]) -> _Step | None:
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
        if any(name not in self.shapes for name in after if not _inside(name, shorter)):
            return None
        ratios = {Fraction(before[name], len(lists[name])) for name in shorter}
        for name, shape in self.shapes.items():
            new = after.get(renumbered(name, step.numbers))
            if new == shape:
                continue
            if new is None or self._in_layers(name) or not _pieces(shape, new, ratios):
                return None
        return step if self._rest_as_before(model, shorter, change) else None

    def _rest_as_before(
        self, model: nn.Module, shorter: Sequence[str], change: Collection[FieldPath]
    ) -> bool:
        """True if the other lists have layers of the same kinds as before."""
        checked: list[str] = []
        settings = {key for field in change for key in field if isinstance(key, str)}
        lists = lists_of(model)
        for name, kinds in self.kinds.items():
            around = any(other.startswith(f"{name}.") for other in shorter)
            if around or name in shorter or _inside(name, [*shorter, *checked]):
                continue
            checked.append(name)
            # ``depths`` has an entry for each stage, and so has a list of norms
            kinds = kinds.without_settings(settings)
            if name not in lists or kinds.match(facts_in(model, name)) != kinds.first:
                return False
        return True

    def _in_layers(self, name: str) -> bool:
        return _inside(name, list(self.kinds))

    def depth(self) -> Depth:
        first_of_kind: dict[str, tuple[int, ...]] = {}
        for number, step in enumerate(self._steps):
            for name, first in step.first_of_kind.items():
                for later in self._steps[number + 1 :]:
                    name = renumbered(name, later.numbers)
                first_of_kind[name] = first
        steps = tuple(step.numbers for step in self._steps)
        pieces = {
            (name, dim): Fraction(full, size)
            for name, shape in self.shapes.items()
            if not self._in_layers(name)
            for dim, (full, size) in enumerate(zip(self._full_shapes[name], shape, strict=True))
            if full != size
        }
        stands_for = tuple(step.stands_for for step in self._steps)
        return Depth(self.data, steps, first_of_kind, stands_for, pieces, self._by_layer)


def _pieces(shape: Sequence[int], new: Sequence[int], ratios: Collection[Fraction]) -> bool:
    """True if a tensor may hold an equal piece for each layer, and fewer of them now."""
    return len(shape) == len(new) and any(
        all(size in (after, after * ratio) for size, after in zip(shape, new, strict=True))
        for ratio in ratios
    )


def _numbers(kinds: Sequence[Any], kind: Any) -> tuple[int, ...]:
    return tuple(number for number, other in enumerate(kinds) if other == kind)


def _inside(name: str, lists: Sequence[str]) -> bool:
    return any(name.startswith(f"{one}.") for one in lists)


def _represented(kinds: Sequence[int], remaining: Sequence[int]) -> Iterator[int]:
    """Yield for each remaining layer an earlier number of its kind, unused ones first."""
    for number, kind in enumerate(remaining):
        same_kind = _numbers(kinds, kind)
        yield same_kind[min(remaining[:number].count(kind), len(same_kind) - 1)]


def kinds_of_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return, for each list in which layers repeat, the number of the first layer like each."""
    return _repeating(kinds_in(model))


def _repeating(kinds: Mapping[str, Kinds]) -> dict[str, tuple[int, ...]]:
    firsts = {name: list_kinds.first for name, list_kinds in kinds.items()}
    return {name: first for name, first in firsts.items() if len(set(first)) < len(first)}


_FEW = 16  # longer lists are not looked at; numbers above it may be widths
FEATURES = {"out_features", "out_indices"}  # fields that name the stages that a backbone returns


def changes(
    data: dict[str, Any], length: int, keep: tuple[int, ...], widths: Set[FieldPath]
) -> list[dict[FieldPath, Any]]:
    """Return changes of the config after which only the layers ``keep`` may remain, in order.

    A change sets a field that counts layers, alone or with the lists that have an entry for each
    layer; or one entry of a list (Swin's ``depths``), a field that is one more than the number of
    layers (Mask2Former's decoder), or a list of layers with an extra module, if it is as long
    (Qwen3-VL). ``widths`` are lists that hold a width of each layer; these are not shortened.
    """
    candidates: list[dict[FieldPath, Any]] = []
    count = len(keep)

    def visit(node: dict[str, Any], field: FieldPath) -> None:
        as_long = [key for key, v in node.items() if isinstance(v, list) and len(v) == length]
        # layers that each have a width of their own are only alike by chance (Swin2SR)
        has_widths = any((*field, key) in widths for key in as_long)
        lists: dict[FieldPath, Any] = {
            (*field, key): [node[key][n] for n in keep] for key in as_long if not has_widths
        }
        lists |= {
            (*field, key): entries_of_kept(value, keep)
            for key, value in node.items()
            if by_number(value) and count <= max(map(int, value)) < length
        }
        numbers: dict[FieldPath, Any] = {
            (*field, key): [keep.index(n) for n in value if n in keep]
            for key, value in node.items()
            if rises(value) and value[-1] < length != len(value)
        }
        # first, so that no field that equals the length by chance changes too
        candidates.extend({key: value} for key, value in lists.items() if may_name_layers(value))
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, (*field, key))
            elif type(value) is int and 0 <= value - length <= 1 and not has_widths:
                fewer: dict[FieldPath, Any] = {(*field, key): count + value - length}
                candidates.extend([fewer, {**fewer, **lists}] if lists else [fewer])
                if numbers:
                    candidates.append({**fewer, **lists, **numbers})
                # a backbone names its stages; without names it returns the last one
                if node.keys() >= FEATURES:
                    unnamed = {(*field, name): None for name in FEATURES}
                    candidates.append({**fewer, **lists, **unnamed})
            elif isinstance(value, list) and len(value) <= _FEW and (*field, key) not in widths:
                entries = [(*field, key, i) for i, entry in enumerate(value) if entry == length]
                candidates.extend({entry: count} for entry in entries)

    visit(data, ())
    return candidates


def with_rules(
    change: Mapping[FieldPath, Any], data: dict[str, Any], length: int, keep: Sequence[int]
) -> Iterator[dict[FieldPath, Any]]:
    """Yield a change of :func:`changes` with a rule beside its number of layers restated."""
    for field in [field for field, value in change.items() if type(value) is int]:
        node = value_at(data, field[:-1])
        for key, count in restated(node, length, keep) if isinstance(node, dict) else ():
            if (*field[:-1], key) not in change:
                yield {**change, (*field[:-1], key): count}


def restated(
    values: Mapping[str, Any], length: int, keep: Sequence[int]
) -> Iterator[tuple[str, int]]:
    """Yield settings that may count the first or last layers of one kind, with new values."""
    for key, value in values.items():
        # how many of the last layers share keys and values (Gemma 4)
        if type(value) is int and 0 < value <= length and key not in of_every_config():
            first = sum(number < value for number in keep)
            last = sum(number >= length - value for number in keep)
            yield from ((key, count) for count in dict.fromkeys((first, last)) if count != value)


@functools.cache
def of_every_config() -> frozenset[str]:
    from transformers import GenerationConfig, PretrainedConfig

    configs: tuple[Any, ...] = (PretrainedConfig, GenerationConfig)
    return frozenset(name for config in configs for name in config().to_dict())


def entries_of_kept(entries: dict[Any, Any], keep: Sequence[int]) -> dict[Any, Any]:
    by_old = {int(number): (number, entry) for number, entry in entries.items()}
    return {
        type(by_old[old][0])(new): by_old[old][1] for new, old in enumerate(keep) if old in by_old
    }


def holds(data: dict[str, Any], field: FieldPath) -> bool:
    node: Any = data
    for key in field:
        if not isinstance(node, (dict, list)) or (isinstance(node, list) and len(node) <= int(key)):
            return False
        node = node.get(key) if isinstance(node, dict) else node[int(key)]
    return True


def width_lists(builder: Builder, data: dict[str, Any], before: Shapes) -> set[FieldPath]:
    """Return the short lists in the config that hold a width of each layer."""
    lists: set[FieldPath] = set()
    for field, value in plain_fields(data):
        if is_whole_number_list(value) and 1 < len(value) <= _FEW:
            if min(value) > _FEW and len(set(value)) > 1:
                lists.add(field)
            else:  # equal large numbers may set no shape (Longformer's windows)
                wider = with_values(data, {(*field, len(value) - 1): 2 * value[-1]})
                after = builder.shapes_at(wider)
                if after != before if min(value) > _FEW else _longer(before, after):
                    lists.add(field)
    return lists


def _longer(before: Shapes, after: Shapes | Refusal) -> bool:
    return (
        not isinstance(after, Refusal)
        and after.keys() == before.keys()
        and any(shape[:1] != before[name][:1] for name, shape in after.items())
    )
