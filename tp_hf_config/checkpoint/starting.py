"""Find a config to begin solving from: one that the class accepts, near to the folder's.

A class that refuses its own config cannot be learned around it. A value that stands in the way is
left to its default, or changed to one that the class accepts. The weights or the user then have to
decide such a value, never this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from ..fieldmap.field_map import FieldMap
from ..model.build import Refusal
from ..model.config_json import (
    FieldPath,
    field_name,
    plain_fields,
    with_values,
    without_field,
)
from .assess import Assessment, assess
from .building import Classes, build, entries, value_in
from .forms import place_in
from .headers import Stored
from .large import longest_list, too_large, too_large_reason

_MOST_TRIED = 400  # configs that are built
_MOST_STARTS = 6  # configs near the folder's that solving may begin from
_FEW = 256


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
class Start:
    """Where solving begins.

    Attributes:
        data: the config's JSON.
        assessment: how the checkpoint's tensors load with it.
        replaced: the fields whose value is not the folder's.
    """

    data: dict[str, Any]
    assessment: Assessment
    replaced: frozenset[FieldPath] = field(default_factory=frozenset)


def undecided_field(
    task: Task, start: Start, field_map: FieldMap, given: Mapping[FieldPath, int]
) -> FieldPath | None:
    """Return a replaced field that nothing decides, or None if there is none.

    One that sets no size is returned as config.json says it.

    A field is decided if it is given, if a shape shows it (alone or with a field that is decided),
    or if it decides which tensors there are (a layer count).

    ``given``: fields whose value the user gave.
    """
    replaced = own_paths(task, start, field_map.data)
    for path in replaced.keys() - given.keys():
        if path in field_map.sizes:
            shown = _sets_alone(field_map, path) or bool(
                _joint_fields(field_map, path)
                & (given.keys() | field_map.sizes.keys() - replaced.keys())
            )
        else:
            shown = _decides_tensors(task, start, replaced[path])
        if not shown:
            return path if path in field_map.sizes else replaced[path]
    return None


def companions(
    task: Task, start: Start, field_map: FieldMap, given: Mapping[FieldPath, int]
) -> dict[FieldPath, int]:
    """Return what config.json says of fields that set dimensions together with replaced ones.

    ``given``: fields whose value the user gave.
    """
    replaced = own_paths(task, start, field_map.data).keys()
    return {
        other: value
        for path in replaced - given.keys()
        if path in field_map.sizes and not _sets_alone(field_map, path)
        for other in _joint_fields(field_map, path) - replaced
        if type(value := _said_of(task, start, other)) is int
    }


def own_paths(task: Task, start: Start, full: dict[str, Any]) -> dict[FieldPath, FieldPath]:
    """Return the replaced fields as the class has them: field -> its place in config.json.

    ``full``: the config's JSON with every default.
    """
    own = {
        place: path
        for path, value in (entries(full) if start.replaced else ())
        for place in [place_in(task.classes, task.data, start.data, path)]
        if value_in(start.data, place) in (None, value)
    }
    return {own.get(place, place): place for place in start.replaced}


def _said_of(task: Task, start: Start, path: FieldPath) -> Any:
    """Return what config.json says of a field, wherever it does; None: nothing."""
    return value_in(task.data, place_in(task.classes, task.data, start.data, path))


def _decides_tensors(task: Task, start: Start, path: FieldPath) -> bool:
    """True if a number decides which tensors there are: with one more or less they do not fit."""
    value = value_in(start.data, path)
    if type(value) is not int:
        return False
    for other in (value + 1, value - 1):
        assessment = assess(task.classes, with_values(start.data, {path: other}), task.tensors)
        if isinstance(assessment, Assessment) and not assessment.misplaced:
            return False
    return True


def _sets_alone(field_map: FieldMap, path: FieldPath) -> bool:
    """True if some dimension is set by this field and no other."""
    return any(
        isinstance(which, int) and expression.fields == {path}
        for (_, which), expression in field_map.expressions.items()
    )


def _joint_fields(field_map: FieldMap, path: FieldPath) -> set[FieldPath]:
    """Return the fields that set dimensions together with this one."""
    return {
        other
        for (_, which), expression in field_map.expressions.items()
        if isinstance(which, int) and path in expression.fields
        for other in expression.fields - {path}
    }


def starts(task: Task) -> Iterator[Start | Refusal]:
    """Yield where solving may begin: the folder's config, or configs near it.

    Yields:
        The start with the folder's config, if the class accepts it. Otherwise a Refusal with the
        reason, and then starts with configs near it.
    """
    classes, data, tensors = task.classes, task.data, task.tensors
    large = too_large(classes, data, tensors)
    if large:
        yield Refusal(too_large_reason(large, tensors))
        candidates = _with_smaller(data, large, tensors)
    else:
        assessment = assess(classes, data, tensors)
        if isinstance(assessment, Assessment):
            yield Start(data, assessment)
            return
        yield assessment
        candidates = chain(_with_given(classes, data, task.given), _nearby(data, tensors))
    count = 0
    for paths, other in islice(candidates, _MOST_TRIED):
        if count < _MOST_STARTS and not isinstance(build(classes, other), Refusal):
            assessment = assess(classes, other, tensors)
            if isinstance(assessment, Assessment):
                count += 1
                yield Start(other, assessment, paths)


_Candidates = Iterator[tuple[frozenset[FieldPath], dict[str, Any]]]
"""The replaced fields, and the config's JSON with their new values."""


def _with_given(classes: Classes, data: dict[str, Any], given: Mapping[str, int]) -> _Candidates:
    """Yield the config with the values that the user gave, if it has fields of these names."""
    aliases: Any = getattr(classes.config, "attribute_map", {})
    own = {aliases.get(name, name): value for name, value in given.items()}
    values = {
        path: own[name]
        for path, _ in _fields(data)
        for name in (field_name(path), str(path[-1]))
        if name in own
    }
    if values:
        yield frozenset(values), with_values(data, dict(values))


def _with_smaller(
    data: dict[str, Any], large: Mapping[FieldPath, int], tensors: Mapping[str, Stored]
) -> _Candidates:
    """Yield the config with too large numbers at their defaults, or at a size in the weights."""
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    plain = data
    for path in large:
        if not any(isinstance(key, int) for key in path):
            plain = without_field(plain, path)
    yield frozenset(large), plain
    for size in (longest_list(tensors), *sorted(sizes, reverse=True)[:_FEW]):
        yield frozenset(large), with_values(data, dict.fromkeys(large, size))


def _nearby(data: dict[str, Any], tensors: Mapping[str, Stored]) -> _Candidates:
    """Yield the config with one field lower, at another multiple, or at its default.

    The order is: numbers far above the longest list of layers in the weights at its length; each
    number at the next multiples of small numbers in the config; each number at that length; each
    field at its default.
    """
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
            yield frozenset({path}), without_field(data, path)


def _fields(data: Mapping[str, Any]) -> list[tuple[FieldPath, Any]]:
    """Return the fields of a config's JSON with their values, but not what names the class."""
    named = ("architectures", "model_type")
    return [(path, value) for path, value in plain_fields(data) if path[-1] not in named]
