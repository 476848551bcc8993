"""Treat a config as JSON: name its fields, read their values and set others."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .shortage import note_shortage
from .surroundings import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"training"}


@functools.total_ordering
@dataclass(frozen=True, eq=False)
class EntryOfKind:
    """The key of the entries that a list has for all layers of one kind; they change together.

    It equals its number, by which a model with few layers, learned by itself, names that entry.

    Attributes:
        number: the number of the first such layer in a model with few layers.
        places: length of the list -> which of its entries these are, in a model with few layers
            and in the full one.
    """

    number: int
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
        """Return the numbers of the full model's layers: ``0-3+5``."""
        numbers = self.places[max(self.places)]
        ranges: list[list[int]] = []
        for number in numbers:
            if ranges and number == ranges[-1][-1] + 1:
                ranges[-1].append(number)
            else:
                ranges.append([number])
        return "+".join("-".join(map(str, dict.fromkeys((r[0], r[-1])))) for r in ranges)


FieldPath = tuple[str | int | EntryOfKind, ...]
"""A field, by the keys that lead to it in a config's JSON: ``("text_config", "hidden_size")``."""
ORIGIN = ("transformers_version", "_name_or_path", "architectures")
"""Config fields that say where a model comes from; saving it writes them."""
OF_NO_EFFECT = (*ORIGIN, "dtype", "torch_dtype")
"""Config fields that set no shape, and nothing that a pass in float64 computes."""

_NAME, _ARGUMENTS = "architecture", "model_args"
_BUILD = "build_model_with_cfg"
"""timm's function that every architecture calls with its sizes (``timm/models/_builder.py``)."""
_ENDS = ("in_chans", "num_classes")
"""Arguments that say what goes in and comes out; the second one Transformers gives itself."""


def _places(node: Any, key: Any) -> tuple[Any, ...]:
    """Return the keys that a field's key stands for in a list or an object; most for themselves."""
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
    """Return the config as ``save_pretrained`` writes it (``use_diff``), or with every default.

    The sizes that the name of an architecture stands for are written out.
    """
    result: dict[str, Any] = json.loads(config.to_json_string(use_diff=use_diff))
    return spelled_out(result)


def spelled_out(data: dict[str, Any]) -> dict[str, Any]:
    """Return a config's JSON with the sizes that names of architectures stand for.

    Transformers builds timm's models by ``architecture``, with ``model_args`` in place of the sizes
    that the name stands for (``transformers/models/timm_wrapper/configuration_timm_wrapper.py``).
    With all of them written out, they are fields like others. What the config gives itself comes
    first. An architecture stays as it is if timm is not installed, does not have it, or takes its
    sizes as descriptions of blocks (EfficientNet).
    """
    result = {k: spelled_out(v) if isinstance(v, dict) else v for k, v in data.items()}
    name, given = data.get(_NAME), data.get(_ARGUMENTS)
    if _ARGUMENTS in data and isinstance(name, str) and isinstance(given, (dict, type(None))):
        sizes = json.loads(_sizes_of(name, json.dumps(given or {})))
        result[_ARGUMENTS] = {**sizes, **given} if given else sizes or given
    return result


@functools.cache
def _sizes_of(name: str, given: str) -> str:
    """Return the arguments that an architecture gives its class, as JSON; ``{}``: none can be told.

    ``given``: the arguments that a config has for it, as JSON.
    """
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
    """True for a number or a name, and for a list of those; ``None`` sets nothing."""
    return all(isinstance(leaf, (bool, int, float, str)) for leaf in _leaves(value))


def without_names(data: Any, names: Collection[str]) -> Any:
    """Return a config's JSON without the fields of these names, in nested configs too."""
    if isinstance(data, dict):
        kept = ((key, value) for key, value in data.items() if key not in names)
        return {key: without_names(value, names) for key, value in kept}
    return [without_names(item, names) for item in data] if isinstance(data, list) else data


def with_values(data: dict[str, Any], values: Mapping[FieldPath, Any]) -> dict[str, Any]:
    """Return a copy of a config's JSON with some fields set; missing parents are created."""
    result = copy.deepcopy(data)
    for path, value in values.items():
        node: Any = result
        for key in path[:-1]:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        for key in _places(node, path[-1]):
            node[key] = value
    return result


def is_own(key: str) -> bool:
    """True if a module's attribute is its class's own, and not one that every module has."""
    return key not in _MODULE_INTERNALS


def is_plain(value: Any) -> bool:
    """True if a value consists of numbers, strings and ``None`` only, however nested."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(is_plain(item) for item in value.values())
    return value is None or isinstance(value, (bool, int, float, str))


def value_at(data: Any, path: FieldPath) -> Any:
    """Return the value of a field in a config's JSON, or None if the JSON does not have it."""
    for key in path:
        if isinstance(data, dict):
            data = data.get(key)
        elif isinstance(data, list) and not isinstance(key, str):
            data = data[_places(data, key)[0]]
        else:
            return None
    return data


def plain_fields(data: Mapping[str, Any], field: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Yield each field of a config's JSON that is no object, and its value; a list is one value.

    ``field`` is where ``data`` stands.
    """
    for key, value in data.items():
        if isinstance(value, dict):
            yield from plain_fields(value, (*field, key))
        else:
            yield (*field, key), value


def without_field(data: dict[str, Any], path: FieldPath) -> dict[str, Any]:
    """Return a copy of a config's JSON without one field."""
    result = copy.deepcopy(data)
    parent = value_at(result, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
    return result


def changed_values(old: Any, new: Any, field: FieldPath = ()) -> list[tuple[FieldPath, Any]]:
    """Return the changed leaves of a config's JSON with their new values.

    A list counts as one leaf; ``field`` is where ``old`` and ``new`` stand.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        changed: list[tuple[FieldPath, Any]] = []
        for key, value in new.items():
            if key not in old or old[key] != value:
                changed += changed_values(old.get(key), value, (*field, key))
        return changed
    return [(field, new)] if old != new else []


def configs_of(module: nn.Module) -> Iterator[Any]:
    """Yield the config objects that a module holds, those nested in its config included."""
    from transformers import PretrainedConfig

    config = vars(module).get("config")
    if isinstance(config, PretrainedConfig):
        yield from (node for _, node in config_nodes(config))


def config_nodes(config: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Yield a config and all configs in it, each with the keys that lead to it."""
    from transformers import PretrainedConfig

    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from config_nodes(value, (*path, name))
