"""Smaller images for a tiny copy: sizes in its config that set no width, and what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .fit import value_at
from .input_shapes import IMAGE_SIZES
from .learn import ConfigMap
from .reference import FieldPath, config_json, with_values

_IMAGES = (64, 96, 128)
_WINDOW = "window_size"
_PATCH = "patch_size"
_CROPS = "image_grid_pinpoints"


def smaller_images(known: ConfigMap, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Configs for smaller images, where their size sets no width; windows in proportion (Swin).

    Where a size that sets one stands beside others that do not, all go together, and the numbers of
    patches that follow (SAM).
    """
    whole = config_json(known.builder.config(data), use_diff=False)
    found: dict[FieldPath, int] = {}
    windows: dict[FieldPath, int] = {}

    def visit(node: Any, path: FieldPath) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            sides = value if isinstance(value, list) else [value]
            if key in (*IMAGE_SIZES, _WINDOW) and all(type(side) is int for side in sides):
                numbered = isinstance(value, list)
                into = windows if key == _WINDOW else found
                into.update({(*path, key, *([n] * numbered)): s for n, s in enumerate(sides)})
            visit(value, (*path, key))

    visit(whole, ())
    found = {p: side for p, side in found.items() if side > _IMAGES[0]}
    grids = _grids(known, max(found.values(), default=0))
    setting = {path: side for path, side in found.items() if path in known.sizes}
    if setting and (grids or len(found) > len(setting)):
        for size in _IMAGES:
            sides: dict[FieldPath, int] = {path: min(size, side) for path, side in found.items()}
            fewer = {path: size // patch for path, patch in grids.items()}
            yield with_values(data, {**sides, **fewer})
    found = {path: side for path, side in found.items() if path not in setting}
    lists = {path[:-1] for path in (*found, *windows) if isinstance(path[-1], int)}
    data = with_values(data, {path: value_at(whole, path) for path in lists})
    largest = max(found.values(), default=0)
    for size in _IMAGES if found else ():
        small = with_values(data, {path: min(size, side) for path, side in found.items()})
        yield small
        narrow: dict[FieldPath, int | None] = {
            path: max(2, side * size // largest) for path, side in windows.items() if side
        }
        if narrow:
            yield with_values(small, narrow)


def _grids(known: ConfigMap, image: int) -> dict[FieldPath, int]:
    """Fields that count the patches along an image without setting a width, and a patch's side."""
    patches = {side for path, side in known.sizes.items() if path[-1] == _PATCH}
    patches = {side for side in patches if 1 < side < image and image % side == 0}
    sides = {image // patch: patch for patch in patches}
    return {path: sides[value] for path, value in known.silent.items() if value in sides}


def crops(data: dict[str, Any], change: dict[FieldPath, int]) -> dict[FieldPath, int]:
    """The sizes of images that are cut into parts of the image size, as many parts as before."""
    sizes = [path for path in change if path[-1] == "image_size"]
    return {
        (_CROPS, row, side): length * change[path] // value_at(data, path)
        for path in sizes[:1]
        for row, lengths in enumerate(data.get(_CROPS) or ())
        for side, length in enumerate(lengths)
    }
