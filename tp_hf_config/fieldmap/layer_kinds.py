"""Find which layers of a list the class built alike.

Names and shapes do not show it: SmolLM3's layers without rotary positions have the same ones. So
layers are compared by all their facts: module classes, plain attributes, buffers, and the config's
entries for single layers.
"""

from __future__ import annotations

import enum
import functools
import inspect
import re
import types
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CellType, CodeType
from typing import Any

import torch
from torch import nn

from ..model.shapes import named_modules
from ..model.surroundings import note_shortage

Key = tuple[str, str]  # (module inside the layer, its attribute) or (_CONFIG, the config's key)
Facts = dict[Key, Hashable]  # all facts about one layer
CLASS = "class"
_CONFIG = "(config)"
_EVERYWHERE = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}
# In a longer list, a number that differs in every layer counts layers or is a rate that rises with
# depth; in a list of up to this many layers, each layer may be of a kind of its own.
_FEW = 4
_LONG = 64  # entries of a list or dictionary that are compared
_MISSING = object()


@dataclass(frozen=True)
class Number:
    """A number in a layer. In two builds any two are equal, because widths and depth set them."""

    value: float


@dataclass(frozen=True)
class ConfigText:
    """A config as JSON text: some classes give each layer a copy of its own."""

    json: str


@dataclass(frozen=True)
class Kinds:
    kinds: tuple[frozenset[tuple[Key, Hashable]], ...]  # of each layer, facts not in ``common``
    common: Facts  # the facts that all layers share
    counts: frozenset[Key]  # keys of values that only number the layers, and so make no kinds

    @functools.cached_property
    def first(self) -> tuple[int, ...]:
        """For each layer, the index of the first layer of its kind."""
        return tuple(map(self.kinds.index, self.kinds))

    @functools.cached_property
    def _differs(self) -> frozenset[Key]:
        return frozenset(key for kind in self.kinds for key, _ in kind)

    def without_settings(self, names: Collection[str]) -> Kinds:
        """Return the kinds if these settings of the config are not compared."""
        keys = {(_CONFIG, key) for name in names for key in (name, f"in {name}")}
        kinds = [frozenset(fact for fact in kind if fact[0] not in keys) for kind in self.kinds]
        return replace(self, kinds=tuple(kinds))

    def match(self, facts: Sequence[Facts]) -> tuple[int, ...] | None:
        """Return for each layer of another build the index of the first layer here of its kind."""
        indexes = [self._index(layer_facts) for layer_facts in facts]
        return None if None in indexes else tuple(index for index in indexes if index is not None)

    def _index(self, facts: Facts) -> int | None:
        kind: set[tuple[Key, Hashable]] = set()
        for key, value in facts.items():
            now = _kind_part(value) if key in self.counts else value
            if key in self._differs:
                kind.add((key, now))
            elif key[0] != _CONFIG and not self._same(self.common.get(key, _MISSING), now):
                return None
        missing = {key for key in self.common if key[0] != _CONFIG} - facts.keys()
        frozen = frozenset(kind)
        return self.kinds.index(frozen) if not missing and frozen in self.kinds else None

    def _same(self, one: object, other: object) -> bool:
        if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(self.first):
            return True  # an entry for each layer, in all layers: it differs at another depth
        return one == other or (isinstance(one, Number) and isinstance(other, Number))


