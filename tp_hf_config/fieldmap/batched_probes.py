"""Ask about several fields in one build: which matter, and which head counts they show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import permutations
from typing import TYPE_CHECKING, TypeVar

from ..model.config_json import FieldPath

if TYPE_CHECKING:
    from .expressions import Quantity
    from .probe import Probe, Study

_Fields = TypeVar("_Fields")


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
