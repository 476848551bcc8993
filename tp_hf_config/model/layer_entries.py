"""Config entries for single layers (``per_layer_config``), for models whose layers differ.

During pruning, every layer has an entry for every setting that may differ, as a field of its own.
Between steps the config keeps only entries of settings that differ. If all layers agree, the model
has its stock class again, and its config has no entries.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .build import Builder, Refusal
from .config_json import FieldPath, config_json, config_nodes
from .layer_class import (
    auto_map,
    generated_classes,
    layer_lists,
    layerwise_class,
    stock_class,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "per_layer_config"  # config field of the entries: layer number -> setting -> value
EXPLICIT = "serialize_explicit_per_layer_config"
GLOBAL_READS = "allow_global_per_layer_attribute_access"


@dataclass(frozen=True)
class LayerList:
    name: str  # in the base model
    config_path: FieldPath  # from the model's config to that of the layers
    classes: tuple[type, ...]  # of its layers


def entries_supported() -> bool:
    """True if Transformers reads ``per_layer_config`` (5.15 and newer)."""
    from transformers import PretrainedConfig

    return hasattr(PretrainedConfig, KEY)


def may_differ(model: PreTrainedModel) -> bool:
    stock = not layer_lists(type(model))
    return stock and entries_supported() and bool(layer_lists_of(model))


def shared_field(field: FieldPath) -> FieldPath:
    """Remove the entry from a field: ``per_layer_config.3.n_inner`` -> ``n_inner``."""
    if KEY not in field:
        return field
    at = field.index(KEY)
    return (*field[:at], *field[at + 2 :])


def name_in_all_layers(name: str) -> str:
    """Like :func:`shared_field`, for a field's name."""
    return re.sub(rf"{KEY}\.\d+\.", "", name)


def layer_number(field: FieldPath) -> int | None:
    return int(field[field.index(KEY) + 1]) if KEY in field else None


def layer_lists_of(model: PreTrainedModel) -> list[LayerList]:
    """Return the lists of layers that can be built from entries of their own."""
    base = model.base_model
    nodes = {type(node): (path, node) for path, node in config_nodes(model.config)}
    result: list[LayerList] = []
    for name, module in base.named_modules():
        inside = any(part.isdigit() for part in name.split("."))
        if not isinstance(module, nn.ModuleList) or inside or len(module) < 2:
            continue
        # entries belong to the model's config; a module may have a copy with another number of
        # layers (decoders of T5)
        path, config = nodes.get(type(config_around(base, name)), ((), None))
        classes = tuple(dict.fromkeys(type(layer) for layer in module))
        count = getattr(config, "num_hidden_layers", None)
        # a hybrid may have a list for each kind
        counted = type(count) is int and len(module) <= count
        if counted and all("config" in inspect.signature(cls).parameters for cls in classes):
            result.append(LayerList(name, path, classes))
    return result


def config_around(model: nn.Module, name: str) -> Any:
    while True:
        name = name.rpartition(".")[0]
        config = vars(model.get_submodule(name)).get("config")
        if config is not None or not name:
            return config


