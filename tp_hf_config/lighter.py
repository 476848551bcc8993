"""Less for a tiny copy to compute: widths that shrink in proportion, sizes that set no width."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from .fit import value_at
from .heads import Layout
from .images import smaller_images
from .learn import ConfigMap
from .reference import FieldPath, with_values

Seen = Callable[[dict[str, Any]], Layout | None]
"""How a forward pass of the class goes with a config; ``None``: not as far as it should."""

_HEAVY = 3_000_000
"""Numbers that one forward pass may make: more, and hundreds of passes take minutes."""
_WORTH = 0.9
_FEWEST = 4
_SHORTEST = 8
_PARTS = (64, 32, 16, 8, 4, 2)


def in_proportion(known: ConfigMap, data: dict[str, Any], seen: Seen) -> dict[str, Any]:
    """Widths that the class takes no other value of alone (Mamba 2), with one that goes along.

    What was larger than another width stays larger: there are several heads in each group of them.
    """

    def in_order(trial: dict[str, Any], paths: Collection[FieldPath]) -> bool:
        return all(
            value_at(trial, path) > value_at(trial, other)
            for path in paths
            for other in known.sizes
            if known.sizes[path] > known.sizes[other]
        )

    pairs = [(path, other) for path, others in known.bound.items() for other in others]
    before: dict[str, Any] = {}
    while data != before:  # what another is larger than may be smaller now
        before = data
        for path, other in pairs:
            values = (int(value_at(data, path)), int(value_at(data, other)))
            trials = (
                with_values(data, {path: values[0] // part, other: values[1] // part})
                for part in _PARTS
                if not any(value % part for value in values) and min(values) // part >= _FEWEST
            )
            fitting = (trial for trial in trials if in_order(trial, (path, other)))
            data = next((trial for trial in fitting if seen(trial)), data)
    return data


def lighter(
    known: ConfigMap, data: dict[str, Any], most: int, seen: Seen, rows: Collection[FieldPath] = ()
) -> dict[str, Any]:
    """Lower sizes that set no width (Mamba's chunks, tokens of an image) in a class that is slow.

    Args:
        known: the map of the class.
        data: the config so far.
        most: experts that there are; so small a number may be how many of them a token takes.
        seen: how a forward pass goes.
        rows: fields that count positions alone; of some, that is how long the inputs are (Whisper).
    """
    best = seen(data)
    for paths in _together({path: known.sizes[path] for path in rows} | known.silent):
        if best is None or best.numbers <= _HEAVY:
            break
        for trial in _lower(data, paths, max(most + 1, _SHORTEST)):
            now = seen(trial)
            if now is not None and now.numbers < _WORTH * best.numbers:
                data, best = trial, now
    if best is not None and best.numbers > _HEAVY:
        data = next((one for one in smaller_images(known, data) if seen(one)), data)
        data = _fewer_parts(known, data, seen)
    return data


def _fewer_parts(known: ConfigMap, data: dict[str, Any], seen: Seen) -> dict[str, Any]:
    """Sizes as they were of which less is more to compute: the patches of an image (LayoutLMv3)."""
    best = seen(data)
    for path, value in known.sizes.items():
        if best is None or best.numbers <= _HEAVY:
            break
        now = seen(whole) if (whole := with_values(data, {path: value})) != data else None
        if now is not None and now.numbers < best.numbers / 2:
            data, best = whole, now
    return data


def _together(sizes: dict[FieldPath, int]) -> list[list[FieldPath]]:
    """Fields, largest first; entries of one list as one where they are equal."""
    found: dict[tuple[FieldPath, int], list[FieldPath]] = {}
    for path, value in sizes.items():
        listed = isinstance(path[-1], int)  # one for each layer
        found.setdefault((path[:-1] if listed else path, value), []).append(path)
    return [found[key] for key in sorted(found, key=lambda key: -key[1])]


def _lower(data: dict[str, Any], paths: list[FieldPath], least: int) -> Iterator[dict[str, Any]]:
    """Configs with less of one size: a sixteenth, a quarter, half, but no less than ``least``."""
    value = value_at(data, paths[0])
    for part in (16, 4, 2):
        if type(value) is int and not value % part and value // part >= least:
            yield with_values(data, dict.fromkeys(paths, value // part))
