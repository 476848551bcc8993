"""Which layers of a list the class built alike.

Names and shapes do not tell: SmolLM3's layers without rotary positions have the same.  What tells
is all that the class left in a layer: module classes, plain attributes, buffers, and what its
config says of the layer by its number.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .reference import named_modules

Key = tuple[str, str]
"""Where something is said of a layer: a module inside it, and an attribute of that module."""
Facts = dict[Key, Hashable]
"""All that is said of one layer."""

_CLASS = "class"
_CONFIG = "(config)"
_EVERYWHERE = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}
_FEW = 4
"""Of so many layers each may be of a kind of its own.  A number that is another in each of more
counts something: layers, or a rate that rises with depth."""
_LONG = 64
"""Entries of a list or dictionary that are looked at."""
_MISSING = object()


@dataclass(frozen=True)
class Loose:
    """A number: other widths and depths make another of it."""

    value: float


@dataclass(frozen=True)
class Config:
    """A config in words: some classes give each layer a copy of its own."""

    words: str


@dataclass(frozen=True)
class Kinds:
    """How the layers of one list differ.

    Attributes:
        of: for each layer, what it has and some other has not.
        common: what all of them have.
        counts: numbers that are another in each layer, and make no kinds.
    """

    of: tuple[frozenset[tuple[Key, Hashable]], ...]
    common: Facts
    counts: frozenset[Key]

    @functools.cached_property
    def first(self) -> tuple[int, ...]:
        """For each layer, the first one of its kind."""
        return tuple(self.of.index(kind) for kind in self.of)

    @functools.cached_property
    def _differs(self) -> frozenset[Key]:
        return frozenset(key for kind in self.of for key, _ in kind)

    def places(self, facts: Sequence[Facts]) -> tuple[int, ...] | None:
        """For each layer of another build's list, the first layer here of its kind.

        ``None``: some layer there is of no kind that is here.
        """
        found = [self._place(one) for one in facts]
        return None if None in found else tuple(place for place in found if place is not None)

    def _place(self, facts: Facts) -> int | None:
        kind: set[tuple[Key, Hashable]] = set()
        for key, value in facts.items():
            now = _sign(value) if key in self.counts else value
            if key in self._differs:
                kind.add((key, now))
            elif key[0] != _CONFIG and not self._same(self.common.get(key, _MISSING), now):
                return None
        missing = {key for key in self.common if key[0] != _CONFIG} - facts.keys()
        known = frozenset(kind)
        return self.of.index(known) if not missing and known in self.of else None

    def _same(self, one: object, other: object) -> bool:
        """Whether two builds say the same of a layer, but for what depth and widths change.

        A list with an entry for each layer, which all of them hold, is another at another depth.
        """
        if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(self.of):
            return True
        return one == other or (isinstance(one, Loose) and isinstance(other, Loose))


def lists_of(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Every list of layers that is not empty, by its name."""
    return {
        name: module
        for name, module in named_modules(model)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }


def kinds_in(model: nn.Module) -> dict[str, Kinds]:
    """How the layers of every list differ."""
    looked = Looked()
    return {name: _kinds(facts_in(model, name, looked)) for name in lists_of(model)}


def _kinds(facts: Sequence[Facts]) -> Kinds:
    first, *rest = facts
    differ = {
        key
        for one in rest
        for key in first.keys() | one.keys()
        if first.get(key, _MISSING) != one.get(key, _MISSING)
    }
    counts = frozenset(
        key
        for key in differ
        for values in [[one.get(key) for one in facts]]
        if _counts(values) or (key[0] == _CONFIG and _are_names(values))
    )
    of = [
        frozenset(
            (key, _sign(one[key]) if key in counts else one[key]) for key in differ if key in one
        )
        for one in facts
    ]
    everywhere = frozenset.intersection(*of)
    common = {key: value for key, value in first.items() if key not in differ}
    return Kinds(tuple(one - everywhere for one in of), common | dict(everywhere), counts)


def _counts(values: Sequence[Hashable]) -> bool:
    """Whether values say which layer it is: they rise by one, or each of many has another."""
    said = [(place, one.value) for place, one in enumerate(values) if isinstance(one, Loose)]
    numbers = [value for _, value in said]
    if len(said) < max(2, sum(one is not None for one in values)):
        return False
    if all(type(value) is int for value in numbers):
        start, low = said[0]
        for step in (1, -1):  # among all layers, or among those that have it
            if all(value == low + step * (place - start) for place, value in said):
                return True
            if all(value == low + step * nth for nth, value in enumerate(numbers)):
                return True
    whole = all(type(value) in (int, float) for value in numbers)
    return whole and len(said) > _FEW and len(set(numbers)) == len(said)


def _are_names(values: Sequence[Hashable]) -> bool:
    """Whether a config's list has a name for each of many layers."""
    names = {value for value in values if isinstance(value, str)}
    return len(names) == len(values) > _FEW


def _sign(value: Hashable) -> Hashable:
    """Of what counts, no more than on which side of 0 it is."""
    if not isinstance(value, Loose):
        return "a name" if isinstance(value, str) else value
    if type(value.value) is int:
        return "a count"
    return "0" if value.value == 0 else "above 0" if value.value > 0 else "below 0"


