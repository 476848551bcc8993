"""Make a tiny model cheap to run: shrink widths in proportion, and sizes that set no width."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from ...fieldmap.batched_probes import may_matter
from ...fieldmap.field_map import FieldMap, nonlinear_fields
from ...forward.head_splits import HeadSplits
from ...model.config_json import FieldPath, value_at, with_values
from .image_sizes import smaller_images

Observe = Callable[[dict[str, Any]], HeadSplits | None]
"""Runs a config and returns its head splits; ``None``: it lacks something that is required."""
_HEAVY = 3_000_000
"""How many numbers one forward pass may compute: with more, hundreds of passes take minutes."""
WORTH = 0.9
"""A lower size is kept if it leaves less than this share of the numbers to compute."""
_FEWEST = 4
"""The smallest value of a width that shrinks in proportion."""
SHORTEST = 8
"""The smallest value of a size that sets no width."""
PARTS = (64, 32, 16, 8, 4, 2)
"""What widths are divided by together with another number, the largest first."""


def in_proportion(field_map: FieldMap, data: dict[str, Any], observe: Observe) -> dict[str, Any]:
    """Return the config with smaller widths that the class takes only in proportion (Mamba 2).

    A field that was larger than another stays larger: there are several heads in each group.
    """

    def in_order(trial: dict[str, Any], paths: Collection[FieldPath]) -> bool:
        """True if these fields are still larger than all that they were larger than."""
        return all(
            value_at(trial, field) > value_at(trial, other)
            for field in paths
            for other in field_map.sizes
            if field_map.sizes[field] > field_map.sizes[other]
        )

    pairs = [
        (field, other) for field, others in field_map.ratio_partners.items() for other in others
    ]
    before: dict[str, Any] = {}
    while data != before:  # a field that another has to exceed may be smaller now
        before = data
        for field, other in pairs:
            values = (int(value_at(data, field)), int(value_at(data, other)))
            trials = (
                with_values(data, {field: values[0] // part, other: values[1] // part})
                for part in PARTS
                if not any(value % part for value in values) and min(values) // part >= _FEWEST
            )
            fitting = (trial for trial in trials if in_order(trial, (field, other)))
            data = next((trial for trial in fitting if observe(trial)), data)
    return data


def lighter(
    field_map: FieldMap,
    data: dict[str, Any],
    most: int,
    observe: Observe,
    rows: Collection[FieldPath] = (),
) -> dict[str, Any]:
    """Return the config with lower sizes that set no width, if the class is slow.

    Such sizes are Mamba's chunks, or the tokens of an image. They stay above ``most``, the largest
    number of experts, as a smaller one may be how many a token takes. ``rows`` are fields that only
    count positions; the inputs are as long as some of them (Whisper).
    """
    sizes = {field: field_map.sizes[field] for field in rows} | field_map.non_size_fields
    least = max(most + 1, SHORTEST)
    data = lowered(data, _changing_together(sizes), partial(_lower, least=least), observe)
    best = observe(data)
    if best is not None and best.numbers > _HEAVY:
        data = next((config for config in smaller_images(field_map, data) if observe(config)), data)
        data = _with_cheaper_values(field_map, data, observe)
    return data


def lowered(
    data: dict[str, Any],
    sizes: Sequence[list[FieldPath]],
    lower: Callable[[dict[str, Any], list[FieldPath]], Iterator[dict[str, Any]]],
    observe: Observe,
) -> dict[str, Any]:
    """Return the config with one size after the other lowered, until a pass computes little.

    ``lower`` yields configs with lower values of fields that change together, the lowest first. The
    first of these that spares enough is kept. What changes nothing at its lowest is asked about
    together with others (bisection).
    """
    before = observe(data)
    if before is None:
        return data
    numbers = before.numbers

    def change_nothing(some: Sequence[list[FieldPath]]) -> bool:
        """True if a pass computes as much with all of these at their lowest, or is light by now."""
        if numbers <= _HEAVY:
            return True
        trial = data
        for fields in some:
            trial = next(lower(trial, fields), trial)
        lowest = observe(trial)
        return lowest is not None and lowest.numbers == numbers

    for fields in may_matter(sizes, change_nothing):
        for trial in lower(data, fields):
            candidate = observe(trial)
            if candidate is not None and candidate.numbers < WORTH * numbers:
                data, numbers = trial, candidate.numbers
                break
    return data


def _with_cheaper_values(
    field_map: FieldMap, data: dict[str, Any], observe: Observe
) -> dict[str, Any]:
    """Return the config with sizes at their old values where a smaller size costs more.

    Smaller patches are more patches of an image (LayoutLMv3).
    """
    best = observe(data)
    for field in _lengths(field_map):
        if best is None or best.numbers <= _HEAVY:
            break
        whole = with_values(data, {field: field_map.sizes[field]})
        candidate = observe(whole) if whole != data else None
        if candidate is not None and candidate.numbers < best.numbers / 2:
            data, best = whole, candidate
    return data


def _lengths(field_map: FieldMap) -> list[FieldPath]:
    """Return the fields that are no widths: of a lower one, a class may compute more.

    They set how long a kernel is, a size along no straight line, or what layers read and no layer
    returns. The patches of an image or a sound do, of which there are more if they are smaller.
    """
    returned, lengths = set[FieldPath](), set(nonlinear_fields(field_map))
    for (_, which), expression in field_map.expressions.items():
        if which == 0:
            returned |= expression.fields
        elif isinstance(which, int) and which > 1:
            lengths |= expression.fields
    return [field for field in field_map.sizes if field in lengths or field not in returned]


def _changing_together(sizes: dict[FieldPath, int]) -> list[list[FieldPath]]:
    """Return the fields in lists, the largest first; equal entries of one list change together."""
    groups: dict[tuple[FieldPath, int], list[FieldPath]] = {}
    for field, value in sizes.items():
        listed = isinstance(field[-1], int)  # one entry for each layer
        groups.setdefault((field[:-1] if listed else field, value), []).append(field)
    return [groups[key] for key in sorted(groups, key=lambda key: -key[1])]


def _lower(data: dict[str, Any], fields: list[FieldPath], least: int) -> Iterator[dict[str, Any]]:
    """Yield configs with a size at a sixteenth, a quarter and half, but not below ``least``."""
    value = value_at(data, fields[0])
    for part in (16, 4, 2):
        if type(value) is int and not value % part and value // part >= least:
            yield with_values(data, dict.fromkeys(fields, value // part))