def lists_of(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    return {
        name: module
        for name, module in named_modules(model)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }


def kinds_in(model: nn.Module) -> dict[str, Kinds]:
    module_facts = ModuleFacts()
    return {name: _kinds(facts_in(model, name, module_facts)) for name in lists_of(model)}


def _kinds(facts: Sequence[Facts]) -> Kinds:
    first, *rest = facts
    differ = {
        key
        for layer_facts in rest
        for key in first.keys() | layer_facts.keys()
        if first.get(key, _MISSING) != layer_facts.get(key, _MISSING)
    }
    counts = frozenset(
        key
        for key in differ
        for values in [[layer_facts.get(key) for layer_facts in facts]]
        if _counts(values)
        or _is_one(values)
        or (key[0] == _CONFIG and _are_names(values))
        or _counts(_numbers_in(values))
    )
    kinds = [
        frozenset(
            (key, _kind_part(layer_facts[key]) if key in counts else layer_facts[key])
            for key in differ
            if key in layer_facts
        )
        for layer_facts in facts
    ]
    everywhere = frozenset.intersection(*kinds)
    common = {key: value for key, value in first.items() if key not in differ}
    return Kinds(
        tuple(layer_facts - everywhere for layer_facts in kinds),
        common | dict(everywhere),
        counts,
    )


def _counts(values: Sequence[Hashable]) -> bool:
    """True if values only number the layers: they change by one, or differ in each of many."""
    numbered = [(n, value.value) for n, value in enumerate(values) if isinstance(value, Number)]
    numbers = [value for _, value in numbered]
    if len(numbered) < max(2, sum(value is not None for value in values)):
        return False
    if all(type(value) is int for value in numbers):
        start, low = numbered[0]
        for step in (1, -1):  # counted over all layers, or over those that have it
            if all(value == low + step * (n - start) for n, value in numbered):
                return True
            if all(value == low + step * n for n, value in enumerate(numbers)):
                return True
    whole = all(type(value) in (int, float) for value in numbers)
    return whole and len(numbered) > _FEW and len(set(numbers)) == len(numbered)


def _numbers_in(values: Sequence[Hashable]) -> list[Hashable]:
    """Return the one number in names alike otherwise (VibeVoice's caches: ``convnext_layer_7``)."""
    parts = [re.split(r"(\d+)", value) for value in values if isinstance(value, str)]
    alike = {(around[0], *around[2:]) for around in parts if len(around) == 3}
    numbered = len(parts) == len(values) and all(len(around) == 3 for around in parts)
    return [Number(int(n)) for _, n, _ in parts] if numbered and len(alike) == 1 else []


def _is_one(values: Sequence[Hashable]) -> bool:
    """True if all numbers are equal: MiniMax's attention layers store the number of layers."""
    stated = {value for value in values if value is not None}
    return len(stated) == 1 and all(isinstance(value, Number) for value in stated)


def _are_names(values: Sequence[Hashable]) -> bool:
    names = {value for value in values if isinstance(value, str)}
    return len(names) == len(values) > _FEW


def _kind_part(value: Hashable) -> Hashable:
    """Return the part of a counting value that distinguishes kinds: of a float, its sign."""
    if not isinstance(value, Number):
        return "a name" if isinstance(value, str) else value
    if type(value.value) is int:
        return "a count"
    return "0" if value.value == 0 else "above 0" if value.value > 0 else "below 0"


def facts_in(
    model: nn.Module, name: str, module_facts: ModuleFacts | None = None, shorter: bool = False
) -> list[Facts]:
    """Return the facts about each layer of a list. ``shorter``: the config's lists are longer."""
    module_facts = module_facts or ModuleFacts()
    layers: Any = model.get_submodule(name)
    lookups = _config_entries(model, name, len(layers), shorter)
    all_facts: list[Facts] = []
    configs: dict[ConfigText, int] = {}
    for number, layer in enumerate(layers):
        facts: Facts = {(_CONFIG, key): lookup(number) for key, lookup in lookups.items()}
        for inside, module in named_modules(layer) if layer is not None else ():
            for key, value in module_facts.of(module).items():
                if isinstance(value, ConfigText):
                    value = Number(configs.setdefault(value, len(configs)))
                facts[inside, key] = value
        all_facts.append(facts)
    return all_facts


def _config_entries(
    model: nn.Module, name: str, length: int, shorter: bool
) -> dict[str, Callable[[int], Hashable]]:
    """Return the nearest config's entries for layers: key -> layer's number -> entry."""
    parts = name.split(".")
    if length < 2 or any(part.isdigit() for part in parts):
        return {}  # of lists inside layers, the config's list may describe any
    around = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)]
    configs = (vars(module).get("config") for module in around)
    config = next((one for one in configs if _is_config(one)), None)
    lookups: dict[str, Callable[[int], Hashable]] = {}
    own_keys = vars(config).keys() - _common_attributes() if config is not None else ()
    for key, value in ((key, vars(config)[key]) for key in own_keys):
        entries = isinstance(value, (list, tuple)) and len(value)
        is_numbers = rises(value)
        if is_numbers and (shorter or (value[-1] < length and entries != length)):
            lookups[f"in {key}"] = frozenset(value).__contains__
        if (entries == length and not is_numbers) or (shorter and entries >= length):
            lookups[key] = functools.partial(_entry, dict(enumerate(value)))
        if by_number(value):
            lookups[key] = functools.partial(_entry, {int(n): value[n] for n in value})
    return lookups


@functools.cache
def _common_attributes() -> frozenset[str]:  # of every config: labels have numbers but no layers
    from transformers import PretrainedConfig

    return frozenset(vars(PretrainedConfig()))


def _entry(values: Mapping[int, Any], number: int) -> Hashable:
    return plain(values.get(number))