def facts_in(
    model: nn.Module, name: str, looked: Looked | None = None, shorter: bool = False
) -> list[Facts]:
    """All that is said of each layer of a list.

    ``shorter``: the list is, than the config's lists may be that go with it.
    """
    looked = looked or Looked()
    layers: Any = model.get_submodule(name)
    said = _said_by_config(model, name, len(layers), shorter)
    found: list[Facts] = []
    configs: dict[Config, int] = {}
    for place, layer in enumerate(layers):
        facts: Facts = {(_CONFIG, key): entry(place) for key, entry in said.items()}
        for inside, module in named_modules(layer) if layer is not None else ():
            for key, value in looked.at(module).items():
                if isinstance(value, Config):
                    value = Loose(configs.setdefault(value, len(configs)))
                facts[inside, key] = value
        found.append(facts)
    return found


def _said_by_config(
    model: nn.Module, name: str, length: int, shorter: bool
) -> dict[str, Callable[[int], Hashable]]:
    """What the config around a list says of its layers: an entry for each, or the numbers of some.

    Lists inside of layers have none: of a config's list it could not be told whose it is.
    """
    parts = name.split(".")
    if length < 2 or any(part.isdigit() for part in parts):
        return {}
    around = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)]
    configs = (vars(module).get("config") for module in around)
    config = next((one for one in configs if _is_config(one)), None)
    found: dict[str, Callable[[int], Hashable]] = {}
    own = vars(config).keys() - _everyones() if config is not None else ()
    for key, value in ((key, vars(config)[key]) for key in own):
        entries = isinstance(value, (list, tuple)) and len(value)
        numbers = rises(value)
        if numbers and (shorter or (value[-1] < length and entries != length)):
            found[f"in {key}"] = functools.partial(_named, frozenset(value))
        if (entries == length and not numbers) or (shorter and entries >= length):
            found[key] = functools.partial(_entry, dict(enumerate(value)))
        if by_number(value):
            found[key] = functools.partial(_entry, {int(one): value[one] for one in value})
    return found


def rises(value: Any) -> bool:
    """Whether a list can be numbers of layers, of one at least: whole, and rising."""
    whole = isinstance(value, list) and all(type(entry) is int for entry in value)
    return whole and bool(value) and value == sorted(set(value)) and value[0] >= 0


def by_number(value: Any) -> bool:
    """Whether this has entries for some layers, named by their numbers (Gemma 4)."""
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


@functools.cache
def _everyones() -> frozenset[str]:
    """What every config has: labels by their numbers, which are no layers'."""
    from transformers import PretrainedConfig

    return frozenset(vars(PretrainedConfig()))


def _entry(values: Mapping[int, Any], place: int) -> Hashable:
    return plain(values.get(place))


def _named(numbers: frozenset[int], place: int) -> Hashable:
    return place in numbers


class Looked:
    """What is said of single modules, each looked at once."""

    def __init__(self) -> None:
        self._at: dict[int, dict[str, Hashable]] = {}
        self._idle: dict[Hashable, bool] = {}
        self._configs: dict[int, Hashable] = {}

    def at(self, module: nn.Module) -> dict[str, Hashable]:
        """A module's class, its attributes, and the shapes of its parameters and buffers."""
        if id(module) not in self._at:
            found = dict(self._own(module))
            leaf = not (module._modules or module._parameters or module._buffers)
            if leaf and self._changes_nothing(module, frozenset(found.items())):
                found = {_CLASS: "nothing"}
            self._at[id(module)] = found
        return self._at[id(module)]

    def _own(self, module: nn.Module) -> Iterator[tuple[str, Hashable]]:
        yield _CLASS, _name(type(module))
        for key, value in vars(module).items():
            if key not in _EVERYWHERE:
                yield key, self._config(value) if _is_config(value) else plain(value)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield name, tuple(parameter.shape)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                saved = name not in module._non_persistent_buffers_set
                yield name, (tuple(buffer.shape), str(buffer.dtype), saved)

    def _config(self, config: Any) -> Hashable:
        if id(config) not in self._configs:
            self._configs[id(config)] = Config(config.to_json_string(use_diff=False))
        return self._configs[id(config)]

    def _changes_nothing(self, module: nn.Module, said: Hashable) -> bool:
        if said not in self._idle:
            self._idle[said] = changes_nothing(module)
        return self._idle[said]


def changes_nothing(module: nn.Module) -> bool:
    """Whether a layer hands on what it gets: dropout, in a model that is not trained."""
    values = torch.tensor([[-1e4, -3.0, -0.5, 0.0], [1e-3, 0.5, 3.0, 1e4]], device="cpu")
    training, module.training = module.training, False
    try:
        with torch.no_grad():
            result = module(values.clone())
    except Exception:  # whatever a layer raises that takes something else
        return False
    finally:
        module.training = training
    return isinstance(result, torch.Tensor) and torch.equal(result, values)


def plain(value: Any) -> Hashable:
    """What can be compared of a value; of objects, no more than their class."""
    if value is None or isinstance(value, (bool, str, torch.dtype)):
        return value
    if isinstance(value, (enum.Enum, slice, range)):
        return repr(value)
    if isinstance(value, (int, float)):
        return Loose(value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(repr, value)))
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value[:_LONG]))
    if isinstance(value, dict):
        return tuple((str(key), plain(value[key])) for key in list(value)[:_LONG])
    if isinstance(value, functools.partial):
        return plain((value.func, value.args, value.keywords))
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return _name(value)
    if isinstance(value, types.MethodType):
        return _name(value.__func__)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return _name(type(value))


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_json_string")


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
