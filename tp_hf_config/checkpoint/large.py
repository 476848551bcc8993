"""Find the numbers of a config with which building its class might not end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..model.config_json import FieldPath, field_name, value_at, with_values, without_field
from .building import Classes, as_json, entries
from .headers import Stored
from .words import list_and_layer, number

_LARGEST = 2**20  # the largest value that a field may have, unless a tensor is larger
_LONGEST = 2**24  # the same for fields of lengths (see _LENGTHS)
_LENGTHS = ("position", "length", "window", "seq")
_MOST_ASKED = 16  # large numbers of which the class is asked whether it reads them


def too_large(
    classes: Classes, data: dict[str, Any], tensors: Mapping[str, Stored]
) -> dict[FieldPath, int]:
    """Return the numbers of a config far above every size in the weights: field -> value.

    Building the class with one of them might not end. A field that the class does not have is left
    out, for nothing is built from it; of very many large numbers none is.
    """
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    large = {}
    for path, value in entries(data):
        name = str(path[-1])
        limit = _LONGEST if any(word in name for word in _LENGTHS) else _LARGEST
        if type(value) is int and value > max(limit, largest) and not _is_rotary_base(name):
            large[path] = value
    if len(large) > _MOST_ASKED:
        return large
    small = _without(data, large)
    return {path: value for path, value in large.items() if _is_read(classes, small, path)}


def _is_rotary_base(name: str) -> bool:
    """True if a field of this name is a base of rotary embeddings, which counts nothing."""
    return "theta" in name or ("base" in name and ("rot" in name or "rope" in name))


def _without(data: dict[str, Any], paths: Iterable[FieldPath]) -> dict[str, Any]:
    """Return a config's JSON without some fields; an entry of a list becomes 1."""
    for path in paths:
        in_list = isinstance(path[-1], int)
        data = with_values(data, {path: 1}) if in_list else without_field(data, path)
    return data


def _is_read(classes: Classes, data: dict[str, Any], path: FieldPath) -> bool:
    """True if the class has a field, under this name or as another's alias, or may have it.

    What is inside a list or an object that the class has, and that is no config, may be read.

    ``data``: the config's JSON without large numbers.
    """
    for end in range(1, len(path) + 1):
        without = _without(data, [path[:end]])
        full = as_json(classes, without, use_diff=False)
        config = value_at(full, path[: end - 1])
        if full is None or not isinstance(config, dict) or "model_type" not in config:
            return True
        if path[end - 1] not in config:
            return any(
                as_json(classes, with_values(without, {path[:end]: value}), use_diff=False)
                != with_values(full, {path[:end]: value})
                for value in (1, 2)
            )
    return True


def longest_list(tensors: Mapping[str, Stored]) -> int:
    """Return how many layers the longest list of layers in the weights has; 0: there is none."""
    places = (list_and_layer(name) for name in tensors)
    return max((place[1] + 1 for place in places if place is not None), default=0)


def too_large_reason(large: Mapping[FieldPath, int], tensors: Mapping[str, Stored]) -> str:
    """Return a sentence on the first of the numbers that are too large.

    ``large``: what :func:`too_large` returned; not empty.
    """
    path, value = next(iter(large.items()))
    return (
        f"{field_name(path)} says {number(value)}, far above all that the weights have "
        f"({len(tensors):,} tensors, {longest_list(tensors):,} layers in the longest list)"
    )
