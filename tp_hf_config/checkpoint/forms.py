"""Change fields of a config.json where its class reads them; nothing else that it says is lost.

A class may read a field under another name (``attribute_map``), or above the nested config that it
belongs in: the oldest configs of the Hub have no ``text_config``, and its fields stand at the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..model.config_json import FieldPath, value_at, with_values
from .building import Classes, as_json, value_in


def forms(
    classes: Classes, data: dict[str, Any], new: Mapping[str, Any], changes: Mapping[FieldPath, Any]
) -> list[dict[str, Any]]:
    """Return the forms in which some fields may be changed, in the order to try them.

    A field of a nested config that ``data`` lacks is set above it first, then with the whole nested
    config: a nested config with this field alone would leave all others to their defaults.

    Args:
        classes: the classes of the folder.
        data: the config's JSON.
        new: the JSON from which objects and lists that ``data`` lacks, or has too short, are taken.
        changes: field -> value.
    """
    aliases: Any = getattr(classes.config, "attribute_map", {})
    places = {
        place: value
        for path, value in changes.items()
        for place in _names(data, aliases, path) or [path]
    }
    above = {_outside(data, place): value for place, value in places.items()}
    first = _with_changes(data, new, above)
    return [first] if above.keys() == places.keys() else [first, _with_changes(data, new, places)]


def takes_effect(
    classes: Classes, data: Mapping[str, Any], changes: Mapping[FieldPath, Any]
) -> bool:
    """True if the class reads the new values of all changed fields out of a config's JSON."""
    full = as_json(classes, data, use_diff=False)
    return full is not None and all(value_in(full, path) == new for path, new in changes.items())


def place_in(
    classes: Classes, data: Mapping[str, Any], written: Mapping[str, Any], path: FieldPath
) -> FieldPath:
    """Return the place at which config.json says a field: its own, an alias, or one above.

    Of a field that is there under its own name and under an alias, the class reads the alias.

    Args:
        classes: the classes of the folder.
        data: config.json.
        written: the same with changes, as one of :func:`forms`.
        path: the field.
    """
    aliases: Any = getattr(classes.config, "attribute_map", {})
    named = [name for name in _names(data, aliases, path) if value_in(data, name) is not None]
    return named[0] if named else _outside(written, path)


def _names(data: Mapping[str, Any], aliases: Mapping[str, str], path: FieldPath) -> list[FieldPath]:
    """Return the names at the top that a config's JSON has for a field, its own one last."""
    names = [*(alias for alias, own in aliases.items() if (own,) == path), *path[:1]]
    return [(name,) for name in names if len(path) == 1 and name in data]


def _outside(data: Mapping[str, Any], path: FieldPath) -> FieldPath:
    """Return where a field would stand if the nested configs that the JSON lacks are left out."""
    if any(isinstance(key, int) for key in path):
        return path
    above = path[:-1]
    while above and value_in(data, above) is None:
        above = above[:-1]
    return (*above, path[-1])


def _with_changes(
    data: dict[str, Any], new: Mapping[str, Any], changes: Mapping[FieldPath, Any]
) -> dict[str, Any]:
    """Return a config's JSON with some fields at other values (see :func:`forms`)."""
    result = data
    for path, value in changes.items():
        while not _has_place(result, path):
            path = path[:-1]
            value = value_at(new, path)
        result = with_values(result, {path: value})
    return result


def _has_place(data: Mapping[str, Any], path: FieldPath) -> bool:
    """True if a config's JSON has what a field is in: an object, or a list that is long enough."""
    parent = value_in(data, path[:-1])
    if isinstance(path[-1], int):
        return isinstance(parent, list) and path[-1] < len(parent)
    return isinstance(parent, dict)
