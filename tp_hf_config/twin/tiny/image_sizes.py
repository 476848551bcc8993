"""Smaller images for a tiny model: image sizes in its config, and the numbers that follow them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...fieldmap.field_map import FieldMap
from ...forward.input_shapes import IMAGE_SIZES
from ...model.config_json import FieldPath, config_json, value_at, with_values

_IMAGES = (64, 96, 128)
"""Sides of an image to try, in pixels."""
_SHORTEST = 48
"""The shortest side of several in proportion."""
_WINDOW = "window_size"
_PATCH = "patch_size"
_CROPS = "image_grid_pinpoints"
_STRIDE = 32
"""The largest stride, in pixels, of a map of features."""
_PARTS = 4
"""A stride may be a number of these parts of a pixel: SAM 3 makes maps larger than its patches."""
_FACTORS = (16, 12, 8, 6, 4, 3, 2)
"""What an image and its maps of features are divided by together, the largest first."""


def smaller_images(field_map: FieldMap, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield configs for smaller images, with windows in proportion (Swin).

    First come configs in which all image sizes shrink together, with the numbers of patches that
    follow: where one of them sets a width and others, or such numbers, do not (SAM). Then come the
    sides of an image that is longer than wide, in proportion, where they set widths (SegGPT). Then
    only image sizes that set no width shrink.
    """
    whole = config_json(field_map.builder.config(data), use_diff=False)
    images: dict[FieldPath, int] = {}
    windows: dict[FieldPath, int] = {}

    def visit(node: Any, field: FieldPath) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            sides = value if isinstance(value, list) else [value]
            if key in (*IMAGE_SIZES, _WINDOW) and all(type(side) is int for side in sides):
                numbered = isinstance(value, list)
                into = windows if key == _WINDOW else images
                into.update({(*field, key, *([n] * numbered)): s for n, s in enumerate(sides)})
            visit(value, (*field, key))

    visit(whole, ())
    images = {p: side for p, side in images.items() if side > _IMAGES[0]}
    grids = _grids(field_map, max(images.values(), default=0))
    setting = {field: side for field, side in images.items() if field in field_map.sizes}
    if setting and (grids or len(images) > len(setting)):
        for size in _IMAGES:
            sides: dict[FieldPath, int] = {field: min(size, side) for field, side in images.items()}
            fewer = {field: size // patch for field, patch in grids.items()}
            yield with_values(data, {**sides, **fewer})
    shortest = min(setting.values(), default=1)
    for size in _shorter(setting.values()) if len(set(setting.values())) > 1 else ():
        yield with_values(data, {field: side * size // shortest for field, side in setting.items()})
    images = {field: side for field, side in images.items() if field not in setting}
    lists = {field[:-1] for field in (*images, *windows) if isinstance(field[-1], int)}
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
    """Return what the shortest of several sides may become, the shortest first.

    Where it divides all of them, there are as many patches of each as before, in proportion: one
    tower's map of features fits the positions of the next (Unlimited-OCR).
    """
    shortest = min(sides)
    whole = {shortest // n for n in _FACTORS if not any(side % n for side in sides)}
    return sorted({*_IMAGES, *(side for side in whole if _SHORTEST <= side <= _IMAGES[-1])})


def images_in_proportion(
    field_map: FieldMap, data: dict[str, Any], numbers: Mapping[FieldPath, int]
) -> Iterator[dict[str, Any]]:
    """Yield configs with smaller images and all numbers in proportion to them (SAM 2's maps).

    Such a number is the length of a map of features: the side of an image divided by some stride.

    Args:
        field_map: the field map of the class.
        data: the config.
        numbers: fields that set no width, with their values at full size.
    """
    whole = config_json(field_map.builder.config(data), use_diff=False)
    fields = [field for field in {**numbers, **field_map.sizes} if is_side(field)]
    sides = {field: side for field in fields if type(side := value_at(whole, field)) is int}
    largest = max(sides.values(), default=0)
    maps = {
        field: value
        for field in numbers
        if field not in sides
        and not _is_patch(field)
        and type(value := value_at(whole, field)) is int
        and _PARTS * largest % value == 0
        and largest <= _STRIDE * value
    }
    following = {field: side for field, side in {**sides, **maps}.items() if side > 1}
    lists = {field[:-1] for field in following if isinstance(field[-1], int)}
    data = with_values(data, {field: value_at(whole, field) for field in _outermost(lists)})
    for factor in _FACTORS if sides else ():
        if largest // factor >= _IMAGES[0] and not any(n % factor for n in following.values()):
            yield with_values(data, {field: n // factor for field, n in following.items()})


def is_side(field: FieldPath) -> bool:
    """True if a field is the side of an image, by its name."""
    return any(key in IMAGE_SIZES for key in field[-2:])


def _is_patch(field: FieldPath) -> bool:
    """True if a field is the side of a patch, by its name."""
    return any(key == _PATCH for key in field[-2:])


def _outermost(lists: Collection[FieldPath]) -> set[FieldPath]:
    """Return the lists that are in none of the others."""
    return {field for field in lists if not any(field[:n] in lists for n in range(1, len(field)))}


def _grids(field_map: FieldMap, image: int) -> dict[FieldPath, int]:
    """Return the fields that count patches along an image and set no width, with a patch's side."""
    patches = {side for field, side in field_map.sizes.items() if field[-1] == _PATCH}
    patches = {side for side in patches if 1 < side < image and image % side == 0}
    sides = {image // patch: patch for patch in patches}
    return {
        field: sides[value] for field, value in field_map.non_size_fields.items() if value in sides
    }


def crops(data: dict[str, Any], change: dict[FieldPath, int]) -> dict[FieldPath, int]:
    """Return the image sizes that crops are cut from, for a change of the size of a crop.

    They change in proportion, so that there are as many crops as before.
    """
    sizes = [field for field in change if field[-1] == "image_size"]
    return {
        (_CROPS, row, side): length * change[field] // value_at(data, field)
        for field in sizes[:1]
        for row, lengths in enumerate(data.get(_CROPS) or ())
        for side, length in enumerate(lengths)
    }
