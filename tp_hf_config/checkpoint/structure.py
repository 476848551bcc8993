"""Which tensors there are: the number of layers, and settings that are true or false.

No field is known by name: a number that is as long as a list of layers, and every setting that is
true or false, is tried at the value that the weights would need.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..fit import value_at
from ..reference import FieldPath, Refusal, field_name, with_values
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
        data: the config.
        changes: what was changed in it.
        assessment: what it gives.
        rivals: other changes that do as well: shapes do not tell which.
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
    """Change numbers of layers and settings for as long as fewer tensors are out of place."""
    found = Structure(data, {}, first)
    for _ in range(_MOST_STEPS):
        if not found.assessment.misplaced:
            break
        better = _better(classes, found, tensors)
        if better is None:
            break
        found = better
        if found.rivals:
            break
    return found


def _better(classes: Classes, now: Structure, tensors: Mapping[str, Stored]) -> Structure | None:
    """The one change that leaves the fewest tensors out of place; None: none helps."""
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
    """The same with the one setting turned that leaves two tensors apart; as it was: none does."""
    for change in _switches(every_default(classes, now.data)):
        data = with_values(now.data, change)
        found = assess(classes, data, tensors)
        if isinstance(found, Refusal) or found.misplaced:
            continue
        if names[1] not in found.tied.get(names[0], frozenset()):
            return Structure(data, {**now.changes, **change}, found)
    return now


def _simplest(best: list[tuple[Changes, Assessment]]) -> list[tuple[Changes, Assessment]]:
    """Each field once, of nested configs the outer one, and no lists where none are needed."""
    least = min(len(next(iter(change))) for change, _ in best)
    found: dict[FieldPath, tuple[Changes, Assessment]] = {}
    for change, outcome in best:
        path = next(iter(change))
        if len(path) == least:
            found.setdefault(path, (change, outcome))
    return list(found.values())


def every_default(classes: Classes, data: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every default, as JSON."""
    return as_json(classes, data, use_diff=False) or dict(data)


def as_json(classes: Classes, data: Mapping[str, Any], use_diff: bool) -> dict[str, Any] | None:
    """The config as the class writes it (``use_diff``: what is no default); None: it refuses."""
    try:
        config = config_from(classes, data)
        full: dict[str, Any] = json.loads(config.to_json_string(use_diff=use_diff))
    except Exception:  # a class may refuse with any exception
        return None
    return full


def _lengths(now: Structure, full: dict[str, Any], classes: Classes) -> Iterator[Changes]:
    """Numbers of layers as the tensors have them."""
    prefix = getattr(classes.model, "base_model_prefix", "")
    found: dict[str, set[int]] = {}
    for name in (*now.assessment.loaded.shapes, *now.assessment.lost):
        for where, layer in lists_of(name, now.assessment.lists, prefix):
            found.setdefault(where, set()).add(layer)
    seen = []
    for name, numbers in found.items():
        length, wanted = now.assessment.lists[name], len(numbers)
        whole = max(numbers) + 1 == wanted
        if whole and wanted != length and (length, wanted) not in seen:
            seen.append((length, wanted))
            yield from _saying(full, length, wanted)


def _saying(full: dict[str, Any], length: int, wanted: int) -> Iterator[Changes]:
    """Ways to say another number of layers: a field, alone or with lists of equal entries.

    A list whose entries differ says something of each layer that no shape shows.
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
    return isinstance(value, list) and len(value) == length and all(v == value[0] for v in value)


def _switches(full: dict[str, Any]) -> Iterator[Changes]:
    """Every setting that is true or false, turned."""
    paths = [path for path, value in entries(full) if isinstance(value, bool)]
    for path in sorted(paths, key=len)[:_MOST_SWITCHES]:
        yield {path: not value_at(full, path)}


def described(changes: Mapping[FieldPath, Any]) -> str:
    """Changes in one text: ``num_hidden_layers=24``."""
    return ", ".join(
        f"{field_name(path)}={json.dumps(value)}"
        for path, value in changes.items()
        if not isinstance(value, list)
    )
