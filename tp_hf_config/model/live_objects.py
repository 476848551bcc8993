"""Find what is alive beside a model: modules that hold it, and models that share its config."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from itertools import compress
from typing import Any, NamedTuple

from torch import nn

from .config_json import FieldPath


class Surroundings(NamedTuple):
    """What is alive around a model.

    Attributes:
        holders: the outermost modules that contain the model; the model itself if none does.
        sharers: class names of other models that hold one of the model's config objects. Modules
            that contain the model do not count as others, nor does anything inside them.
    """

    holders: list[nn.Module]
    sharers: list[str]


def surroundings_of(model: nn.Module) -> Surroundings:
    """Search all live objects for modules that contain a model or share its config."""
    if _is_alone(model):
        return Surroundings([model], [])
    around = _surroundings(model)
    if around.sharers:
        gc.collect()  # a model that nobody holds may not be collected yet
        around = _surroundings(model)
    return around


def _is_alone(model: nn.Module) -> bool:
    """True if nothing that refers to a model or to its configs can be a part of a module or config.

    This takes half the time of the search, whose answer it is in most processes.
    """
    from transformers import PretrainedConfig

    configs = _configs_in(model)
    own = {
        id(part) for module in model.modules() for part in (module, vars(module), module._modules)
    }
    own |= {id(part) for config in configs.values() for part in (config, vars(config))}
    for referrer in gc.get_referrers(model, *configs.values()):
        if id(referrer) in own:
            continue
        kind = type(referrer)
        if issubclass(kind, (nn.Module, PretrainedConfig)):
            return False
        if issubclass(kind, dict) and _may_be_a_part(referrer):
            return False
    return True


def _may_be_a_part(values: Mapping[Any, Any]) -> bool:
    """True for the attributes of a module or a config, and for what only holds modules."""
    if "_modules" in values or "architectures" in values:
        return True
    # a list, as another thread may write to them meanwhile
    return all(value is None or isinstance(value, nn.Module) for value in list(values.values()))


def _surroundings(model: nn.Module) -> Surroundings:
    alive = _live_modules()
    holders = _holders(model, alive)
    own = _configs_in(model).keys()
    inside = {id(one) for holder in holders for one in holder.modules()}
    with_config = [module for module in alive if "config" in vars(module)]  # few of millions
    others = [
        module
        for module in with_config
        if id(module) not in inside and any(id(config) in own for config in configs_of(module))
    ]
    parts = {id(child) for other in others for child in other.modules() if child is not other}
    return Surroundings(holders, [type(one).__name__ for one in others if id(one) not in parts])


def _live_modules() -> list[nn.Module]:
    """Return all live modules; a process has millions of objects, so C code filters them."""
    kinds = set(_subclasses(nn.Module))
    every = gc.get_objects()
    modules = compress(every, map(kinds.__contains__, map(type, every)))
    return [module for module in modules if "_modules" in vars(module)]


def _subclasses(kind: type) -> Iterator[type]:
    """Yield a class and its subclasses at every depth."""
    waiting = [kind]
    while waiting:
        kind = waiting.pop()
        yield kind
        waiting += type.__subclasses__(kind)


def _holders(model: nn.Module, alive: list[nn.Module]) -> list[nn.Module]:
    """Return the outermost live modules that contain the model; itself if none does."""
    parents: dict[int, list[nn.Module]] = {}
    for module in alive:
        for child in module._modules.values():
            parents.setdefault(id(child), []).append(module)
    waiting, visited, outermost = [model], {id(model)}, []
    while waiting:
        module = waiting.pop()
        above = parents.get(id(module), [])
        if not above:
            outermost.append(module)
        waiting += [parent for parent in above if id(parent) not in visited]
        visited |= {id(parent) for parent in above}
    return outermost


def _configs_in(model: nn.Module) -> dict[int, Any]:
    """Return the config objects that the modules of a model hold, by ``id``."""
    return {id(config): config for module in model.modules() for config in configs_of(module)}


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
