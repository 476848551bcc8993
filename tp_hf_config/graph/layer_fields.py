"""Fields that single layers may have of their own, and models with entries for all layers."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from ..fieldmap.field_map import FieldMap, Quantity
from ..fieldmap.learn_field_map import build_live
from ..fieldmap.model_view import entangled_fields, uniform_map
from ..model.config_json import EntryOfKind, FieldPath, config_json, field_name
from ..model.layer_class import layer_lists
from ..model.layer_entries import (
    KEY,
    LayerList,
    ListedLayers,
    entries_supported,
    layer_lists_of,
    layer_number,
    shared_field,
)
from ..model.locate import find_pretrained
from ..twin.layout import TinyGroup
from .experiments import experiments_of

# a tensor's name up to the number of its outermost layer
_OUTERMOST = re.compile(r".*?\.\d+(?=\.)")
# modules that another process cannot import: Transformers' code cache, scripts
_NO_PACKAGES = ("transformers_modules", "__main__")
_listed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def layers_listed(module: nn.Module, per_layer: bool = True) -> Iterator[None]:
    """Give every layer its own config entries while open; afterwards, keep those that differ.

    The model computes the same. If all layers agree, it has its stock class and previous config
    again. Without ``per_layer``, nothing happens unless the layers differ already. Raises
    ``UnsupportedModelError`` if no layer can have entries.
    """
    model: Any = find_pretrained(module)[1]
    if model in _listed or not (per_layer or layer_lists(type(model))):
        yield
        return
    listed = ListedLayers(model, _keys(model))
    listed.open()
    _listed.add(model)
    try:
        yield
    finally:
        _listed.discard(model)
        listed.close()


def fields_named(field_map: FieldMap) -> Callable[[str], Sequence[str]]:
    """Return a function: a field's name -> the fields it means, possibly one per layer."""
    own: dict[str, list[str]] = {}
    for field in field_map.values:
        if isinstance(field[-1], EntryOfKind):  # a list with one entry per layer (Laguna)
            own.setdefault(field_name(field[:-1]), []).append(field_name(field))
        if layer_number(field) is not None:
            # else it sets other layers' widths: a stock class may have entries for some (Gemma 4)
            if shared_field(field) not in field_map.values:
                own.setdefault(field_name(shared_field(field)), []).append(field_name(field))
            # users may write layer numbers without leading zeros
            unpadded = tuple(
                key.lstrip("0") or "0" if key.isdigit() else key for key in map(str, field)
            )
            own.setdefault(field_name(unpadded), []).append(field_name(field))
    return lambda name: own.get(name, [name])


def _keys(model: Any) -> dict[FieldPath, dict[str, int]]:
    """Return config path -> fields of single layers, built from entries, with values; or raise."""
    name = type(model).__name__
    if not entries_supported():
        raise UnsupportedModelError(
            f"per_layer=True: {name} needs a config with {KEY}, which Transformers reads from 5.15 "
            "on. Install a newer version, or leave per_layer=True out"
        )
    lists = layer_lists_of(model)
    if not lists:
        raise UnsupportedModelError(
            f"per_layer=True: {name} has no list of layers that are built from the config and "
            "counted by one of its fields (num_hidden_layers). Leave per_layer=True out"
        )
    if not layer_lists(type(model)):
        _check_importable(model)
    field_map = uniform_map(build_live(model)[0], config_json(model.config, use_diff=False))
    inside = _fields_inside(field_map, model, lists) - entangled_fields(field_map)
    keys: dict[FieldPath, dict[str, int]] = {}
    for finding in experiments_of(field_map).findings:
        alone = all(_in_single_layer(group) for group in finding.groups)
        if finding.reason is None and alone and inside >= set(finding.fields):
            for field in finding.fields:
                keys.setdefault(field[:-1], {})[str(field[-1])] = field_map.values[field]
    if not keys:
        raise UnsupportedModelError(
            f"per_layer=True: {name} has no width that {type(model.config).__name__} could set for "
            "each layer separately. Leave per_layer=True out"
        )
    return keys


def _check_importable(model: Any) -> None:
    """Raise if the generated class file cannot import the model's or a layer's class."""
    layers = [cls for found in layer_lists_of(model) for cls in found.classes]
    for cls in (type(model), type(model.base_model), *layers):
        package = cls.__module__.partition(".")[0]
        if package in _NO_PACKAGES:
            where = "in code that came with the model" if package != "__main__" else "in a script"
            raise UnsupportedModelError(
                f"per_layer=True: {cls.__name__} is defined {where} ({cls.__module__}), from where "
                "a saved model cannot import it. Leave per_layer=True out, or put the class into "
                "an installed package"
            )


def _in_single_layer(group: TinyGroup) -> bool:
    """True if all dims of a group are in one layer of one list."""
    # T5's heads are not: all layers share the first layer's position bias
    layers = {_OUTERMOST.match(dim.name) for dim in group.dims}
    return None not in layers and len({layer[0] for layer in layers if layer is not None}) == 1


def _fields_inside(field_map: FieldMap, model: Any, lists: Sequence[LayerList]) -> set[FieldPath]:
    """Return the fields that set sizes only inside layers that can be built from entries."""
    prefix = model.base_model_prefix if model.base_model is not model else ""
    beginnings: dict[FieldPath, list[str]] = {}
    for found in lists:
        beginnings.setdefault(found.config_path, []).append(f"{prefix}.{found.name}.".lstrip("."))
    set_by: dict[Quantity, Collection[FieldPath]] = {
        **{key: expression.fields for key, expression in field_map.expressions.items()},
        **{key: power.fields for key, power in field_map.powers.items()},
        **field_map.unfitted,
    }
    pairs = [(name, field) for (name, _), fields in set_by.items() for field in fields]
    outside = {f for name, f in pairs if not name.startswith(tuple(beginnings.get(f[:-1], ())))}
    inside = {field for _, field in pairs} - outside
    return {field for field in inside & field_map.values.keys() if isinstance(field[-1], str)}
