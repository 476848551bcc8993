"""Fit a config to the tensors that there are: layer counts, and settings that are true or false.

No field is known by name. Every number that equals the length of a list of layers, and every
setting that is true or false, is tried at the value that the weights would need.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name, value_at, with_values
from .assess import Assessment, assess, lists_of
from .building import Classes, entries, every_default
from .forms import forms, takes_effect
from .starting import Start, Task

Changes = dict[FieldPath, Any]
_MOST_STEPS = 6
_MOST_SWITCHES = 64


@dataclass(frozen=True)
class Structure:
    """A config with which the class builds the tensors that there are, in whatever shape.

    Attributes:
        data: the config's JSON.
        changes: field -> new value, for each field that was changed.
        assessment: how the tensors load with it.
        rivals: all changes that do equally well, the chosen one included; shapes do not tell which
            is right. Empty if there is only one.
    """

    data: dict[str, Any]
    changes: Changes
    assessment: Assessment
    rivals: tuple[Changes, ...] = ()


def settle(task: Task, start: Start) -> Structure:
    """Change layer counts and settings for as long as that leaves fewer tensors out of place.

    Returns:
        The structure reached; some tensors may still be out of place.
    """
    structure = Structure(start.data, {}, start.assessment)
    for _ in range(_MOST_STEPS):
        if structure.rivals or not structure.assessment.misplaced:
            break
        better = _best_change(task, structure)
        if better is None:
            break
        structure = better
    return structure


def _best_change(task: Task, current: Structure) -> Structure | None:
    """Return the structure after the one change that leaves the fewest tensors out of place.

    Layer counts are tried before settings. The result is None if no change helps.
    """
    full = every_default(task.classes, current.data)
    for kind in (_layer_counts(current, full, task.classes), _switches(full)):
        tried: list[tuple[int, Changes, Assessment]] = []
        for change in kind:
            data = _changed(task, current, full, change)
            outcome = assess(task.classes, data, task.tensors)
            if isinstance(outcome, Refusal) or outcome.misplaced >= current.assessment.misplaced:
                continue
            tried.append((outcome.misplaced, change, outcome))
        if not tried:
            continue
        least = min(count for count, _, _ in tried)
        best = _outermost([(change, outcome) for count, change, outcome in tried if count == least])
        change, outcome = best[0]
        data = _changed(task, current, full, change)
        rivals = tuple(other for other, _ in best) if len(best) > 1 and not least else ()
        return Structure(data, {**current.changes, **change}, outcome, rivals)
    return None


def untie(task: Task, structure: Structure) -> Structure:
    """Return the structure with one setting flipped so that ``differing_tie`` is no longer tied.

    If there is no such tie, or no single setting does this, return the structure as it is.
    """
    if task.differing_tie is None or structure.assessment.misplaced:
        return structure
    first, second = task.differing_tie
    full = every_default(task.classes, structure.data)
    for change in _switches(full):
        data = _changed(task, structure, full, change)
        outcome = assess(task.classes, data, task.tensors)
        if isinstance(outcome, Refusal) or outcome.misplaced:
            continue
        if second not in outcome.tied.get(first, frozenset()):
            return Structure(data, {**structure.changes, **change}, outcome)
    return structure


def _changed(
    task: Task, current: Structure, full: dict[str, Any], change: Changes
) -> dict[str, Any]:
    """Return the config's JSON with some fields changed, in a form out of which the class reads it.

    ``full``: the config's JSON with every default.
    """
    new = with_values(full, change)
    tried = [*forms(task.classes, current.data, new, change), new]
    return next((data for data in tried if takes_effect(task.classes, data, change)), tried[0])


def _outermost(best: list[tuple[Changes, Assessment]]) -> list[tuple[Changes, Assessment]]:
    """Return the changes of the outermost fields, for each field the first: it has no lists."""
    least = min(len(next(iter(change))) for change, _ in best)
    by_field: dict[FieldPath, tuple[Changes, Assessment]] = {}
    for change, outcome in best:
        path = next(iter(change))
        if len(path) == least:
            by_field.setdefault(path, (change, outcome))
    return list(by_field.values())


def _layer_counts(current: Structure, full: dict[str, Any], classes: Classes) -> Iterator[Changes]:
    """Yield changes that set layer counts to the numbers of layers that the tensors have."""
    prefix = getattr(classes.model, "base_model_prefix", "")
    layers_in_list: dict[str, set[int]] = {}
    for name in (*current.assessment.loaded.shapes, *current.assessment.lost):
        for where, layer in lists_of(name, current.assessment.lists, prefix):
            layers_in_list.setdefault(where, set()).add(layer)
    tried = []
    for name, numbers in layers_in_list.items():
        length, wanted = current.assessment.lists[name], len(numbers)
        whole = max(numbers) + 1 == wanted
        if whole and wanted != length and (length, wanted) not in tried:
            tried.append((length, wanted))
            yield from _count_changes(full, length, wanted)


def _count_changes(full: dict[str, Any], length: int, wanted: int) -> Iterator[Changes]:
    """Yield the changes to another layer count: a field, alone or with lists of equal entries.

    A list whose entries differ stays: it says something about each layer that no shape shows.

    Args:
        full: the config's JSON with every default.
        length: the layer count that the config says.
        wanted: the layer count that the tensors have.
    """
    for path, value in entries(full):
        if type(value) is int and value == length:
            yield {path: wanted}
            node = value_at(full, path[:-1])
            lists: Changes = {
                (*path[:-1], key): other[:1] * wanted
                for key, other in (node.items() if isinstance(node, dict) else ())
                if key != "architectures" and _is_uniform(other, length)
            }
            if lists:
                yield {path: wanted, **lists}


def _is_uniform(value: Any, length: int) -> bool:
    """True if a value is a list of this length whose entries are equal."""
    return isinstance(value, list) and len(value) == length and all(v == value[0] for v in value)


def _switches(full: dict[str, Any]) -> Iterator[Changes]:
    """Yield one change for each setting that is true or false: its other value."""
    paths = [path for path, value in entries(full) if isinstance(value, bool)]
    for path in sorted(paths, key=len)[:_MOST_SWITCHES]:
        yield {path: not value_at(full, path)}


def describe(changes: Mapping[FieldPath, Any]) -> str:
    """Return changes as one text, without lists: ``num_hidden_layers=24``."""
    return ", ".join(
        f"{field_name(path)}={json.dumps(value)}"
        for path, value in changes.items()
        if not isinstance(value, list)
    )
