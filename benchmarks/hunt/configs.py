"""Random legal configs: a class's small default, with options drawn until so many were taken."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from feeding import first_inputs
from generation import outputs_of
from options import LEFT_ALONE, is_depth, other_values
from pairs import Pair, config_of

from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward.find_recipe import find_recipe
from tp_hf_config.model.build import Builder, Refusal, without_data
from tp_hf_config.model.config_json import config_json, with_values
from tp_hf_config.twin.tiny.tiny_model import tiny_model

Path = tuple[str | int, ...]
_MOST_TRIED = 24
_DEPTHS = (2, 3, 4, 5, 6)
_LARGEST = 6_000_000


@dataclass(frozen=True)
class Drawn:
    """A config that a class takes and runs with.

    Attributes:
        data: its JSON.
        changed: what is not as in the base: a field, and what it says.
    """

    data: dict[str, Any]
    changed: dict[str, Any]


def base_of(pair: Pair, model_class: type) -> dict[str, Any]:
    """A small config of a class: the one that the library shrinks its default to.

    Raises:
        RuntimeError: there is none.
    """
    model = without_data(model_class, config_of(pair))
    if isinstance(model, Refusal):
        raise RuntimeError(model.reason)
    tiny = tiny_model(map_of(model))
    if isinstance(tiny, Refusal):
        raise RuntimeError(tiny.reason)
    return tiny.field_map.data


def drawn_from(rng: Random, builder: Builder, base: dict[str, Any]) -> Drawn | None:
    """Options drawn one after the other, each kept if the class can be built and runs with it."""
    data = _spelled_out(builder, base)
    if not _runs(builder, data):
        data = base
        if not _runs(builder, data):
            return None
    changed: dict[str, Any] = {}
    depth = _deeper(rng, data)
    proposals = [(path, [value]) for path, value in depth]
    others = [
        (path, values)
        for path, key, value, part in _fields(data, builder.config(data))
        if not is_depth(key, value) and (values := other_values(rng, key, value, part))
    ]
    proposals += rng.sample(others, min(len(others), _MOST_TRIED))
    for path, values in proposals:
        for value in values:
            trial = _with_layers(rng, data, path, value)
            if trial != data and _runs(builder, trial):
                data = trial
                changed[".".join(map(str, path))] = value
                break
    return Drawn(data, changed)


def _spelled_out(builder: Builder, data: dict[str, Any]) -> dict[str, Any]:
    """The same config with every default said, so that every field can be drawn."""
    full: dict[str, Any] = json.loads(builder.config(data).to_json_string(use_diff=False))
    return full


def _fields(data: Any, config: Any, path: Path = ()) -> Iterator[tuple[Path, str, Any, Any]]:
    """Every field: where it stands, its name, what it says, and the config that it is in."""
    for key, value in data.items():
        if LEFT_ALONE.search(key):
            continue
        part = _part(config, key)
        if isinstance(value, dict) and "rope_type" not in value and part is not None:
            yield from _fields(value, part if hasattr(part, "to_dict") else config, (*path, key))
        else:
            yield (*path, key), key, value, config


def _part(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:  # what is another value in every layer has none
        return None


def _deeper(rng: Random, data: dict[str, Any], path: Path = ()) -> list[tuple[Path, int]]:
    found: list[tuple[Path, int]] = []
    for key, value in data.items():
        if isinstance(value, dict):
            found += _deeper(rng, value, (*path, key))
        elif is_depth(key, value) and not LEFT_ALONE.search(key):
            found.append(((*path, key), rng.choice(_DEPTHS)))
    return found


def _with_layers(rng: Random, data: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """The config with a field set; lists by layer grow with the number of layers."""
    trial: dict[str, Any] = with_values(data, {path: value})  # type: ignore[dict-item]
    node: Any = trial
    for key in path[:-1]:
        node = node[key]
    old: Any = data
    for key in path:
        old = old[key]
    if is_depth(str(path[-1]), old) and type(value) is int:
        for key, entries in node.items():
            if isinstance(entries, list) and len(entries) == old and old > 0:
                more = [rng.choice(entries) for _ in range(max(0, value - old))]
                node[key] = copy.deepcopy((entries + more)[:value])
    return trial


def _runs(builder: Builder, data: dict[str, Any]) -> bool:
    """Whether the class takes a config, is not too large, and computes numbers."""
    bare = builder.build(data)
    if isinstance(bare, Refusal) or sum(p.numel() for p in bare.parameters()) > _LARGEST:
        return False
    model = builder.build_real(data)
    if isinstance(model, Refusal):
        return False
    try:
        again = builder.build(config_json(builder.config(data)))
        inputs = None if isinstance(again, Refusal) else first_inputs(model, find_recipe(again))
    except Exception:
        return False
    if inputs is None:
        return False
    return all(bool(torch.isfinite(one).all()) for one in outputs_of(model, inputs))