class ModuleFacts:
    def __init__(self) -> None:
        self._at: dict[int, dict[str, Hashable]] = {}
        self._identities: dict[Hashable, bool] = {}
        self._configs: dict[int, Hashable] = {}

    def of(self, module: nn.Module) -> dict[str, Hashable]:
        if id(module) not in self._at:
            facts = dict(self._own(module))
            leaf = not (module._modules or module._parameters or module._buffers)
            if leaf and self._is_identity(module, frozenset(facts.items())):
                facts = {CLASS: "nothing"}  # dropout, at whatever rate
            self._at[id(module)] = facts
        return self._at[id(module)]

    def _own(self, module: nn.Module) -> Iterator[tuple[str, Hashable]]:
        yield CLASS, class_name(type(module))
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
            self._configs[id(config)] = ConfigText(config.to_json_string(use_diff=False))
        return self._configs[id(config)]

    def _is_identity(self, module: nn.Module, facts: Hashable) -> bool:
        if facts not in self._identities:
            self._identities[facts] = is_identity(module)
        return self._identities[facts]


def is_identity(module: nn.Module) -> bool:
    """True if a module returns its input unchanged in eval mode, like dropout."""
    values = torch.tensor([[-1e4, -3.0, -0.5, 0.0], [1e-3, 0.5, 3.0, 1e4]], device="cpu")
    training, module.training = module.training, False
    try:
        with torch.no_grad():
            result = module(values.clone())
    except Exception as error:  # a layer that takes other inputs may raise anything
        note_shortage(error)
        return False
    finally:
        module.training = training
    return isinstance(result, torch.Tensor) and torch.equal(result, values)


def plain(value: Any) -> Hashable:
    """Return a hashable form of a value for comparison; for other objects only their class."""
    if value is None or isinstance(value, (bool, str, torch.dtype)):
        return value
    if isinstance(value, (enum.Enum, slice, range)):
        return repr(value)
    if isinstance(value, (int, float)):
        return Number(value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(repr, value)))
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value[:_LONG]))
    if isinstance(value, dict):
        return tuple((str(key), plain(value[key])) for key in list(value)[:_LONG])
    if isinstance(value, functools.partial):
        return plain((value.func, value.args, value.keywords))
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return class_name(value)
    if isinstance(value, types.MethodType):
        return class_name(value.__func__)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return class_name(type(value))


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_json_string")


def class_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def rises(value: Any) -> bool:
    """True if a list may hold numbers of layers: rising whole numbers from 0 on, at least one."""
    return is_whole_number_list(value) and value == sorted(set(value)) and value[0] >= 0


def by_number(value: Any) -> bool:
    """True for a dictionary of entries for some layers, by their numbers (Gemma 4)."""
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def is_whole_number_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)


def may_name_layers(value: Any) -> bool:
    return rises(value) and len(value) > 1


def names_in_code(model: nn.Module, without: Collection[str] = ()) -> frozenset[str]:
    """Return every name and string in the code of a model's classes and in what that calls."""
    classes = frozenset(type(module) for module in model.modules())
    return _names_in_code_of(classes, frozenset(without))


@functools.lru_cache(maxsize=16)
def _names_in_code_of(classes: frozenset[type], without: frozenset[str]) -> frozenset[str]:
    from transformers import PretrainedConfig, PreTrainedModel

    generic = {*PreTrainedModel.__mro__, *nn.Sequential.__mro__, *nn.ModuleList.__mro__}
    waiting: list[Any] = list(classes)
    packages = {_package(kind) for kind in waiting} | {"transformers"}
    words: set[str] = set()
    visited: set[int] = set()
    while waiting:
        item = waiting.pop()
        item = getattr(item, "fget", None) or getattr(item, "__func__", None) or item
        # only code of the same packages, or of ``transformers``
        if id(item) in visited or _package(item) not in packages - {"torch"}:
            continue
        visited.add(id(item))
        if isinstance(item, type) and not issubclass(item, PretrainedConfig):
            bases = [base for base in item.__mro__ if base not in generic]
            waiting += [value for base in bases for value in vars(base).values()]
        elif type(item) is dict:  # functions by name, as for rotary positions
            waiting += item.values()
        elif inspect.isfunction(item) and item.__name__ not in without:
            names = set(_names_of(item.__code__))
            words |= names
            cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
            called = [item.__globals__[name] for name in names if name in item.__globals__]
            waiting += [x for x in (*cells, *called) if isinstance(x, type | dict) or callable(x)]
    return frozenset(words)


def _package(item: Any) -> str:
    return str(getattr(item, "__module__", "transformers")).partition(".")[0]


def _names_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names_of(constant)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
