"""Probe several fields in one build where their effects do not mix: builds are what costs time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import permutations
from typing import TYPE_CHECKING

from ..model.build import Refusal
from ..model.config_json import FieldPath

if TYPE_CHECKING:
    from .expressions import Quantity
    from .probe import Probe, Sizes, Study


def without_effect(study: Study, values: Mapping[FieldPath, int]) -> set[FieldPath]:
    """Return the fields that change nothing at these values, or that cannot be a number.

    Found by bisection. A name that cannot be a number in one config cannot be one in the configs
    inside it either.
    """
    no_numbers: set[str | int] = set()

    def in_vain(paths: Sequence[FieldPath]) -> bool:
        """True if these fields change nothing, all set in one build."""
        remaining = [field for field in paths if field[-1] not in no_numbers]
        quiet = not remaining or study.quiet({field: values[field] for field in remaining})
        if len(remaining) == 1 and isinstance(quiet, Refusal) and "'int' object" in quiet.reason:
            no_numbers.add(remaining[0][-1])  # Python's message: the field is no number
        return quiet is True

    matter = set(may_matter(list(values), in_vain))
    return {field for field in values if field not in matter or field[-1] in no_numbers}


def may_matter(
    paths: Sequence[FieldPath], in_vain: Callable[[Sequence[FieldPath]], bool]
) -> Iterator[FieldPath]:
    """Yield the fields that can change the result, in order (bisection).

    Args:
        paths: the fields.
        in_vain: True if the given fields change nothing when all of them are set.
    """
    if not paths or in_vain(paths):
        return
    if len(paths) == 1:
        yield paths[0]
        return
    half = len(paths) // 2
    yield from may_matter(paths[:half], in_vain)
    yield from may_matter(paths[half:], in_vain)


def each_of(
    study: Study, values: Mapping[FieldPath, int], moved: Mapping[FieldPath, Sizes]
) -> Iterator[tuple[FieldPath, int, Sizes]]:
    """Yield each field with its value and the sizes that it changes there.

    Fields that changed no quantity in common go in one build. A field that has to be built alone is
    left out.

    Args:
        study: builds the class.
        values: a value for each field.
        moved: for each field, the sizes that it changed at another value.
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
        yield from _told_apart(study, group, values, moved)


def _told_apart(
    study: Study,
    group: Sequence[FieldPath],
    values: Mapping[FieldPath, int],
    moved: Mapping[FieldPath, Sizes],
) -> Iterator[tuple[FieldPath, int, Sizes]]:
    """Yield what each field of a group changes, from one build of all of them.

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
        yield from _told_apart(study, group[:half], values, moved)
        yield from _told_apart(study, group[half:], values, moved)
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
    blind = {
        field: unobserved
        for field, points in probes.items()
        if (
            unobserved := {
                key for key in hidden_counts if all(point.sizes.get(key) == 0 for point in points)
            }
        )
    }
    moved = {
        field: {key for point in points for key in point.sizes} for field, points in probes.items()
    }
    for count, width in permutations(blind, 2):
        keys = {
            key
            for key in hidden_counts & blind[count] & blind[width]
            if (f"{key[0]}.weight", 0) in moved[width]
            and not {(f"{key[0]}.weight", 0), (f"{key[0]}.weight", 1)} & moved[count]
        }
        sizes = study.at({count: 2 * values[count], width: 2 * values[width]}) if keys else None
        if not isinstance(sizes, dict):
            continue
        for key in (key for key in keys if sizes.get(key) == 2 * study.base[key]):
            hidden_counts.discard(key)
            for point in probes[count]:
                share = Fraction(point.value * study.base[key], values[count])
                point.sizes[key] = int(share) if share.denominator == 1 else 0
            for point in probes[width]:
                del point.sizes[key]


def _hidden_heads(study: Study, probes: Mapping[FieldPath, Sequence[Probe]]) -> set[Quantity]:
    """Return the head counts that no probe of any field is seen to change."""
    sizes = [point.sizes for points in probes.values() for point in points]
    return {
        key
        for key in study.base
        if isinstance(key[1], str) and not any(changed.get(key) for changed in sizes)
    }
