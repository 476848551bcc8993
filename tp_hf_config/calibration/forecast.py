"""Foretell how much memory ``calibrate`` takes, without weights and without data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..errors import CalibrationError
from ..fieldmap.field_map import FieldMap
from ..graph.edits import stack_dim
from ..graph.experiments import experiments_of
from ..model.build import Refusal
from ..model.disk_cache import entry_key, load, store
from .linear_ops import Consumer
from .measure import measure
from .readings import Readings

Sums = Literal["gram", "products", ""]
_Place = tuple[str, int, bool, Sums]


@dataclass(frozen=True)
class Input:
    """What a weight reads, at full size.

    Attributes:
        parameter: the weight's name.
        dim: its dimension of channels.
        parts: how many matrices it stacks (experts); 1: it is no stack.
        sums: what a refit needs of it: ``"gram"``: the Gram matrix; ``"products"``: behind a norm,
            products with what stays; ``""``: nothing, others read the same, or it is a table of
            embeddings too.
    """

    parameter: str
    dim: int
    parts: int
    sums: Sums


def gram_bytes(field_map: FieldMap, full: nn.Module) -> int | None:
    """Return how many bytes the Gram matrices of all weights of a model take.

    Args:
        field_map: the field map of the model's class and config.
        full: the class with all layers, on any device.

    Returns:
        The bytes that ``calibrate(model).memory`` gives, if each Gram matrix fits in its memory
        and every expert gets tokens; ``None``: the tiny model does not run.
    """
    inputs = inputs_of(field_map, full)
    if inputs is None:
        return None
    return sum(
        4 * each.parts * int(full.get_parameter(each.parameter).shape[each.dim]) ** 2
        for each in inputs
        if each.sums == "gram"
    )


def inputs_of(field_map: FieldMap, full: nn.Module) -> list[Input] | None:
    """Return what every weight of a model reads; ``None``: the tiny model does not run.

    It is seen in a pass of the class's tiny model, and kept on disk.

    Args:
        field_map: the field map of the model's class and config.
        full: the class with all layers, on any device.
    """
    key = None
    if field_map.digest is not None:
        key = entry_key(field_map.digest, "what weights read", field_map.data)
    places: list[_Place] | None = None if key is None else load(key)
    if places is None:
        places = _places(field_map)
        if key is not None and places is not None:
            store(key, places)
    return None if places is None else [*_at_full_size(field_map, full, places)]


def _places(field_map: FieldMap) -> list[_Place] | None:
    """Return what weights of the tiny model read, by names of the shallow model."""
    tiny = experiments_of(field_map).tiny
    if isinstance(tiny, Refusal):
        return None
    try:
        readings = measure(tiny.model, [tiny.inputs], None, what="")
    except CalibrationError:
        return None
    first = field_map.depth.first
    return sorted(
        {
            (first(c.parameter), c.dim, c.part is not None, _sums_of(c, readings))
            for c in readings.leaders
        }
    )


def _sums_of(consumer: Consumer, readings: Readings) -> Sums:
    """Return what a refit needs of what a consumer reads."""
    if readings.leaders[consumer] != consumer or consumer.parameter in readings.tables:
        return ""
    return "gram" if readings.needs_gram(consumer) else "products"


def _at_full_size(
    field_map: FieldMap, full: nn.Module, places: Iterable[_Place]
) -> Iterator[Input]:
    """Yield what the weights of a model with all layers read."""
    by_name: dict[str, list[_Place]] = {}
    for place in places:
        by_name.setdefault(place[0], []).append(place)
    for name, parameter in full.named_parameters():
        for _, dim, stacked, sums in by_name.get(field_map.depth.canonical(name), ()):
            parts = parameter.shape[stack_dim(parameter, dim)] if stacked else 1
            yield Input(name, dim, parts, sums)
