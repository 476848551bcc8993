"""Whether a class builds what its live model has and nothing else, and what to set where not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import nn

from .apply import is_own, is_plain
from .depth import layers_left
from .kinds import lists_of
from .reference import (
    Builder,
    Refusal,
    compare,
    config_json,
    field_name,
    named_modules,
    shapes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
_LISTED = 3
_MOST = 16
"""Combinations of a constructor's arguments that are tried; classes of Transformers have two."""


def build_live(
    model: PreTrainedModel, buffers: bool = False
) -> tuple[Builder, nn.Module | Refusal]:
    """A builder of a live model, and what it builds from the model's config.

    Where the class takes arguments beside the config (BERT's ``add_pooling_layer``), the builder
    has those with which it builds the tensors of this model.
    """
    builder, data = Builder(model), config_json(model.config)
    built = builder.build(data, buffers=buffers)
    if isinstance(built, Refusal):
        return builder, built
    live = shapes(model)
    if not _apart(live, shapes(built)):
        return builder, built
    for options in _options(type(model)):
        other = Builder(model, options)
        trial = other.build(data, buffers=buffers)
        if not isinstance(trial, Refusal) and not _apart(live, shapes(trial)):
            return other, trial
    return builder, built


def _apart(live: Shapes, built: Shapes) -> bool:
    return bool(compare(dict(live), dict(built))) or live.keys() != built.keys()


def _options(model_class: type[nn.Module]) -> Iterator[dict[str, bool]]:
    """The switches of a constructor in every other position, those with fewest changes first."""
    switches = {
        name: parameter.default
        for name, parameter in inspect.signature(model_class.__init__).parameters.items()
        if isinstance(parameter.default, bool)
    }
    turned = sorted(product((False, True), repeat=len(switches)), key=sum)
    for turns in turned[1:_MOST]:
        chosen = zip(switches.items(), turns, strict=True)
        yield {name: not default for (name, default), turn in chosen if turn}


def said_options(model: PreTrainedModel, builder: Builder) -> list[str]:
    """That a reload needs the constructor's arguments too, which no config says."""
    if not builder.options:
        return []
    name = type(model).__name__
    given = ", ".join(f"{key}={value}" for key, value in builder.options.items())
    plain = Builder(model).build(config_json(model.config))
    other = {} if isinstance(plain, Refusal) else shapes(plain)
    added, left_out = parts_beyond(other, shapes(model)), parts_beyond(shapes(model), other)
    without = [f"{_listed(added)} added with random values"] * bool(added)
    without += [f"{_listed(left_out)} left out"] * bool(left_out)
    return [
        f"{name} was built with {given}, which no config says: load it again with "
        f"{name}.from_pretrained(folder, {given}); without, you get {' and '.join(without)}"
    ]


def unbuilt_parts(
    model: PreTrainedModel, builder: Builder, built: nn.Module, live: Shapes
) -> str | None:
    """What the config builds and the model does not have, and what to do; ``None``: nothing."""
    parts = parts_beyond(shapes(built), live)
    if not parts:
        return None
    return (
        f"the config builds {_listed(parts)}, which the model does not have, so a reload would add "
        f"{'it' if len(parts) == 1 else 'them'} with random values. "
        + _advice(model, builder, live)
    )


def _advice(model: PreTrainedModel, builder: Builder, live: Shapes) -> str:
    changes = layers_left(builder, config_json(model.config, use_diff=False), dict(live))
    if changes:
        settings = [
            f"config.{field_name(path)} "
            + (
                f"= {value}"
                if type(value) is int
                else f"to the entries of the {len(value)} layers that are left"
            )
            for path, value in changes.items()
        ]
        return f"Set {' and '.join(settings)}."
    inner = next(_models_inside(model), None)
    advice = f"No number of layers in {type(model.config).__name__} leaves that out: put it back"
    if inner is None:
        return f"{advice}."
    return f"{advice}, or prune the {type(inner[1]).__name__} inside by itself (model.{inner[0]})."


def order_of_layers(model: nn.Module, built: nn.Module) -> tuple[str | None, list[str]]:
    """What is wrong with layers in another order than they were built in, and what to know of it.

    Layers are numbered where they are built (``layer_idx``); of those that moved, the config has to
    build the same kind in their new place (a sliding window or none).
    """
    notes: list[str] = []
    live = dict(named_modules(model))
    for name, layers in lists_of(built).items():
        names = [f"{name}.{place}" for place in range(len(layers))]
        there = [live[one] for one in names if one in live]
        if not len(there) == len(layers) > 1:
            continue
        built_as, are = [[_numbers(one) for one in each] for each in (layers, there)]
        numbering = [key for key in built_as[0] if _counts_up([one.get(key) for one in built_as])]
        moved = [
            place
            for place, numbers in enumerate(are)
            if any(numbers.get(key) != built_as[place][key] for key in numbering)
        ]
        if not moved:
            continue
        should, have = [[_facts(one) for one in each] for each in (layers, there)]
        for key in (one for one in should[0] if one not in numbering):
            for place in moved if _varies(key, should) or _varies(key, have) else ():
                if have[place].get(key) != should[place].get(key):
                    what = ".".join(filter(None, (name, str(place), *key)))
                    return (
                        f"the layers of {name} are in another order than they were built in: "
                        f"{what} is {have[place].get(key)!r}, and in this place the config builds "
                        f"{should[place].get(key)!r}. Put the config's entries for single layers "
                        "into the order of the layers."
                    ), []
        notes += [
            f"the layers of {name} are not in the places they were built in "
            f"({numbering[0][1]} says {', '.join(str(one.get(numbering[0])) for one in are)}): a "
            "reload numbers them anew"
        ]
    return None, notes


def _numbers(layer: nn.Module) -> dict[tuple[str, str], int]:
    """The whole numbers that are attributes in a layer."""
    return {
        (name, key): value
        for name, module in named_modules(layer)
        for key, value in vars(module).items()
        if type(value) is int and is_own(key)
    }


def _facts(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """Plain attributes and classes in a layer, but for rates, which may be scheduled by depth."""
    facts: dict[tuple[str, str], Any] = {}
    for name, module in named_modules(layer):
        facts[name, "class"] = type(module).__name__
        for key, value in vars(module).items():
            if is_own(key) and is_plain(value) and not isinstance(value, float):
                facts[name, key] = value
    return facts


def _counts_up(values: Sequence[Any]) -> bool:
    first = values[0]
    return type(first) is int and list(values) == list(range(first, first + len(values)))


def _varies(key: tuple[str, str], layers: Sequence[Mapping[tuple[str, str], Any]]) -> bool:
    return any(facts.get(key) != layers[0].get(key) for facts in layers)


def _models_inside(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel):
            yield name, module


def parts_beyond(names: Shapes, others: Shapes) -> list[str]:
    """The modules and tensors, outermost first, of which ``others`` has nothing."""
    present = {
        name[:end]
        for name in others
        for end in (*(i for i, letter in enumerate(name) if letter == "."), len(name))
    }
    found: dict[str, None] = {}
    for name in names:
        keys = name.split(".")
        prefixes = (".".join(keys[: end + 1]) for end in range(len(keys)))
        beyond = next((prefix for prefix in prefixes if prefix not in present), None)
        if beyond is not None:
            found[beyond] = None
    return list(found)


def _listed(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - _LISTED} more" if len(parts) > _LISTED else ""
    return ", ".join(parts[:_LISTED]) + more
