"""Write the rotary fields that Transformers 4 reads next to those that Transformers 5 writes.

Transformers 5 writes ``rope_parameters`` alone. Software based on Transformers 4 reads
``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``, and silently uses its own defaults
if they are missing. They are written only if the config loads the same with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model.config_json import FieldPath, field_name, value_at, with_values
from .building import Classes, config_from
from .folder import CONFIG, write_config
from .loading import MAJOR
from .reports import number

_ROPE = "rope_parameters"
_OWN_FIELDS = ("rope_theta", "partial_rotary_factor")
_TYPE_NAMES = {"rope_type", "type"}


@dataclass(frozen=True)
class Rotary:
    """A config's JSON with the rotary fields that Transformers 4 reads."""

    data: dict[str, Any]
    added: dict[FieldPath, Any] = field(default_factory=dict)  # new fields in data
    unwritable: tuple[str, ...] = ()  # fields that cannot be written, and why, one sentence each


def for_transformers_4(classes: Classes, data: dict[str, Any]) -> Rotary:
    """Add the fields for Transformers 4, each only if the config still loads the same."""
    result, reasons = Rotary(data), []
    for at, value, present in _fields_of_4(data):
        name, changed = field_name(at), with_values(result.data, {at: value})
        if present is not None:
            if value not in (None, present):
                reasons.append(
                    f"{name} is {number(present)}, but {_ROPE} has {number(value)}. "
                    "Transformers 4 reads the first, Transformers 5 the second: correct one of "
                    "them by hand"
                )
        elif value is None:
            reasons.append(
                f"{field_name((*at[:-1], _ROPE))} differs between layer types, which rope_theta "
                "cannot express: software based on Transformers 4 uses its own defaults"
            )
        elif _load_the_same(classes, result.data, changed, {*result.added, at}):
            result = Rotary(changed, {**result.added, at: value})
        else:
            reasons.append(
                f"{name} {number(value)} is only in {_ROPE}, which software based on "
                f"Transformers 4 does not read. It is not written beside {_ROPE}, because "
                f"{classes.config.__name__} would then load another config"
            )
    return Rotary(result.data, result.added, tuple(reasons))


def write_for_transformers_4(folder: Path, classes: Classes) -> tuple[str, ...]:
    """Add the fields to a folder's config.json; return ``unwritable``."""
    rotary = for_transformers_4(classes, json.loads((folder / CONFIG).read_bytes()))
    if rotary.added:
        write_config(folder, rotary.data)
    return rotary.unwritable


def unread_by_transformers_4(data: Mapping[str, Any]) -> list[str]:
    """Fields that only ``rope_parameters`` holds, so that Transformers 4 misses them."""
    return [field_name(at) for at, _, present in _fields_of_4(data) if present is None]


def _fields_of_4(data: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any, Any]]:
    """Yield each field that Transformers 4 reads, its value in ``rope_parameters``, and its own.

    The first value is ``None`` if it differs between layer types.
    """
    if not isinstance(data, Mapping):
        return
    rope = data.get(_ROPE)
    if isinstance(rope, dict):
        differs = any(isinstance(value, dict) for value in rope.values())
        fields = {"rope_theta": None} if differs else _separate_fields(data)
        yield from (((*path, name), value, data.get(name)) for name, value in fields.items())
    for key, value in data.items():
        if key != _ROPE:
            yield from _fields_of_4(value, (*path, key))


def _separate_fields(node: Mapping[str, Any]) -> dict[str, Any]:
    """The Transformers 4 fields equivalent to a part's ``rope_parameters``."""
    rope: dict[str, Any] = node[_ROPE]
    fields = {name: rope[name] for name in _OWN_FIELDS if type(rope.get(name)) in (int, float)}
    scaling = {name: value for name, value in rope.items() if name not in _OWN_FIELDS}
    if "longrope" in (scaling.get("rope_type"), scaling.get("type")):
        # Transformers 4 accepts the length only beside rope_scaling, and the type only
        # under one name
        if scaling.get("original_max_position_embeddings") == node.get(
            "original_max_position_embeddings"
        ):
            scaling.pop("original_max_position_embeddings", None)
        if "type" in scaling:
            scaling.pop("rope_type", None)
    if "rope_theta" in fields and scaling.keys() - _TYPE_NAMES:
        fields["rope_scaling"] = scaling
    return fields


def _load_the_same(
    classes: Classes, data: dict[str, Any], changed: dict[str, Any], added: set[FieldPath]
) -> bool:
    """True if both JSONs load as the same config."""
    try:
        before, after = (config_from(classes, variant).to_dict() for variant in (data, changed))
    except Exception:  # a class may refuse with any exception
        return False
    # Transformers 4 reads the added fields: they must load as written, and are not compared
    if MAJOR < 5:
        for path in added:
            if value_at(after, path) != value_at(changed, path):
                return False
        same = dict.fromkeys(added)
        before, after = with_values(before, same), with_values(after, same)
    return bool(before == after)
