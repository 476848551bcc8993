"""Check that a config builds exactly the modules and tensors of the live model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import listed
from ..model.build import Builder, Refusal
from ..model.config_json import config_json, field_name, is_own, is_plain
from ..model.shapes import Shapes, compare, named_modules, shapes
from .fewer_layers import settings_of_left
from .layer_kinds import lists_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST = 16  # combinations of constructor arguments to try; classes of Transformers have two


def build_live(
    model: PreTrainedModel, buffers: bool = False
) -> tuple[Builder, nn.Module | Refusal]:
    """Return a builder for a live model, and what it builds from the model's config.

    The builder gets the constructor arguments that no config holds (BERT's ``add_pooling_layer``),
    if some build the model's tensors. With ``buffers``, buffers have values, on the CPU.
    """
    builder, data = Builder(model), config_json(model.config)
    built = builder.build(data, buffers=buffers)
    if isinstance(built, Refusal):
        return builder, built
    live = shapes(model)
    if not _differ(live, shapes(built)):
        return builder, built
    for options in _options(builder.model_class):
        candidate = Builder(model, options)
        candidate_model = candidate.build(data, buffers=buffers)
        if not isinstance(candidate_model, Refusal) and not _differ(live, shapes(candidate_model)):
            return candidate, candidate_model
    return builder, built


def _differ(live: Shapes, built: Shapes) -> bool:
    return bool(compare(live, built)) or live.keys() != built.keys()


def _options(model_class: type[nn.Module]) -> Iterator[dict[str, bool]]:
    """Yield constructor arguments to try: booleans unlike their defaults, fewest first."""
    switches = {
        name: parameter.default
        for name, parameter in inspect.signature(model_class.__init__).parameters.items()
        if isinstance(parameter.default, bool)
    }
    combinations = sorted(product((False, True), repeat=len(switches)), key=sum)
    for switched in combinations[1:_MOST]:
        chosen = zip(switches.items(), switched, strict=True)
        yield {name: not default for (name, default), flip in chosen if flip}


def notes_on_options(model: PreTrainedModel, builder: Builder) -> list[str]:
    if not builder.options:
        return []
    name = type(model).__name__
    given = ", ".join(f"{key}={value}" for key, value in builder.options.items())
    plain = Builder(model).shapes_at(config_json(model.config))
    other: Shapes = {} if isinstance(plain, Refusal) else plain
    added, left_out = parts_beyond(other, shapes(model)), parts_beyond(shapes(model), other)
    without = [f"{listed(added)} added with random values"] * bool(added)
    without += [f"{listed(left_out)} left out"] * bool(left_out)
    return [
        f"{name} was built with {given}, which no config stores. Load it with "
        f"{name}.from_pretrained(folder, {given}); otherwise you get {' and '.join(without)}"
    ]


def missing_parts(
    model: PreTrainedModel, builder: Builder, built: nn.Module, live: Shapes
) -> Refusal | None:
    """Return which parts the config builds that the model lacks, with advice; None if none."""
    parts = parts_beyond(shapes(built), live)
    if not parts:
        return None
    return Refusal(
        f"the config builds {listed(parts)}, which the model does not have, so a reload would add "
        f"{'it' if len(parts) == 1 else 'them'} with random values. "
        + _advice(model, builder, built, live)
    )


def _advice(model: PreTrainedModel, builder: Builder, built: nn.Module, live: Shapes) -> str:
    from transformers import PreTrainedModel

    data = config_json(model.config, use_diff=False)
    changes = settings_of_left(builder, data, built, live)
    if changes:
        settings = [
            f"config.{field_name(field)} "
            + (
                f"= {value}"
                if type(value) is int
                else f"to the entries of the {len(value)} layers that remain"
            )
            for field, value in changes.items()
        ]
        return f"Set {' and '.join(settings)}."
    inside = (name for name, part in model.named_modules() if isinstance(part, PreTrainedModel))
    inner = next(filter(None, inside), None)
    advice = (
        f"No number of layers in {type(model.config).__name__} describes this model: put the "
        "missing part back"
    )
    if inner is None:
        return f"{advice}."
    kind = type(model.get_submodule(inner)).__name__
    return f"{advice}, or prune only the {kind} inside (model.{inner})."


def notes_on_layer_order(model: nn.Module, built: nn.Module) -> list[str] | Refusal:
    """Return notes on layers that were moved, or why the config does not build the new order."""
    notes: list[str] = []
    live = dict(named_modules(model))
    for name, layers in lists_of(built).items():
        names = [f"{name}.{place}" for place in range(len(layers))]
        live_layers = [live[one] for one in names if one in live]
        if not len(live_layers) == len(layers) > 1:
            continue
        # a class stores a layer's number when it builds the layer (``layer_idx``)
        built_numbers, live_numbers = [
            [_numbers(one) for one in each] for each in (layers, live_layers)
        ]
        numbering = [
            key for key in built_numbers[0] if _counts_up([one.get(key) for one in built_numbers])
        ]
        moved = [
            place
            for place, numbers in enumerate(live_numbers)
            if any(numbers.get(key) != built_numbers[place][key] for key in numbering)
        ]
        if not moved:
            continue
        built_facts, live_facts = [[_facts(one) for one in each] for each in (layers, live_layers)]
        for key in (one for one in built_facts[0] if one not in numbering):
            for place in moved if _varies(key, built_facts) or _varies(key, live_facts) else ():
                if live_facts[place].get(key) != built_facts[place].get(key):
                    what = ".".join(filter(None, (name, str(place), *key)))
                    return Refusal(
                        f"the layers of {name} are in another order than they were built in: "
                        f"{what} is {live_facts[place].get(key)!r}, but the config builds "
                        f"{built_facts[place].get(key)!r} in this place. Put the config's entries "
                        "for single layers into the same order."
                    )
        notes += [
            f"the layers of {name} are not in their original order ({numbering[0][1]} says "
            f"{', '.join(str(one.get(numbering[0])) for one in live_numbers)}). A reload numbers "
            "them again"
        ]
    return notes


def _numbers(layer: nn.Module) -> dict[tuple[str, str], int]:
    return {
        (name, key): value
        for name, module in named_modules(layer)
        for key, value in vars(module).items()
        if type(value) is int and is_own(key)
    }


def _facts(layer: nn.Module) -> dict[tuple[str, str], Any]:
    facts: dict[tuple[str, str], Any] = {}
    for name, module in named_modules(layer):
        facts[name, "class"] = type(module).__name__
        for key, value in vars(module).items():
            # a float may be a rate that is scheduled by depth
            if is_own(key) and is_plain(value) and not isinstance(value, float):
                facts[name, key] = value
    return facts


def _counts_up(values: Sequence[Any]) -> bool:
    first = values[0]
    return type(first) is int and list(values) == list(range(first, first + len(values)))


def _varies(key: tuple[str, str], layers: Sequence[Mapping[tuple[str, str], Any]]) -> bool:
    return any(facts.get(key) != layers[0].get(key) for facts in layers)


def parts_beyond(names: Shapes, others: Shapes) -> list[str]:
    """Return the outermost modules and tensors of ``names`` that ``others`` has no part of."""
    present = {
        name[:end]
        for name in others
        for end in (*(i for i, letter in enumerate(name) if letter == "."), len(name))
    }
    parts: dict[str, None] = {}
    for name in names:
        keys = name.split(".")
        prefixes = (".".join(keys[: end + 1]) for end in range(len(keys)))
        beyond = next((prefix for prefix in prefixes if prefix not in present), None)
        if beyond is not None:
            parts[beyond] = None
    return list(parts)
