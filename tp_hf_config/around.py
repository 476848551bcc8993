"""What else lives beside a model: the modules that hold it, and models that share its config."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch import nn


def holders_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules alive that hold a model; the model itself where none does."""
    return _holders(model, _live_modules())


def sharers_of(model: nn.Module) -> list[str]:
    """The classes of other live models that hold one of a model's config objects.

    The modules that hold the model are no others, nor is anything else inside of those.
    """
    if not _sharers(model):
        return []
    gc.collect()  # a model that nobody holds may wait for it
    return [type(other).__name__ for other in _sharers(model)]


def _sharers(model: nn.Module) -> list[nn.Module]:
    own = {id(config) for module in model.modules() for config in configs_of(module)}
    alive = _live_modules()
    inside = {id(one) for holder in _holders(model, alive) for one in holder.modules()}
    others = [
        module
        for module in alive
        if id(module) not in inside and any(id(config) in own for config in configs_of(module))
    ]
    parts = {id(child) for other in others for child in other.modules() if child is not other}
    return [other for other in others if id(other) not in parts]


def _live_modules() -> list[nn.Module]:
    every = gc.get_objects()
    kinds = {kind for kind in set(map(type, every)) if issubclass(kind, nn.Module)}
    return [one for one in every if type(one) in kinds and "_modules" in vars(one)]


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