def entries_of(config: Any) -> dict[int, dict[str, Any]]:
    """Layer -> values of all settings for which some layer has an entry."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    own = sorted(config._heterogeneity_spec.explicit_per_layer_attributes)
    layers = config.per_layer_config
    return {
        number: {key: getattr(layers[number], key) for key in own}
        for number in range(config.num_hidden_layers)
    }


def values_by_layer(model: PreTrainedModel) -> dict[FieldPath, tuple[Any, ...]]:
    result: dict[FieldPath, tuple[Any, ...]] = {}
    for path, config in config_nodes(model.config):
        entries = list(entries_of(config).values())
        for key in entries[0] if entries else ():
            field: FieldPath = (*path, key)
            result[field] = tuple(entry[key] for entry in entries)
    return result


def set_entries(config: Any, entries: Mapping[int, Mapping[str, Any]]) -> None:
    """Replace the entries of a config; an empty mapping removes them."""
    config.per_layer_config = None
    if entries:
        vars(config)[EXPLICIT] = True
        config.per_layer_config = {number: dict(entry) for number, entry in entries.items()}
    else:
        for switch in (EXPLICIT, GLOBAL_READS):
            vars(config).pop(switch, None)


def uniform_json(data: Mapping[str, Any], like: int | None = 0) -> dict[str, Any]:
    """Remove entries: all layers are like layer ``like``, or have the global values (``None``)."""
    result = {
        key: uniform_json(value, like) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in data.items()
        if key not in (KEY, EXPLICIT, GLOBAL_READS, "auto_map")
    }
    entries = data.get(KEY) or {}
    if entries and like is not None:
        by_number = sorted(entries, key=int)
        result.update(entries[by_number[min(like, len(entries) - 1)]])
    return result


def _built_from_entries(model: PreTrainedModel) -> bool:
    """True if every class in ``auto_map`` can be built and initialised from a model's config.

    BigBird's question answering reads a feed-forward width outside the layers.
    """
    builder, data = Builder(model), config_json(model.config)
    classes = generated_classes(type(model))
    return all(builder.of_class(made).initialised(data) is None for made in classes)


def with_own_configs(model: PreTrainedModel, lists: Sequence[LayerList]) -> None:
    """Give the modules of each layer the config that the layer is built from."""
    base = model.base_model
    for layers in lists:
        whole = config_around(base, layers.name)
        for number, layer in enumerate(base.get_submodule(layers.name).children()):
            own = whole.per_layer_config[number] if whole.is_heterogeneous else whole
            for module in layer.modules():
                if type(vars(module).get("config")) is type(whole):
                    module.config = own


class ListedLayers:
    """Gives every layer an entry for all ``keys``: path of a config -> setting -> default."""

    def __init__(self, model: PreTrainedModel, keys: Mapping[FieldPath, Mapping[str, int]]):
        self.model, self.keys = model, keys
        self.lists = [found for found in layer_lists_of(model) if found.config_path in keys]
        self.stock = stock_class(type(model))
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []  # attributes of each config
        self._opened: tuple[type, dict[str, Any]]

    def open(self) -> None:
        """Give every layer its entries, and the model its generated class; undone on errors."""
        model, listed_class = self.model, type(self.model)
        if not layer_lists(listed_class):
            lists = {found.name: found.classes for found in self.lists}
            listed_class = layerwise_class(model, lists)  # it writes a file, which may fail
        nodes = dict(config_nodes(model.config))
        self._before = [(vars(node), dict(vars(node))) for node in nodes.values()]
        try:
            for path, defaults in self.keys.items():
                config: Any = nodes[path]
                entries = entries_of(config)
                vars(config)[GLOBAL_READS] = True
                numbers = range(config.num_hidden_layers)
                set_entries(config, {n: {**defaults, **entries.get(n, {})} for n in numbers})
        except BaseException:
            self._restore()
            raise
        own_class = type(model)
        if listed_class is not type(model):
            model.__class__ = listed_class
            model.config.auto_map = auto_map(listed_class)
        with_own_configs(model, self.lists)
        self._opened = own_class, config_json(model.config)

    def _restore(self) -> None:
        for values, own in self._before:
            values.clear()
            values.update(own)

    def close(self) -> None:
        """Keep entries of settings that differ; if none do, restore the stock class."""
        model = self.model
        own_class, opened = self._opened
        if config_json(model.config) == opened:  # nothing was changed since open()
            model.__class__ = own_class
            self._restore()
            with_own_configs(model, self.lists)
            return
        listed = type(model), model.config.auto_map
        nodes: dict[FieldPath, Any] = dict(config_nodes(model.config))
        states = [(nodes[p], entries_of(nodes[p]), dict(vars(nodes[p]))) for p in self.keys]
        changed = [_keep_what_differs(nodes[path], self.keys[path]) for path in self.keys]
        differing = [nodes[path] for path in self.keys if nodes[path].is_heterogeneous]
        if not differing:
            model.__class__ = self.stock
            vars(model.config).pop("auto_map", None)
        elif not _built_from_entries(model):
            for node in differing:  # a class also reads the value for all layers
                vars(node)[GLOBAL_READS] = True
        # keep all entries if the class cannot build the result: all layers agree on six heads, but
        # 6 does not divide the hidden size
        if any(changed) and isinstance(Builder(model).build(config_json(model.config)), Refusal):
            model.__class__, model.config.auto_map = listed
            for node, entries, values in states:
                set_entries(node, {})
                for key in next(iter(entries.values())):
                    setattr(node, key, values[key])
                vars(node)[GLOBAL_READS] = True
                set_entries(node, entries)
        with_own_configs(model, self.lists)


def _keep_what_differs(config: Any, implied: Mapping[str, int]) -> bool:
    """Write settings on which all layers agree once, keep other entries; True if values changed."""
    entries = entries_of(config)
    values = {
        key: {entry[key] for entry in entries.values()} for key in next(iter(entries.values()))
    }
    set_entries(config, {})
    as_before = all(  # then defaults that the config did not write out stay unwritten
        found == {implied.get(key)} and getattr(config, key, None) in (None, *found)
        for key, found in values.items()
    )
    for key, found in values.items() if not as_before else ():
        if len(found) == 1:
            setattr(config, key, *found)
    apart = sorted(key for key, found in values.items() if len(found) > 1)
    if apart:
        set_entries(config, {n: {key: entry[key] for key in apart} for n, entry in entries.items()})
    return not as_before
