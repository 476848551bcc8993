"""A config that the class takes, as near to the folder's as can be, to begin solving from.

A class that refuses its own config cannot be learned around it.  A value that stands in the way is
left to its default, or moved to where the class takes it; what was moved has then to be decided by
the weights or by the user, never by this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from ..fit import value_at
from ..learn import ConfigMap
from ..reference import FieldPath, Refusal, field_name, with_values
from .assess import Assessment, assess
from .building import Classes, build, longest_list, said_too_large, too_large
from .headers import Stored

_MOST_TRIED = 400
_MOST_STARTS = 6
_FEW = 256


@dataclass(frozen=True)
class Start:
    """Where solving begins.

    Attributes:
        data: the config.
        assessment: what it gives with the checkpoint's tensors.
        replaced: fields whose value is not the folder's.
    """

    data: dict[str, Any]
    assessment: Assessment
    replaced: frozenset[FieldPath] = field(default_factory=frozenset)


def undecided(
    begun: Start,
    known: ConfigMap,
    classes: Classes,
    tensors: Mapping[str, Stored],
    given: Mapping[FieldPath, int],
) -> FieldPath | None:
    """A replaced field that nothing decides: no shape, no number of layers, and nobody said it."""
    for path in begun.replaced - given.keys():
        if path in known.sizes:
            shown = _alone(known, path) or bool(
                _partners(known, path) & (given.keys() | known.sizes.keys() - begun.replaced)
            )
        else:
            shown = _counts(begun, path, classes, tensors)
        if not shown:
            return path
    return None


def partners(
    begun: Start, known: ConfigMap, data: Mapping[str, Any], given: Mapping[FieldPath, int]
) -> dict[FieldPath, int]:
    """What the folder's config says of fields that set dimensions together with replaced ones."""
    return {
        other: value
        for path in begun.replaced - given.keys()
        if path in known.sizes and not _alone(known, path)
        for other in _partners(known, path) - begun.replaced
        if type(value := value_at(data, other)) is int
    }


def _counts(begun: Start, path: FieldPath, classes: Classes, tensors: Mapping[str, Stored]) -> bool:
    """Whether a number decides which tensors there are: with one more or less they do not fit."""
    value = value_at(begun.data, path)
    if type(value) is not int:
        return False
    for other in (value + 1, value - 1):
        found = assess(classes, with_values(begun.data, {path: other}), tensors)
        if isinstance(found, Assessment) and not found.misplaced:
            return False
    return True


def _alone(known: ConfigMap, path: FieldPath) -> bool:
    """Whether some dimension is set by a field and no other."""
    return any(
        isinstance(which, int) and expression.fields == {path}
        for (_, which), expression in known.expressions.items()
    )


def _partners(known: ConfigMap, path: FieldPath) -> set[FieldPath]:
    """The fields that set dimensions together with another."""
    return {
        other
        for (_, which), expression in known.expressions.items()
        if isinstance(which, int) and path in expression.fields
        for other in expression.fields - {path}
    }


def starts(
    classes: Classes,
    data: dict[str, Any],
    tensors: Mapping[str, Stored],
    given: Mapping[str, int],
) -> Iterator[Start | Refusal]:
    """The folder's config; where the class cannot take it, why, and configs near it."""
    large = too_large(data, tensors)
    if large:
        yield Refusal(said_too_large(large, tensors))
        near = _smaller(data, large, tensors)
    else:
        first = assess(classes, data, tensors)
        yield Start(data, first) if isinstance(first, Assessment) else first
        told = _as_told(classes, data, given)
        near = iter(()) if isinstance(first, Assessment) else chain(told, _near(data, tensors))
    count = 0
    for paths, other in islice(near, _MOST_TRIED):
        if count < _MOST_STARTS and not isinstance(build(classes, other), Refusal):
            found = assess(classes, other, tensors)
            if isinstance(found, Assessment):
                count += 1
                yield Start(other, found, paths)


_Near = Iterator[tuple[frozenset[FieldPath], dict[str, Any]]]


def _as_told(classes: Classes, data: dict[str, Any], given: Mapping[str, int]) -> _Near:
    """The config with the values that the user gave, where it has fields of these names."""
    aliases: Any = getattr(classes.config, "attribute_map", {})
    own = {aliases.get(name, name): value for name, value in given.items()}
    told = {
        path: own[name]
        for path, _ in _fields(data)
        for name in (field_name(path), str(path[-1]))
        if name in own
    }
    if told:
        yield frozenset(told), with_values(data, dict(told))


def _smaller(
    data: dict[str, Any], large: Mapping[FieldPath, int], tensors: Mapping[str, Stored]
) -> _Near:
    """The config with numbers that are too large at their defaults, or at a size that is there."""
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    plain = data
    for path in large:
        if not any(isinstance(key, int) for key in path):
            plain = _without(plain, path)
    yield frozenset(large), plain
    for size in (longest_list(tensors), *sorted(sizes, reverse=True)[:_FEW]):
        yield frozenset(large), with_values(data, dict.fromkeys(large, size))


def _near(data: dict[str, Any], tensors: Mapping[str, Stored]) -> _Near:
    """The config with one field lower, at another multiple, or at its default."""
    numbers = {path: value for path, value in _fields(data) if type(value) is int and value > 0}
    longest = longest_list(tensors)
    for path, value in numbers.items():
        if value > longest + _FEW:
            yield frozenset({path}), with_values(data, {path: longest})
    steps = sorted({value for value in numbers.values() if 1 < value <= _FEW}, reverse=True)
    for path, value in numbers.items():
        for step in steps:
            for other in {value // step * step, (value // step + 1) * step} - {0, value}:
                yield frozenset({path}), with_values(data, {path: other})
    for path, value in numbers.items():
        if value != longest:
            yield frozenset({path}), with_values(data, {path: longest})
    for path, value in _fields(data):
        if value is not None:
            yield frozenset({path}), _without(data, path)


def _fields(data: Mapping[str, Any], path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _fields(value, (*path, key))
        elif key not in ("architectures", "model_type"):
            yield (*path, key), value


def _without(data: dict[str, Any], path: FieldPath) -> dict[str, Any]:
    result = with_values(data, {path: None})
    node: Any = result
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return result
