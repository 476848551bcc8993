"""Fewer layers for learning: the cost must not grow with the depth of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .reference import Builder, FieldPath, Refusal, shapes, with_values

Shapes = dict[str, tuple[int, ...]]

_FEW = 16
_FEATURES = {"out_features", "out_indices"}


@dataclass(frozen=True)
class Depth:
    """A config with as few layers as show every kind of layer, and how names map onto it.

    Attributes:
        data: the shallow config's JSON.
        alike: name of a list of layers -> for each layer, the index of the first one like it.
    """

    data: dict[str, Any]
    alike: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def canonical(self, name: str) -> str:
        """The name, in the shallow model, of the tensor or module that is like ``name``."""
        parts: list[str] = []
        for part in name.split("."):
            indices = self.alike.get(".".join(parts))
            if indices is not None and part.isdigit():
                part = str(indices[int(part)])
            parts.append(part)
        return ".".join(parts)


def shallow(builder: Builder, data: dict[str, Any], full: nn.Module) -> Depth:
    """Find the settings that only repeat layers, and lower them.

    A setting counts when a lower value takes tensors away and changes no other tensor's shape.
    Where nothing can be lowered, the result is the config itself.
    """
    before = full_shapes = shapes(full)
    alike = _alike(full)
    lowered, widths = data, _width_lists(builder, data, full_shapes)
    keeps: dict[int, set[int]] = {}
    for indices in alike.values():
        keeps.setdefault(len(indices), set()).add(max(2, max(indices) + 1))
    steps = ((n, keep) for n in sorted(keeps, reverse=True) for keep in sorted(keeps[n]))
    for length, keep in steps:  # lists of one length need not have as many kinds of layers
        for left in (one for one in (keep, keep + 1, 3 * keep) if one < length):
            changes = _changes(data, length, left, widths)
            lower, fewer, refused = _lowered(
                builder, lowered, full_shapes, changes, alike, (length, left)
            )
            more, lowered, full_shapes = refused and lower is lowered, lower, fewer
            if not more:
                break  # more may do: CvT looks up a list by its stage, Zamba ties every sixth
    if lowered is data:
        return Depth(lowered)
    for name, indices in alike.items():
        if _layers_in(full_shapes, name) == _layers_in(before, name):
            alike[name] = tuple(range(len(indices)))  # no layer stands for others
    return Depth(lowered, alike)


def _lowered(
    builder: Builder,
    data: dict[str, Any],
    full_shapes: Shapes,
    changes: Sequence[dict[FieldPath, Any]],
    alike: Mapping[str, tuple[int, ...]],
    lengths: tuple[int, int],
) -> tuple[dict[str, Any], Shapes, bool]:
    """The config without what only repeats layers, its shapes, and whether some did not build.

    ``lengths``: of a list before and after.
    """
    refused = False
    for change in changes:
        if not all(_holds(data, path) for path in change):
            continue
        trial = with_values(data, change)
        model = builder.build(trial)
        refused |= isinstance(model, Refusal)
        if isinstance(model, Refusal) or not _counted(model, alike, *lengths):
            continue
        if _only_fewer(full_shapes, model, alike):
            full_shapes = shapes(model)
            data = _without_chance(builder, data, change, full_shapes)
    return data, full_shapes, refused


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
        for change in _changes(data, length, keep, set()) if keep < length else ():
            if _layers_in(now, name) == keep or not all(_holds(data, path) for path in change):
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


def lists_of(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Every list of layers in a model that has any."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }


def _alike(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """For every list of layers: the index of the first layer with the same names and shapes."""
    result: dict[str, tuple[int, ...]] = {}
    for name, layers in lists_of(model).items():
        signatures: list[frozenset[tuple[str, tuple[int, ...]]]] = [
            frozenset(() if layer is None else shapes(layer).items()) for layer in layers
        ]
        result[name] = tuple(signatures.index(signature) for signature in signatures)
    return result


def kinds_of_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """For every list in which layers repeat: the index of the first layer like each."""
    return {name: alike for name, alike in _alike(model).items() if len(set(alike)) < len(alike)}


def _changes(
    data: dict[str, Any], length: int, keep: int, widths: Set[FieldPath]
) -> list[dict[FieldPath, Any]]:
    """Ways to say ``keep`` layers instead of ``length``: a field, alone or with its lists.

    Or one entry of a list (Swin's ``depths``), a field that counts one more (Mask2Former's
    decoder), or a list of the layers that have something beside them, which is as long (Qwen3-VL).
    """
    changes: list[dict[FieldPath, Any]] = []

    def visit(node: dict[str, Any], path: FieldPath) -> None:
        as_long = [key for key, one in node.items() if isinstance(one, list) and len(one) == length]
        # where each of those layers has a width of its own, they only happen to be alike (Swin2SR)
        own = any((*path, key) in widths for key in as_long)
        lists: dict[FieldPath, Any] = {(*path, key): node[key][:keep] for key in as_long if not own}
        lists |= {
            (*path, key): {number: one for number, one in value.items() if int(number) < keep}
            for key, value in node.items()
            if _by_number(value) and keep <= max(map(int, value)) < length
        }
        # first, so that no field that is as large by chance goes along
        changes.extend({key: value} for key, value in lists.items() if is_numbers(value))
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, (*path, key))
            elif type(value) is int and 0 <= value - length <= 1 and not own:
                fewer: dict[FieldPath, Any] = {(*path, key): keep + value - length}
                changes.extend([fewer, {**fewer, **lists}] if lists else [fewer])
                if node.keys() >= _FEATURES:  # a backbone's stages by name, of which the last stays
                    unnamed = {(*path, name): None for name in _FEATURES}
                    changes.append({**fewer, **lists, **unnamed})
            elif isinstance(value, list) and len(value) <= _FEW and (*path, key) not in widths:
                places = [(*path, key, i) for i, one in enumerate(value) if one == length]
                changes.extend({place: keep} for place in places)

    visit(data, ())
    return changes


def _holds(data: dict[str, Any], path: FieldPath) -> bool:
    """Whether there is such a place yet: a list may have been made shorter, or nothing."""
    node: Any = data
    for key in path:
        if not isinstance(node, (dict, list)) or (isinstance(node, list) and len(node) <= int(key)):
            return False
        node = node.get(key) if isinstance(node, dict) else node[int(key)]
    return True


def _by_number(value: Any) -> bool:
    """Whether this has entries for some layers, named by their numbers (Gemma 4)."""
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def is_numbers(value: Any) -> bool:
    """Whether a list can name layers by their numbers."""
    several = are_whole(value) and len(value) > 1
    return several and value == sorted(set(value)) and value[0] >= 0


def are_whole(value: Any) -> bool:
    """Whether this is a list of whole numbers, one at least."""
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)


def _width_lists(builder: Builder, data: dict[str, Any], before: Shapes) -> set[FieldPath]:
    """Lists that hold a width of every layer, of so few that each can be looked at.

    Large numbers are taken for widths, but for one number for all whose double changes nothing
    (Longformer's windows); of small ones, those whose double makes a tensor longer.
    """
    found: set[FieldPath] = set()

    def visit(node: dict[str, Any], path: FieldPath) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, (*path, key))
            elif isinstance(value, list) and 1 < len(value) <= _FEW:
                if not are_whole(value):
                    continue
                if min(value) > _FEW and len(set(value)) > 1:
                    found.add((*path, key))
                else:
                    after = doubled((*path, key), value)
                    if after != before if min(value) > _FEW else longer(after):
                        found.add((*path, key))

    def doubled(path: FieldPath, value: list[int]) -> Shapes:
        model = builder.build(with_values(data, {(*path, len(value) - 1): 2 * value[-1]}))
        return {} if isinstance(model, Refusal) else shapes(model)

    def longer(after: Shapes) -> bool:
        return after.keys() == before.keys() and any(
            shape[:1] != before[name][:1] for name, shape in after.items()
        )

    visit(data, ())
    return found


def _counted(
    model: nn.Module, alike: Mapping[str, tuple[int, ...]], length: int, left: int
) -> bool:
    """Whether the lists that got shorter are as short as was said, one of them at least.

    Phi-4-multimodal's eight steps of sound that become one are no layers: of eight are left five.
    """
    shorter = {
        len(layers)
        for name, layers in lists_of(model).items()
        if len(layers) != length == len(alike.get(name, ()))
    }
    return not shorter or left in shorter


def _only_fewer(before: Shapes, model: nn.Module, alike: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether ``model`` has strictly fewer tensors, all as before, and every kind of layer."""
    after = shapes(model)
    if not (after.keys() < before.keys() and all(before[name] == after[name] for name in after)):
        return False
    return all(max(alike.get(name, (0,))) < len(layers) for name, layers in lists_of(model).items())
