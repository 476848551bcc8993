"""Fit a config to the tensors that there are: fewer layers, and settings that tie weights.

No count of layers is known by name. Settings that may count the layers of a list are set to the
number that the weights have, and the class is built with each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..fieldmap.lower_depth import changes
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name, value_at, with_values
from .assess import Assessment, assess, lists_of
from .building import Classes, entries, every_default
from .forms import forms, takes_effect
from .headers import Stored

Changes = dict[FieldPath, Any]
_MOST_STEPS = 6
"""Changes that are made one after the other."""


@dataclass(frozen=True)
class Task:
    """What is to be solved.

    Attributes:
        classes: the classes of the folder.
        data: config.json.
        tensors: the checkpoint's tensors.
        given: fields whose value is known, by name (``text_config.head_dim``).
        differing_tie: two tensors that the config ties and that differ in the files, if any.
    """

    classes: Classes
    data: dict[str, Any]
    tensors: Mapping[str, Stored]
    given: Mapping[str, int] = field(default_factory=dict)
    differing_tie: tuple[str, str] | None = None


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


def settle(task: Task, structure: Structure) -> Structure:
    """Change settings for as long as that leaves fewer tensors out of place.

    Returns:
        The structure reached; some tensors may still be out of place.
    """
    for _ in range(_MOST_STEPS):
        if structure.rivals or not structure.assessment.misplaced:
            break
        better = _best_change(task, structure)
        if better is None:
            break
        structure = better
    return structure


def _best_change(task: Task, current: Structure) -> Structure | None:
    """Return the structure after the one change that leaves the fewest tensors out of place."""
    full = every_default(task.classes, current.data)
    for kind in (_layer_counts(current, full, task.classes), _ties(full)):
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
    for change in _ties(full):
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
    """Yield changes that set layer counts to the numbers of layers that the tensors have.

    A list whose entries differ stays: no shape shows which layers are gone.
    """
    prefix = getattr(classes.model, "base_model_prefix", "")
    layers_in_list: dict[str, set[int]] = {}
    for name in (*current.assessment.loaded.shapes, *current.assessment.lost):
        for where, layer in lists_of(name, current.assessment.lists, prefix):
            layers_in_list.setdefault(where, set()).add(layer)
    counts = {
        (current.assessment.lists[name], len(numbers))
        for name, numbers in layers_in_list.items()
        if max(numbers) + 1 == len(numbers) < current.assessment.lists[name]
    }
    for length, wanted in sorted(counts):
        for change in changes(full, length, tuple(range(wanted)), frozenset()):
            if all(map(_is_uniform, (value_at(full, path) for path in change))):
                yield change


def _is_uniform(value: Any) -> bool:
    """True if a value is a number, or a list of equal entries."""
    return type(value) is int or (isinstance(value, list) and value == value[:1] * len(value))


def _ties(full: dict[str, Any]) -> Iterator[Changes]:
    """Yield one change for each setting that ties weights: its other value."""
    for path, value in entries(full):
        if isinstance(value, bool) and str(path[-1]).startswith("tie_"):
            yield {path: not value}


def describe(changes: Mapping[FieldPath, Any]) -> str:
    """Return changes as one text, without lists: ``num_hidden_layers=24``."""
    return ", ".join(
        f"{field_name(path)}={json.dumps(value)}"
        for path, value in changes.items()
        if not isinstance(value, list)
    )
