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
from ..model.config_json import FieldPath, config_json, field_name, value_at, with_values
from .assess import Assessment, assess, lists_of
from .building import Classes, config_from, entries
from .headers import Stored

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


def settled(
    classes: Classes,
    data: dict[str, Any],
    first: Assessment,
    tensors: Mapping[str, Stored],
) -> Structure:
    """Change layer counts and settings for as long as that leaves fewer tensors out of place.

    Args:
        classes: the classes.
        data: the config's JSON to begin with.
        first: how the tensors load with it.
        tensors: the checkpoint's tensors.

    Returns:
        The structure reached; some tensors may still be out of place.
    """
    structure = Structure(data, {}, first)
    for _ in range(_MOST_STEPS):
        if not structure.assessment.misplaced:
            break
        better = _better(classes, structure, tensors)
        if better is None:
            break
        structure = better
        if structure.rivals:
            break
    return structure


def _better(classes: Classes, now: Structure, tensors: Mapping[str, Stored]) -> Structure | None:
    """Return the structure after the one change that leaves the fewest tensors out of place.

    Layer counts are tried before settings. The result is None if no change helps.
    """
    full = every_default(classes, now.data)
    for kind in (_lengths(now, full, classes), _switches(full)):
        tried: list[tuple[int, Changes, Assessment]] = []
        for change in kind:
            outcome = assess(classes, with_values(now.data, change), tensors)
            if isinstance(outcome, Refusal) or outcome.misplaced >= now.assessment.misplaced:
                continue
            tried.append((outcome.misplaced, change, outcome))
        if not tried:
            continue
        least = min(count for count, _, _ in tried)
        best = _simplest([(change, found) for count, change, found in tried if count == least])
        change, outcome = best[0]
        data = with_values(now.data, change)
        rivals = tuple(other for other, _ in best) if len(best) > 1 and not least else ()
        return Structure(data, {**now.changes, **change}, outcome, rivals)
    return None


def untied(
    classes: Classes, now: Structure, names: tuple[str, str], tensors: Mapping[str, Stored]
) -> Structure:
    """Return the structure with one setting flipped so that two tensors are no longer tied.

    If no single setting does this, return the structure as it was.
    """
    for change in _switches(every_default(classes, now.data)):
        data = with_values(now.data, change)
        outcome = assess(classes, data, tensors)
        if isinstance(outcome, Refusal) or outcome.misplaced:
            continue
        if names[1] not in outcome.tied.get(names[0], frozenset()):
            return Structure(data, {**now.changes, **change}, outcome)
    return now


def _simplest(best: list[tuple[Changes, Assessment]]) -> list[tuple[Changes, Assessment]]:
    """Return the changes of the outermost fields, one per field: the first, which has no lists."""
    least = min(len(next(iter(change))) for change, _ in best)
    by_field: dict[FieldPath, tuple[Changes, Assessment]] = {}
    for change, outcome in best:
        path = next(iter(change))
        if len(path) == least:
            by_field.setdefault(path, (change, outcome))
    return list(by_field.values())


def every_default(classes: Classes, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's JSON with every default; unchanged if the class refuses it."""
    return as_json(classes, data, use_diff=False) or dict(data)


def as_json(classes: Classes, data: Mapping[str, Any], use_diff: bool) -> dict[str, Any] | None:
    """Return the config's JSON as the class writes it, or None if the class refuses the config.

    Args:
        classes: the classes.
        data: the config's JSON.
        use_diff: leave defaults out.
    """
    try:
        return config_json(config_from(classes, data), use_diff)
    except Exception:  # a class may refuse with any exception
        return None


def _lengths(now: Structure, full: dict[str, Any], classes: Classes) -> Iterator[Changes]:
    """Yield changes that set layer counts to the numbers of layers that the tensors have."""
    prefix = getattr(classes.model, "base_model_prefix", "")
    layers_in_list: dict[str, set[int]] = {}
    for name in (*now.assessment.loaded.shapes, *now.assessment.lost):
        for where, layer in lists_of(name, now.assessment.lists, prefix):
            layers_in_list.setdefault(where, set()).add(layer)
    tried = []
    for name, numbers in layers_in_list.items():
        length, wanted = now.assessment.lists[name], len(numbers)
        whole = max(numbers) + 1 == wanted
        if whole and wanted != length and (length, wanted) not in tried:
            tried.append((length, wanted))
            yield from _saying(full, length, wanted)


def _saying(full: dict[str, Any], length: int, wanted: int) -> Iterator[Changes]:
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
            node = value_at(full, path[:-1]) if len(path) > 1 else full
            lists: Changes = {
                (*path[:-1], key): other[:1] * wanted
                for key, other in (node.items() if isinstance(node, dict) else ())
                if key != "architectures" and _repeats(other, length)
            }
            if lists:
                yield {path: wanted, **lists}


def _repeats(value: Any, length: int) -> bool:
    """True if a value is a list of this length whose entries are equal."""
    return isinstance(value, list) and len(value) == length and all(v == value[0] for v in value)


def _switches(full: dict[str, Any]) -> Iterator[Changes]:
    """Yield one change for each setting that is true or false: its other value."""
    paths = [path for path, value in entries(full) if isinstance(value, bool)]
    for path in sorted(paths, key=len)[:_MOST_SWITCHES]:
        yield {path: not value_at(full, path)}


def described(changes: Mapping[FieldPath, Any]) -> str:
    """Return changes as one text, without lists: ``num_hidden_layers=24``."""
    return ", ".join(
        f"{field_name(path)}={json.dumps(value)}"
        for path, value in changes.items()
        if not isinstance(value, list)
    )
