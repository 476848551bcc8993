"""Treat a config as JSON: name, read and set its fields."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .surroundings import note_shortage, replaced

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"training"}


@functools.total_ordering
@dataclass(frozen=True, eq=False)
class EntryOfKind:
    """Key of the list entries of all layers of one kind, which change together.

    Equals its ``number``: a small model that was learned on its own uses that number as the key.
    """

    number: int  # the first such layer in a model with few layers
    # length of the list (few layers, or the full model) -> indices of the entries
    places: Mapping[int, tuple[int, ...]]

    def __int__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (int, EntryOfKind)) and int(other) == self.number

    def __lt__(self, other: int | EntryOfKind) -> bool:
        return self.number < int(other)

    def __hash__(self) -> int:
        return hash(self.number)

    def __str__(self) -> str:
        """Return the layer numbers in the full model: ``0-3+5``."""
        return "+".join(ranges(self.places[max(self.places)]))


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """Return ascending numbers as lists of such that follow each other: ``[[0, 1, 2], [5]]``."""
    groups = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    return [[number for _, number in group] for _, group in groups]


def ranges(numbers: Iterable[int]) -> list[str]:
    """Return ascending numbers as ranges: ``["0-3", "5"]``."""
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs(numbers)]


# keys that lead to a field: ("text_config", "hidden_size")
FieldPath = tuple[str | int | EntryOfKind, ...]
# fields that affect neither shapes nor a forward pass in float64
OF_NO_EFFECT = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")

_NAME, _ARGUMENTS = "architecture", "model_args"
# every timm architecture calls it with its sizes (timm/models/_builder.py)
_BUILD = "build_model_with_cfg"
# sizes of input and output; Transformers sets num_classes itself
_ENDS = ("in_chans", "num_classes")


def _places(node: Any, key: Any) -> tuple[Any, ...]:
    """The indices in ``node`` that a key covers: several for an :class:`EntryOfKind`."""
    if isinstance(key, EntryOfKind) and isinstance(node, list):
        return key.places.get(len(node), (key.number,))
    return (key,)


def field_name(path: FieldPath) -> str:
    """Return a field as people write it: ``text_config.hidden_size``, ``depths[0]``."""
    return "".join(
        ("." if i else "") + key if isinstance(key, str) else f"[{key}]"
        for i, key in enumerate(path)
    )


def config_json(config: PreTrainedConfig, use_diff: bool = True) -> dict[str, Any]:
    """The config as saved (``use_diff``) or with all defaults, after :func:`spelled_out`."""
    result: dict[str, Any] = json.loads(config.to_json_string(use_diff=use_diff))
    return spelled_out(result)


def spelled_out(data: dict[str, Any]) -> dict[str, Any]:
    """Add the sizes implied by the names of timm architectures to a config's JSON.

    Transformers builds timm models from ``architecture``, with ``model_args`` overriding the sizes
    that the name implies (``transformers/models/timm_wrapper/configuration_timm_wrapper.py``).
    Written out, they are fields like others; values of the config take precedence. Nothing is added
    if timm is not installed, lacks the architecture, or describes its sizes as blocks
    (EfficientNet).
    """
    result = {k: spelled_out(v) if isinstance(v, dict) else v for k, v in data.items()}
    name, given = data.get(_NAME), data.get(_ARGUMENTS)
    if _ARGUMENTS in data and isinstance(name, str) and isinstance(given, (dict, type(None))):
        sizes = json.loads(_sizes_of(name, json.dumps(given or {})))
        result[_ARGUMENTS] = {**sizes, **given} if given else sizes or given
    return result


@functools.cache
def _sizes_of(name: str, given: str) -> str:
    """The arguments, as JSON, that a timm architecture passes to its class; ``{}`` if unknown."""
    arguments = json.loads(given)
    try:
        import timm

        module = sys.modules[timm.models.model_entrypoint(name).__module__]
        build = getattr(module, _BUILD)
        passed: dict[str, Any] = {}

        def recorded(model_class: Any, *args: Any, **options: Any) -> Any:
            def made(**values: Any) -> Any:
                passed.update(values)
                return model_class(**values)

            return build(made, *args, **options)

        with torch.device("meta"):
            with replaced(module, _BUILD, recorded):
                named = timm.create_model(name, **arguments)
            sizes = {k: v for k, v in passed.items() if _is_setting(v) and k not in _ENDS}
            spelled = timm.create_model(name, **{**sizes, **arguments})
    except Exception as error:  # an architecture may refuse with any exception
        note_shortage(error)
        return "{}"
    in_blocks = any(isinstance(leaf, dict) for value in passed.values() for leaf in _leaves(value))
    return "{}" if in_blocks or str(spelled) != str(named) else json.dumps(sizes)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _is_setting(value: Any) -> bool:
    return all(isinstance(leaf, (bool, int, float, str)) for leaf in _leaves(value))


def without_names(data: Any, names: Collection[str]) -> Any:
    if isinstance(data, dict):
        kept = ((key, value) for key, value in data.items() if key not in names)
        return {key: without_names(value, names) for key, value in kept}
    return [without_names(item, names) for item in data] if isinstance(data, list) else data


def with_values(data: dict[str, Any], values: Mapping[FieldPath, Any]) -> dict[str, Any]:
    """Return a copy with some fields set; missing parents are created."""
    result = copy.deepcopy(data)
    for path, value in values.items():
        nodes: list[Any] = [result]
        for key in path[:-1]:
            for node in nodes:
                if isinstance(node, dict) and node.get(key) is None:
                    node[key] = {}
            nodes = [node[place] for node in nodes for place in _places(node, key)]
        for node in nodes:
            for place in _places(node, path[-1]):
                node[place] = value
    return result


def is_own(key: str) -> bool:
    """True if a module attribute belongs to its class, not to every ``nn.Module``."""
    return key not in _MODULE_INTERNALS


def is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(is_plain(item) for item in value.values())
    return value is None or isinstance(value, (bool, int, float, str))


def value_at(data: Any, path: FieldPath) -> Any:
    """The value of a field; ``None`` if it is missing, IndexError if a list is too short."""
    for key in path:
        if isinstance(data, dict):
            data = data.get(key)
        elif isinstance(data, list) and not isinstance(key, str):
            data = data[_places(data, key)[0]]
        else:
            return None
    return data


def plain_fields(data: Mapping[str, Any], field: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Yield each field that is not an object, with its value; ``field`` is the path of ``data``."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from plain_fields(value, (*field, key))
        else:
            yield (*field, key), value


def without_field(data: dict[str, Any], path: FieldPath) -> dict[str, Any]:
    result = copy.deepcopy(data)
    parent = value_at(result, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
    return result


def changed_values(old: Any, new: Any, field: FieldPath = ()) -> list[tuple[FieldPath, Any]]:
    """The changed leaves and their new values; a list is one leaf. ``field``: path of ``old``."""
    if isinstance(old, dict) and isinstance(new, dict):
        changed: list[tuple[FieldPath, Any]] = []
        for key, value in new.items():
            if key not in old or old[key] != value:
                changed += changed_values(old.get(key), value, (*field, key))
        return changed
    return [(field, new)] if old != new else []


def configs_of(module: nn.Module) -> Iterator[Any]:
    from transformers import PretrainedConfig

    config = vars(module).get("config")
    if isinstance(config, PretrainedConfig):
        yield from (node for _, node in config_nodes(config))


def config_nodes(config: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Yield a config and all nested configs, each with its path."""
    from transformers import PretrainedConfig

    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from config_nodes(value, (*path, name))
