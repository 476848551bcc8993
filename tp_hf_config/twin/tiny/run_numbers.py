"""Make a tiny model that is still slow cheaper, by numbers that only its forward pass shows.

How many objects a detector looks for, or how many frames it makes of a sound, is read while it
runs. Such numbers set no tensor. They are lowered only where a pass computes far too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ...fieldmap.candidate_fields import numbers_read
from ...fieldmap.field_map import FieldMap
from ...forward.head_splits import observe
from ...forward.run_recipe import RunRecipe
from ...model.build import Refusal
from ...model.config_json import FieldPath, value_at, with_values
from .compute_budget import SHORTEST, WORTH, Observe, lowered
from .image_sizes import images_in_proportion, is_side, smaller_images
from .requirements import Requirements, goes_as_far

_SLOW = 6_000_000
"""A pass that computes more numbers than this is slow: one takes 0.1 s, and hundreds are run."""
_VERY_SLOW = 40_000_000
"""A pass of so many numbers takes a tenth of a second."""
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
    before = observed(data)
    if before is None or before.numbers <= _SLOW:
        return data
    read = field_map.non_size_fields | numbers_read(
        field_map.builder, data, lambda model: observe(model, field_map.recipe)
    )
    idle = {field: n for field, n in read.items() if field not in field_map.sizes}
    for trial in images_in_proportion(field_map, data, idle):
        candidate = observed(trial)
        if candidate is not None and candidate.numbers < WORTH * before.numbers:
            data = trial
            break
    counts = [field for field in idle if not is_side(field)]
    numbers = _equal_values(data, [*rows, *counts])
    return lowered(data, numbers, partial(_divisors, least=max(most + 1, SHORTEST)), observed)


def with_few_objects(
    field_map: FieldMap,
    data: dict[str, Any],
    most: int,
    required: Requirements,
    rows: Collection[FieldPath],
) -> dict[str, Any]:
    """Return the config with fewer objects to look for, if a smaller image is enough for these.

    A detector takes the best of all places as its objects, so an image needs as many places. Where
    an earlier form of inputs has enough of them now, ``required`` runs that from here on. For
    ``most`` and ``rows`` see :func:`cheaper`.
    """

    def in_small_image(config: dict[str, Any]) -> float:
        """Return how many numbers a pass computes with the smallest image that the class takes."""
        images = map(required.observed, smaller_images(field_map, config))
        return next((observed.numbers for observed in images if observed is not None), math.inf)

    before = required.observed(data)
    slow = before is not None and before.numbers > _SLOW
    for fields in _equal_values(data, rows) if slow else ():
        trials = _divisors(data, fields, max(most + 1, SHORTEST))
        trial = next(filter(required.observed, trials), None)
        model = None if trial is None else field_map.builder.build(trial)
        if trial is None or model is None or isinstance(model, Refusal):
            continue
        recipe = with_smaller_inputs(model, required.recipe)
        if recipe != required.recipe:
            required.run_with(recipe)
            data = trial
        elif in_small_image(trial) < WORTH * in_small_image(data):
            data = trial
    return data


def with_equal_values(
    data: dict[str, Any],
    widths: Collection[FieldPath],
    lower: Callable[[dict[str, Any], FieldPath], Iterator[dict[FieldPath, int]]],
    required: Requirements,
) -> dict[str, Any]:
    """Return the config with widths that are as large as others, if it is very slow to run.

    Widths differ in a tiny model while there are values, but where each stage is twice as wide as
    the one before (VibeVoice's seven), the first one decides over millions of parameters.
    ``lower`` yields changes of a width to lower values, the lowest first.
    """
    best = required.cost(data)
    if not _VERY_SLOW < best < math.inf:
        return data
    narrowest = data
    for field in widths:
        narrowest = with_values(narrowest, next(lower(narrowest, field), {}))
    if WORTH * best <= required.cost(narrowest) < math.inf:
        return data  # what no field sets decides
    for field in widths:
        for change in lower(data, field) if best > _VERY_SLOW else ():
            trial = with_values(data, change)
            cost = required.cost(trial)
            if cost < WORTH * best:
                data, best = trial, cost
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
