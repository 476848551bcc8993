"""Make a tiny model that is still slow cheaper, by numbers that only its forward pass shows.

How many objects a detector looks for, or how many frames it makes of a sound, is read while it
runs. Such numbers set no tensor. They are lowered only where a pass computes far too much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ...fieldmap.candidate_fields import numbers_read
from ...fieldmap.field_map import FieldMap
from ...forward.head_splits import observe
from ...forward.run_recipe import RunRecipe
from ...model.config_json import FieldPath, value_at, with_values
from .compute_budget import HEAVY, SHORTEST, WORTH, Observe
from .image_sizes import images_in_proportion, is_side
from .requirements import goes_as_far

_SLOW = 6_000_000
"""A pass that computes more numbers than this is slow: one takes 0.1 s, and hundreds are run."""
_MOST_TRIALS = 12
"""How many lower values of one number are tried, the smallest first."""


def cheaper(
    field_map: FieldMap,
    data: dict[str, Any],
    most: int,
    observed: Observe,
    rows: Collection[FieldPath] = (),
) -> dict[str, Any]:
    """Return the config with lower numbers that set no width, if its model is slow to run.

    First images shrink together with all numbers in proportion to them. Then every number that the
    class reads when it is built or when it runs goes down to a divisor of it. That has to be above
    ``most``, the largest number of experts. ``rows`` are fields that only count positions.
    """
    best = observed(data)
    if best is None or best.numbers <= _SLOW:
        return data
    read = field_map.non_size_fields | numbers_read(
        field_map.builder, data, lambda model: observe(model, field_map.recipe)
    )
    idle = {field: n for field, n in read.items() if field not in field_map.sizes}
    for trial in images_in_proportion(field_map, data, idle):
        candidate = observed(trial)
        if candidate is not None and candidate.numbers < WORTH * best.numbers:
            data, best = trial, candidate
            break
    counts = [field for field in idle if not is_side(field)]
    for fields in _equal_values(data, [*rows, *counts]):
        if best.numbers <= HEAVY:
            break
        for trial in _divisors(data, fields, max(most + 1, SHORTEST)):
            candidate = observed(trial)
            if candidate is not None and candidate.numbers < WORTH * best.numbers:
                data, best = trial, candidate
                break
    return data


def with_smaller_inputs(model: nn.Module, recipe: RunRecipe) -> RunRecipe:
    """Return how to run a model on the meta device, with an earlier form of inputs if it is slow.

    A class may need a large image at its own sizes, where a tiny model does with a small one: it
    looks for fewer objects than a small image has places.
    """
    if recipe.form == 0 or recipe.make_inputs is not None:
        return recipe
    before = observe(model, recipe)
    for form in range(recipe.form) if before.numbers > _SLOW else ():
        trial = replace(recipe, form=form)
        after = observe(model, trial)
        if after.numbers < WORTH * before.numbers and goes_as_far(before, after):
            return trial
    return recipe


def _equal_values(data: dict[str, Any], fields: Collection[FieldPath]) -> list[list[FieldPath]]:
    """Return the fields in lists, the largest values first; those of equal value change together.

    Fields that hold no whole number now are left out.
    """
    groups: dict[int, list[FieldPath]] = {}
    for field in dict.fromkeys(fields):
        value = value_at(data, field)
        if type(value) is int:
            groups.setdefault(value, []).append(field)
    return [groups[value] for value in sorted(groups, reverse=True)]


def _divisors(
    data: dict[str, Any], fields: list[FieldPath], least: int
) -> Iterator[dict[str, Any]]:
    """Yield configs with a number at its divisors from ``least`` on, the smallest first.

    Fields of equal value change together, or else each alone.
    """
    value = value_at(data, fields[0])
    smaller = [part for part in range(least, value // 2 + 1) if value % part == 0]
    for part in smaller[:_MOST_TRIALS]:
        yield with_values(data, dict.fromkeys(fields, part))
    for field in fields if len(fields) > 1 else ():
        for part in smaller[: _MOST_TRIALS // 4]:
            yield with_values(data, {field: part})
