"""Foretell how much memory ``calibrate`` takes, without weights and without data."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import CalibrationError
from ..fieldmap.field_map import FieldMap
from ..graph.edits import stack_dim
from ..graph.experiments import experiments_of
from ..model.build import Refusal
from ..model.class_digest import entry_key
from ..model.disk_cache import load, store
from .measure import measure

_Place = tuple[str, int, bool]
"""A shallow model's parameter, the dimension that is read along, and whether it is a stack."""


def gram_bytes(field_map: FieldMap, full: nn.Module) -> int | None:
    """Return how many bytes the Gram matrices of all weights of a model take.

    Which weights have one is seen in a pass of the class's tiny model, and kept on disk.

    Args:
        field_map: the field map of the model's class and config.
        full: the class with all layers, on any device.

    Returns:
        The bytes that ``calibrate(model).memory`` gives, if each Gram matrix fits in its memory
        and every expert gets tokens; ``None``: the tiny model does not run.
    """
    key = None
    if field_map.digest is not None:
        key = entry_key(field_map.digest, "weights with Gram matrices", field_map.data)
    places: list[_Place] | None = None if key is None else load(key)
    if places is None:
        places = _places(field_map)
        if key is not None and places is not None:
            store(key, places)
    return None if places is None else sum(_sizes(field_map, full, places))


def _places(field_map: FieldMap) -> list[_Place] | None:
    """Return what has a Gram matrix in the tiny model, by names of the shallow model."""
    tiny = experiments_of(field_map).tiny
    if isinstance(tiny, Refusal):
        return None
    try:
        readings = measure(tiny.model, [tiny.inputs], None, what="")
    except CalibrationError:
        return None
    depth = field_map.depth
    return sorted(
        {
            (depth.first(leader.parameter), leader.dim, leader.part is not None)
            for leader in readings.statistics
            if readings.needs_gram(leader)
        }
    )


def _sizes(field_map: FieldMap, full: nn.Module, places: Iterable[_Place]) -> Iterable[int]:
    """Yield the bytes of the Gram matrices of each parameter of a model."""
    by_name: dict[str, list[_Place]] = {}
    for place in places:
        by_name.setdefault(place[0], []).append(place)
    for name, parameter in full.named_parameters():
        for _, dim, stacked in by_name.get(field_map.depth.canonical(name), ()):
            parts = parameter.shape[stack_dim(parameter, dim)] if stacked else 1
            yield 4 * parts * int(parameter.shape[dim]) ** 2
