"""What else lives beside a model: the modules that hold it, and models that share its config."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import compress
from typing import Any, NamedTuple

from torch import nn


class Surroundings(NamedTuple):
    """What is alive around a model.

    Attributes:
        holders: the outermost modules that hold the model; the model itself where none does.
        sharers: the classes of other models that hold one of the model's config objects. The
            modules that hold the model are no others, nor is anything else inside of those.
    """

    holders: list[nn.Module]
    sharers: list[str]


def surroundings_of(model: nn.Module) -> Surroundings:
    """Look through every live object for what stands around a model."""
    around = _surroundings(model)
    if around.sharers:
        gc.collect()  # a model that nobody holds may wait for it
        around = _surroundings(model)
    return around


def _surroundings(model: nn.Module) -> Surroundings:
    alive = _live_modules()
    holders = _holders(model, alive)
    own = {id(config) for module in model.modules() for config in configs_of(module)}
    inside = {id(one) for holder in holders for one in holder.modules()}
    others = [
        module
        for module in alive
        if id(module) not in inside and any(id(config) in own for config in configs_of(module))
    ]
    parts = {id(child) for other in others for child in other.modules() if child is not other}
    return Surroundings(holders, [type(one).__name__ for one in others if id(one) not in parts])


def _live_modules() -> list[nn.Module]:
    """Every module that is alive; a process has millions of objects, so no loop in Python."""
    kinds = set(_subclasses(nn.Module))
    every = gc.get_objects()
    modules = compress(every, map(kinds.__contains__, map(type, every)))
    return [one for one in modules if "_modules" in vars(one)]


def _subclasses(kind: type) -> Iterator[type]:
    waiting = [kind]
    while waiting:
        kind = waiting.pop()
        yield kind
        waiting += type.__subclasses__(kind)


def _holders(model: nn.Module, alive: list[nn.Module]) -> list[nn.Module]:
    parents: dict[int, list[nn.Module]] = {}
    for module in alive:
        for child in module._modules.values():
            parents.setdefault(id(child), []).append(module)
    waiting, seen, outermost = [model], {id(model)}, []
    while waiting:
        module = waiting.pop()
        above = parents.get(id(module), [])
        if not above:
            outermost.append(module)
        waiting += [one for one in above if id(one) not in seen]
        seen |= {id(one) for one in above}
    return outermost


def configs_of(module: nn.Module) -> Iterator[Any]:
    """The config objects that a module holds, those inside its config included."""
    from transformers import PretrainedConfig

    waiting = [vars(module).get("config")]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PretrainedConfig):
            yield config
            waiting += [one for one in vars(config).values() if isinstance(one, PretrainedConfig)]
