"""Probe several fields in one build where their effects do not mix: builds are what costs time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import permutations
from typing import TYPE_CHECKING, TypeVar

from ..model.build import Refusal
from ..model.config_json import FieldPath

if TYPE_CHECKING:
    from .expressions import Quantity
    from .probe import Probe, Sizes, Study

_Fields = TypeVar("_Fields")


def without_effect(study: Study, values: Mapping[FieldPath, int]) -> set[FieldPath]:
    """Return the fields that change nothing at these values, or cannot be a number (bisection).

    A name that cannot be a number in one config cannot be one in the configs inside it either.
    """
    no_numbers: set[str | int] = set()

    def changes_nothing(paths: Sequence[FieldPath]) -> bool:
        """True if these fields change nothing, all set in one build."""
        numbers = [field for field in paths if field[-1] not in no_numbers]
        outcome = not numbers or study.changes_nothing({field: values[field] for field in numbers})
        if len(numbers) == 1 and isinstance(outcome, Refusal) and "'int' object" in outcome.reason:
            no_numbers.add(numbers[0][-1])  # Python's message: the field is no number
        return outcome is True

    matter = set(may_matter(list(values), changes_nothing))
    return {field for field in values if field not in matter or field[-1] in no_numbers}


def may_matter(
    fields: Sequence[_Fields], changes_nothing: Callable[[Sequence[_Fields]], bool]
) -> Iterator[_Fields]:
    """Yield the fields, or lists of fields, that can change the result, in order (bisection).

    ``changes_nothing`` is asked what several of them do when all are set.
    """
    if not fields or changes_nothing(fields):
        return
    if len(fields) == 1:
        yield fields[0]
        return
    half = len(fields) // 2
    yield from may_matter(fields[:half], changes_nothing)
    yield from may_matter(fields[half:], changes_nothing)


def each_of(
    study: Study, values: Mapping[FieldPath, int], moved: Mapping[FieldPath, Sizes]
) -> Iterator[tuple[FieldPath, int, Sizes]]:
    """Yield each field with its value and the sizes that it changes there.

    Fields that changed no quantity in common at other values (``moved``) share one build. A field
    that needs a build alone is omitted.
    """
    groups: list[list[FieldPath]] = []
    for field in values:
        for group in groups:
            if all(moved[field].keys().isdisjoint(moved[other]) for other in group):
                group.append(field)
                break
        else:
            groups.append([field])
    for group in groups:
        yield from _separated(study, group, values, moved)


def _separated(
    study: Study,
    group: Sequence[FieldPath],
    values: Mapping[FieldPath, int],
    moved: Mapping[FieldPath, Sizes],
) -> Iterator[tuple[FieldPath, int, Sizes]]:
    """Yield each field of a group with the sizes that it changes, from one build of all of them.

    A group whose build fails or changes anything else is halved; a single field yields nothing.
    """
    if len(group) < 2:
        return
    heads = any(isinstance(which, str) for field in group for _, which in moved[field])
    sizes = study.at({field: values[field] for field in group}, watch=heads)
    expected = {key for field in group for key in moved[field]}
    if not isinstance(sizes, dict) or any(
        size and key not in expected for key, size in sizes.items()
    ):
        half = len(group) // 2
        yield from _separated(study, group[:half], values, moved)
        yield from _separated(study, group[half:], values, moved)
        return
    for field in group:
        own_sizes = {key: size for key, size in sizes.items() if key in moved[field]}
        if own_sizes:
            yield field, values[field], own_sizes


def show_heads(
    study: Study, values: Mapping[FieldPath, int], probes: Mapping[FieldPath, Sequence[Probe]]
) -> None:
    """Add to the probes the head counts that only show while the head dim stays as it is.

    Qwen2-VL's rotary sections add up to a head's dimensions: with another head count alone, or
    another hidden size alone, the forward pass stops before the queries are split. So a head count
    and a width are doubled in one build. The probes are changed in place.
    """
    hidden_counts = _hidden_heads(study, probes)
    unobserved = {
        field: {k for k in hidden_counts if all(probe.sizes.get(k) == 0 for probe in field_probes)}
        for field, field_probes in probes.items()
    }
    moved = {
        field: {key for probe in field_probes for key in probe.sizes}
        for field, field_probes in probes.items()
    }
    for count, width in permutations(filter(unobserved.get, unobserved), 2):
        keys = {
            key
            for key in hidden_counts & unobserved[count] & unobserved[width]
            if (f"{key[0]}.weight", 0) in moved[width]
            and not {(f"{key[0]}.weight", 0), (f"{key[0]}.weight", 1)} & moved[count]
        }
        sizes = study.at({count: 2 * values[count], width: 2 * values[width]}) if keys else None
        if not isinstance(sizes, dict):
            continue
        for key in (key for key in keys if sizes.get(key) == 2 * study.base[key]):
            hidden_counts.discard(key)
            for probe in probes[count]:
                share = Fraction(probe.value * study.base[key], values[count])
                probe.sizes[key] = int(share) if share.denominator == 1 else 0
            for probe in probes[width]:
                del probe.sizes[key]


def _hidden_heads(study: Study, probes: Mapping[FieldPath, Sequence[Probe]]) -> set[Quantity]:
    """Return the head counts that change in no probe of any field."""
    sizes = [probe.sizes for field_probes in probes.values() for probe in field_probes]
    return {
        key
        for key in study.base
        if isinstance(key[1], str) and not any(changed.get(key) for changed in sizes)
    }
