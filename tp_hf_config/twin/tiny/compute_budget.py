"""Make a tiny model cheap to run: shrink widths in proportion, and sizes that set no width."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ...fieldmap.field_map import FieldMap, nonlinear_fields
from ...fieldmap.learn_field_map import numbers_read
from ...fieldmap.probe import may_matter
from ...forward.head_splits import HeadSplits, observe
from ...forward.input_shapes import IMAGE_SIZES
from ...forward.run_recipe import RunRecipe
from ...model.build import Refusal
from ...model.config_json import FieldPath, config_json, plain_fields, value_at, with_values
from .requirements import Requirements, goes_as_far

# runs a config and returns its head splits; None: it lacks something that is required
Observe = Callable[[dict[str, Any]], HeadSplits | None]
_HEAVY = 3_000_000  # numbers that one pass may compute: with more, hundreds of passes take minutes
WORTH = 0.9  # a lower size is kept if it leaves less than this share of the numbers to compute
_FEWEST = 4  # the smallest value of a width that shrinks in proportion
SHORTEST = 8  # the smallest value of a size that sets no width
PARTS = (64, 32, 16, 8, 4, 2)  # divisors of a width together with another number


def in_proportion(field_map: FieldMap, data: dict[str, Any], observe: Observe) -> dict[str, Any]:
    """Return the config with smaller widths that the class accepts only in proportion (Mamba 2)."""

    def in_order(trial: dict[str, Any], paths: Collection[FieldPath]) -> bool:
        return all(  # several heads in each group remain several
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
    """Return the config with lower sizes that set no width (Mamba's chunks), if it is slow.

    ``rows`` are fields that only count positions; some set the length of the inputs (Whisper).
    """
    sizes = {field: field_map.sizes[field] for field in rows} | field_map.non_size_fields
    # above the largest number of experts: a smaller number may be how many a token takes
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
    """Return the config with one size after the other lowered, until a pass is light.

    ``lower`` yields configs with lower values of fields that change together, the lowest first.
    """
    before = observe(data)
    if before is None:
        return data
    numbers = before.numbers

    def change_nothing(some: Sequence[list[FieldPath]]) -> bool:
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
    """Return the config with sizes at their old values where a smaller size costs more."""
    best = observe(data)
    # smaller patches are more patches of an image (LayoutLMv3)
    for field in _lengths(field_map):
        if best is None or best.numbers <= _HEAVY:
            break
        whole = with_values(data, {field: field_map.sizes[field]})
        candidate = observe(whole) if whole != data else None
        if candidate is not None and candidate.numbers < best.numbers / 2:
            data, best = whole, candidate
    return data


def _lengths(field_map: FieldMap) -> list[FieldPath]:
    """Return the fields that are no widths, of which lower values may cost more."""
    # lengths: of a kernel, not linear, or read by layers and returned by none (a patch's side)
    returned, lengths = set[FieldPath](), set(nonlinear_fields(field_map))
    for (_, which), expression in field_map.expressions.items():
        if which == 0:
            returned |= expression.fields
        elif isinstance(which, int) and which > 1:
            lengths |= expression.fields
    return [field for field in field_map.sizes if field in lengths or field not in returned]


def _changing_together(sizes: dict[FieldPath, int]) -> list[list[FieldPath]]:
    groups: dict[tuple[FieldPath, int], list[FieldPath]] = {}
    for field, value in sizes.items():
        listed = not isinstance(field[-1], str)  # one entry for each layer
        groups.setdefault((field[:-1] if listed else field, value), []).append(field)
    return [groups[key] for key in sorted(groups, key=lambda key: -key[1])]


def _lower(data: dict[str, Any], fields: list[FieldPath], least: int) -> Iterator[dict[str, Any]]:
    value = value_at(data, fields[0])
    for part in (16, 4, 2):
        if type(value) is int and not value % part and value // part >= least:
            yield with_values(data, dict.fromkeys(fields, value // part))


_SLOW = 6_000_000  # numbers of a slow pass: one takes 0.1 s, and hundreds are run
_VERY_SLOW = 40_000_000  # ``Requirements.cost`` of a pass that takes a tenth of a second
_MOST_TRIALS = 12  # lower values of one number that are tried, the smallest first


def cheaper(
    field_map: FieldMap,
    data: dict[str, Any],
    most: int,
    observed: Observe,
    rows: Collection[FieldPath] = (),
) -> dict[str, Any]:
    """Return the config with lower numbers that set no width, if its model is slow to run."""
    before = observed(data)
    if before is None or before.numbers <= _SLOW:
        return data
    running = numbers_read(field_map.builder, data, partial(observe, recipe=field_map.recipe))
    read = field_map.non_size_fields | running
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
    """Return the config with fewer objects to look for, if a smaller image has room for these."""

    def in_small_image(config: dict[str, Any]) -> float:
        images = map(required.observed, smaller_images(field_map, config))
        return next((observed.numbers for observed in images if observed is not None), math.inf)

    # a detector takes the best of all places as its objects, so an image needs as many places
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
            required.run_with(recipe)  # smaller inputs have enough places now
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
    """Return the config with widths that may equal others, if it is very slow to run."""
    # with each stage twice as wide as the last (VibeVoice's seven), the first sets the cost
    best = required.cost(data)
    if not _VERY_SLOW < best < math.inf:
        return data
    narrowest = data
    for field in widths:
        narrowest = with_values(narrowest, next(lower(narrowest, field), {}))
    if WORTH * best <= required.cost(narrowest) < math.inf:
        return data  # most of the cost is set by no field
    for field in widths:
        for change in lower(data, field) if best > _VERY_SLOW else ():
            trial = with_values(data, change)
            cost = required.cost(trial)
            if cost < WORTH * best:
                data, best = trial, cost
                break
    return data


def with_smaller_inputs(model: nn.Module, recipe: RunRecipe) -> RunRecipe:
    """Return the recipe with smaller inputs if the model is slow and still runs as far."""
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
    groups: dict[int, list[FieldPath]] = {}
    for field in dict.fromkeys(fields):
        value = value_at(data, field)
        if type(value) is int:
            groups.setdefault(value, []).append(field)
    return [groups[value] for value in sorted(groups, reverse=True)]


def _divisors(
    data: dict[str, Any], fields: list[FieldPath], least: int
) -> Iterator[dict[str, Any]]:
    """Yield configs with a number at its divisors from ``least`` on, the smallest first."""
    value = value_at(data, fields[0])
    smaller = [part for part in range(least, value // 2 + 1) if value % part == 0]
    for part in smaller[:_MOST_TRIALS]:
        yield with_values(data, dict.fromkeys(fields, part))
    for field in fields if len(fields) > 1 else ():
        for part in smaller[: _MOST_TRIALS // 4]:
            yield with_values(data, {field: part})


_IMAGES = (64, 96, 128)  # sides of an image to try, in pixels
_SHORTEST = 48  # pixels; the shortest side of several in proportion
_WINDOW = "window_size"
_PATCH = "patch_size"
_CROPS = "image_grid_pinpoints"
_STRIDE = 32  # pixels; the largest stride of a map of features
_PARTS = 4  # a stride may be in quarters of a pixel: SAM 3 makes maps larger than its patches
_FACTORS = (16, 12, 8, 6, 4, 3, 2)  # divisors of an image together with its maps of features


def smaller_images(field_map: FieldMap, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield configs for smaller images, with windows in proportion (Swin)."""
    whole = config_json(field_map.builder.config(data), use_diff=False)
    images: dict[FieldPath, int] = {}
    windows: dict[FieldPath, int] = {}
    for field, value in plain_fields(whole):
        numbers = value if isinstance(value, list) else [value]
        if field[-1] in (*IMAGE_SIZES, _WINDOW) and all(type(side) is int for side in numbers):
            numbered = isinstance(value, list)
            into = windows if field[-1] == _WINDOW else images
            into.update({(*field, *([n] * numbered)): s for n, s in enumerate(numbers)})
    images = {p: side for p, side in images.items() if side > _IMAGES[0]}
    grids = _grids(field_map, max(images.values(), default=0))
    setting = {field: side for field, side in images.items() if field in field_map.sizes}
    # all sizes together, with the numbers of patches, if only some set a width (SAM)
    if setting and (grids or len(images) > len(setting)):
        for size in _IMAGES:
            sides: dict[FieldPath, int] = {field: min(size, side) for field, side in images.items()}
            fewer = {field: size // patch for field, patch in grids.items()}
            yield with_values(data, {**sides, **fewer})
    shortest = min(setting.values(), default=1)
    # the sides of an image that is not square, if they set widths (SegGPT)
    for size in _shorter(setting.values()) if len(set(setting.values())) > 1 else ():
        yield with_values(data, {field: side * size // shortest for field, side in setting.items()})
    images = {field: side for field, side in images.items() if field not in setting}
    lists = {field[:-1] for field in (*images, *windows) if not isinstance(field[-1], str)}
    data = with_values(data, {field: value_at(whole, field) for field in lists})
    largest = max(images.values(), default=0)
    for size in _IMAGES if images else ():
        small = with_values(data, {field: min(size, side) for field, side in images.items()})
        yield small
        narrow: dict[FieldPath, int | None] = {
            field: max(2, side * size // largest) for field, side in windows.items() if side
        }
        if narrow:
            yield with_values(small, narrow)


def _shorter(sides: Collection[int]) -> list[int]:
    """Return what the shortest of several sides may become, the shortest first."""
    # A divisor of all sides keeps the numbers of patches in proportion: one tower's map of features
    # fits the positions of the next (Unlimited-OCR).
    shortest = min(sides)
    whole = {shortest // n for n in _FACTORS if not any(side % n for side in sides)}
    return sorted({*_IMAGES, *(side for side in whole if _SHORTEST <= side <= _IMAGES[-1])})


def images_in_proportion(
    field_map: FieldMap, data: dict[str, Any], numbers: Mapping[FieldPath, int]
) -> Iterator[dict[str, Any]]:
    """Yield configs with smaller images and all numbers in proportion to them (SAM 2's maps)."""
    whole = config_json(field_map.builder.config(data), use_diff=False)
    fields = [field for field in {**numbers, **field_map.sizes} if is_side(field)]
    sides = {field: side for field in fields if type(side := value_at(whole, field)) is int}
    largest = max(sides.values(), default=0)
    maps = {
        field: value
        for field in numbers
        if field not in sides
        and _PATCH not in field[-2:]
        and type(value := value_at(whole, field)) is int
        and _PARTS * largest % value == 0  # a map's length: the image's side over some stride
        and largest <= _STRIDE * value
    }
    following = {field: side for field, side in {**sides, **maps}.items() if side > 1}
    lists = {field[:-1] for field in following if not isinstance(field[-1], str)}
    lists -= {field for field in lists if any(field[:n] in lists for n in range(1, len(field)))}
    data = with_values(data, {field: value_at(whole, field) for field in lists})
    for factor in _FACTORS if sides else ():
        if largest // factor >= _IMAGES[0] and not any(n % factor for n in following.values()):
            yield with_values(data, {field: n // factor for field, n in following.items()})


def is_side(field: FieldPath) -> bool:
    return any(key in IMAGE_SIZES for key in field[-2:])


def _grids(field_map: FieldMap, image: int) -> dict[FieldPath, int]:
    """Return the fields that count patches along an image and set no width -> a patch's side."""
    patches = {side for field, side in field_map.sizes.items() if field[-1] == _PATCH}
    patches = {side for side in patches if 1 < side < image and image % side == 0}
    sides = {image // patch: patch for patch in patches}
    return {
        field: sides[value] for field, value in field_map.non_size_fields.items() if value in sides
    }


def crops(data: dict[str, Any], change: dict[FieldPath, int]) -> dict[FieldPath, int]:
    """Return the image sizes that crops are cut from, in proportion to the new size of a crop."""
    sizes = [field for field in change if field[-1] == "image_size"]
    return {
        (_CROPS, row, side): length * change[field] // value_at(data, field)
        for field in sizes[:1]
        for row, lengths in enumerate(data.get(_CROPS) or ())
        for side, length in enumerate(lengths)
    }
