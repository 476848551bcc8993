"""Find the config with which a class builds a model without some of its layers.

No field is known by name. Candidates are settings that may count layers, lists with an entry for
each layer, lists of layer numbers, and rules. The class is built from each; a config is accepted
only if the kept layers and everything around the layers are built as before.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations, islice, product
from typing import Any

from torch import nn

from ..model.build import Builder, Refusal
from ..model.config_json import (
    FieldPath,
    config_json,
    plain_fields,
    value_at,
    with_values,
    without_field,
)
from ..model.layer_class import layer_lists
from ..model.shapes import Shapes, named_modules, shapes
from ..model.surroundings import note_shortage
from .layer_kinds import (
    CLASS,
    ConfigText,
    ModuleFacts,
    Number,
    by_number,
    class_name,
    kinds_in,
    lists_of,
    names_in_code,
    rises,
)
from .lower_depth import FEATURES, entries_of_kept, of_every_config, restated

Change = dict[FieldPath, Any]  # field -> its new value
_MOST_LISTS = 32  # combinations of lists that are tried for one setting that counts layers
_MOST_RULES = 96  # restatements of rules that are tried for one such setting; each is a build
_MOST_KINDS = 4  # kinds of layers that a list may name; each doubles the configs that are built


def layer_lists_in(
    builder: Builder, data: dict[str, Any], model: nn.Module
) -> dict[str, Refusal | None]:
    """Return the outermost lists of layers by name, each with None or why it cannot be shorter."""
    found: dict[str, Refusal | None] = {}
    held: set[int] = set()
    own = layer_lists(builder.model_class)  # layers that differ
    for name, layers in lists_of(model).items():
        inside = any(
            name.startswith(f"{outer}.") for outer, reason in found.items() if reason is None
        )
        # only a list that cannot be made shorter is searched for lists inside
        if inside or id(layers) in held or not (name.endswith(own) or _may_be_layers(layers)):
            continue
        held.add(id(layers))
        change = config_without(builder, data, model, name, range(len(layers) - 1))
        found[name] = change if isinstance(change, Refusal) else None
    return found


def _may_be_layers(layers: nn.Module) -> bool:
    """True if a list has two entries of one class and width that consist of several modules."""
    # a stage of a vision model is no layer: it is wider than the one before
    entries = [(type(layer), shapes(layer)) for layer in layers.children() if any(layer.children())]
    return any(
        one_class is other_class and not any(other.get(key, s) != s for key, s in one.items())
        for (one_class, one), (other_class, other) in combinations(entries, 2)
    )


def config_without(
    builder: Builder, data: dict[str, Any], model: nn.Module, name: str, keep: Sequence[int]
) -> Change | Refusal:
    """Return the fields with which the class builds only the layers ``keep`` of a list."""
    search = _Search(builder, data, model, name, tuple(keep))
    return search.in_step() or search.with_other_rules() or search.refusal()


def settings_of_left(
    builder: Builder, data: dict[str, Any], model: nn.Module, live: Shapes
) -> Change:
    """Return the settings that build the layers that a live model still has; empty: none do."""
    settings: Change = {}
    for name in lists_of(model):
        place = name.count(".") + 1  # of a layer's number in the names of its tensors
        before, left = (
            len({key.split(".")[place] for key in found if key.startswith(f"{name}.")})
            for found in (shapes(model), live)
        )
        change = config_without(builder, data, model, name, range(left)) if left < before else {}
        settings |= {} if isinstance(change, Refusal) else change
    return settings if builder.shapes_at(with_values(data, settings)) == live else {}


class _Search:
    """The search for one config, and what was wrong with the configs that were tried."""

    def __init__(
        self,
        builder: Builder,
        data: dict[str, Any],
        model: nn.Module,
        name: str,
        keep: tuple[int, ...],
    ):
        self._builder, self._data, self._model = builder, data, model
        self._name, self._keep = name, keep
        self._kept = KeptLayers(model, name, keep)
        self._kinds = kinds_in(model)[name]
        # changes that give the list its new length or are refused, and where their setting is
        self._bases: list[tuple[FieldPath, Change]] = []
        self._results: dict[str, bool | None] = {}  # of configs that were tried, by their JSON
        self._reason = ""
        self._refused = ""

    def in_step(self) -> Change | None:
        """Return a change that counts fewer layers and shortens the config's lists accordingly."""
        length = self._kept.length
        for node, counted in _counts(self._data, length, len(self._keep)):
            options = list(self._lists(node, counted))
            ends = options if len(options) < 2 else [options[0], options[-1]]
            results = [self._try(node, {**counted, **change}) for change in ends]
            for change, result in zip(ends, results, strict=True):
                if result is True:
                    return {**counted, **change}
            if not any(result is None for result in results):
                continue  # it counts something else
            for change in options[1:-1]:
                if self._try(node, {**counted, **change}) is True:
                    return {**counted, **change}
        return None

    def with_other_rules(self) -> Change | None:
        for node, counted in self._bases:
            for rule in islice(self._rules(node, counted), _MOST_RULES):
                change = {**counted, **rule}
                if self._try(None, change) is True:
                    return change
        return None

    def refusal(self) -> Refusal:
        return Refusal(
            self._reason or self._refused or f"no field of the config counts {self._name}"
        )

    def _try(self, node: FieldPath | None, change: Change) -> bool | None:
        """True if a change works; None if it may with others beside ``node``; else False."""
        data = with_values(self._data, change)
        if (key := json.dumps(data, default=repr)) not in self._results:
            self._results[key] = self._result(data)
            if node is not None and self._results[key] is None:
                self._bases.append((node, change))
        return self._results[key]

    def _result(self, data: dict[str, Any]) -> bool | None:
        """Return what ``_try`` returns of a config, and note the first refusal and difference."""
        built = self._builder.build(data)
        if isinstance(built, Refusal):
            self._refused = self._refused or built.reason
            return None
        reason = self._kept.difference(built)
        if reason is None or not self._kept.has_length(built):
            return reason is None
        self._reason = self._reason or reason
        return None

    def _lists(self, node: FieldPath, counted: Change) -> Iterator[Change]:
        """Yield changes of the lists beside a setting: of all of them first, of none last."""
        values = value_at(self._data, node)
        choices: dict[FieldPath, list[Any]] = {}
        for key, value in values.items() if isinstance(values, dict) else ():
            field = (*node, key)
            options = _entries_left(value, self._kept.length, self._keep)
            if (
                options
                and key not in of_every_config()
                and self._is_of_layers(field, value, counted)
            ):
                choices[field] = options
        every = product(*([*options, None] for options in choices.values()))
        ordered = sorted(every, key=lambda chosen: sum(one is None for one in chosen))
        stages = self._stages(node, values)
        for chosen in (*islice(ordered, _MOST_LISTS), *ordered[_MOST_LISTS:][-1:]):
            change = {
                field: value
                for field, value in zip(choices, chosen, strict=True)
                if value is not None
            }
            yield {**change, **stages}

    def _is_of_layers(self, field: FieldPath, value: Any, counted: Change) -> bool:
        """True if a list or dictionary is about layers, and not as long by chance."""
        default = self._default(field, counted)
        if isinstance(default, list) and len(default) == len(self._keep):
            return True  # the config class makes it as long as there are layers
        if isinstance(default, list) and len(default) == len(value):
            # it is as long for fewer layers, and the class builds them with it: Mamba 2's two
            # limits of time steps, beside two layers
            built = self._builder.build(with_values(self._data, counted))
            if not isinstance(built, Refusal) and self._kept.difference(built) is None:
                return False
        if isinstance(value, dict) or len(value) != self._kept.length:
            return field[-1] in names_in_code(self._model)  # layer numbers: some code reads them
        shorter = self._builder.build(with_values(self._data, {field: value[:-1]}))
        return isinstance(shorter, Refusal) or facts_of(shorter) != facts_of(self._model)

    def _default(self, field: FieldPath, counted: Change) -> Any:
        """Return what the config class sets for a field that is not given, with fewer layers."""
        data = with_values(self._data, counted)
        beside = [
            (*field[:-1], key)
            for key, value in value_at(data, field[:-1]).items()
            if isinstance(value, list) and len(value) == self._kept.length
        ]
        # the config class may refuse the other lists, which are as long as there were layers
        for unset in ([field], [field, *beside]):
            fewer = functools.reduce(without_field, dict.fromkeys(unset), data)
            try:
                return value_at(config_json(self._builder.config(fewer), use_diff=False), field)
            except Exception as error:  # a config class may refuse with any exception
                note_shortage(error)
        return None

    def _stages(self, node: FieldPath, values: Any) -> Change:
        """Return a backbone's output stages by their new numbers, without their names."""
        if not isinstance(values, dict) or not values.keys() >= FEATURES:
            return {}
        change: Change = {}
        for key, value in values.items():
            field = (*node, key)
            if key in FEATURES:
                numbers = rises(value)
                # a removed stage is replaced by the stage before it
                new = [sum(n < stage for n in self._keep) for stage in value] if numbers else None
                change[field] = new
            elif isinstance(value, list) and len(value) == self._kept.length + 1:
                change[field] = value[: len(self._keep) + 1]
        return change

    def _rules(self, node: FieldPath, counted: Change) -> Iterator[Change]:
        """Yield changes of rules: counts of the first or last layers, strides, lists of layers."""
        values = value_at(self._data, node)
        if not isinstance(values, dict):
            return
        numbers = {
            key: value
            for key, value in values.items()
            if type(value) is int and 0 < value <= self._kept.length
            if (*node, key) not in counted and key not in of_every_config()
        }
        counts: list[Change] = [
            {(*node, key): count}
            for key, count in restated(values, self._kept.length, self._keep)
            if key in numbers
        ]
        yield from counts
        off: list[Change] = [{(*node, step): 1} for step, value in numbers.items() if value > 1]
        named: list[Change] = [
            {(*node, key): layers}
            for key, value in values.items()
            if (value == [] or rises(value)) and key not in of_every_config()
            for layers in self._named(key)
        ]
        # a list that names layers replaces a rule, or both hold
        for other in ({}, *off, *counts):
            yield from ({**one, **other} for one in named)

    def _named(self, setting: str) -> Iterator[list[int]]:
        """Yield the layer numbers that a list may hold: of no kind, of one, of several."""
        # what this list itself says of the layers does not distinguish kinds
        first = self._kinds.without_settings({setting}).first
        kinds = list(dict.fromkeys(first[number] for number in self._keep))[:_MOST_KINDS]
        for count in range(len(kinds) + 1):
            for chosen in combinations(kinds, count):
                yield [new for new, number in enumerate(self._keep) if first[number] in chosen]


def _counts(data: dict[str, Any], length: int, count: int) -> Iterator[tuple[FieldPath, Change]]:
    """Yield settings that may count layers: where they are, and with their new values."""
    for field, value in plain_fields(data):
        if type(value) is int and 0 <= value - length <= 1:  # one more: Mask2Former's decoder
            yield field[:-1], {field: count + value - length}
        elif isinstance(value, list):  # Swin's ``depths``
            for place, entry in enumerate(value):
                if type(entry) is int and entry == length:
                    yield field, {(*field, place): count}


def _entries_left(value: Any, length: int, keep: tuple[int, ...]) -> list[Any]:
    """Return what a list or dictionary may be once some layers are removed."""
    options: list[Any] = []
    if isinstance(value, list) and len(value) == length:
        options.append([value[number] for number in keep])
    if rises(value) and value[-1] < length:
        options.append([keep.index(number) for number in value if number in keep])
    if by_number(value) and max(map(int, value)) < length:
        options.append(entries_of_kept(value, keep))
    return [option for option in options if option != value]


Key = tuple[str, str]  # (module inside a layer, its attribute)
_MISSING = "nothing"
_Pair = tuple[Hashable, Hashable]


class KeptLayers:
    """The layers of a list that are kept, by their rising numbers, and everything around them."""

    def __init__(self, model: nn.Module, name: str, keep: tuple[int, ...]):
        self._name, self._keep = name, keep
        layers = list(model.get_submodule(name).children())
        self.length = len(layers)  # before any is removed
        self._layers = [facts_of(layers[number]) for number in keep]
        self._around = _around(model, name)

    def has_length(self, built: nn.Module) -> bool:
        layers = lists_of(built).get(self._name)
        return layers is not None and len(layers) == len(self._keep)

    def difference(self, built: nn.Module) -> str | None:
        """Return how a build differs from the kept layers and their surroundings, or None."""
        if not self.has_length(built):
            return f"{self._name} would not have {len(self._keep)} layers"
        around = _around(built, self._name)
        for part in dict.fromkeys((*self._around, *around)):
            if self._around.get(part) != around.get(part):
                return f"with fewer layers the config also builds another {part}"
        layers = [facts_of(layer) for layer in built.get_submodule(self._name).children()]
        for key in dict.fromkeys(key for facts in (*self._layers, *layers) for key in facts):
            pairs = [
                (one.get(key, _MISSING), other.get(key, _MISSING))
                for one, other in zip(self._layers, layers, strict=True)
            ]
            if not self._agree(pairs):
                return self._in_words(key, pairs)
        return None

    def _agree(self, pairs: Sequence[_Pair]) -> bool:
        """True if the values of one attribute are equal in all layers, or number the layers."""
        if all(old == new for old, new in pairs):
            return True
        numbers: list[tuple[int, int, int, int]] = []
        for place, (old, new) in enumerate(pairs):
            if isinstance(old, Number) and isinstance(new, Number):
                if type(old.value) is not int or type(new.value) is not int:
                    continue  # a rate may be scheduled by depth; a run shows whether it matters
                numbers.append((self._keep[place], place, old.value, new.value))
            elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == self.length:
                continue  # a list with an entry for each layer that all layers hold
            elif old != new:
                return False
        shift = len(self._keep) - self.length
        up = all(new - old == place - was for was, place, old, new in numbers)
        down = all(new - old == shift - (place - was) for was, place, old, new in numbers)
        names = dict(zip(self._keep, range(len(self._keep)), strict=True))
        other = all(names.get(old) == new for _, _, old, new in numbers)
        return up or down or other

    def _in_words(self, key: Key, pairs: Sequence[_Pair]) -> str:
        place = next(place for place, (old, new) in enumerate(pairs) if old != new)
        was, (old, new) = self._keep[place], pairs[place]
        inside, attribute = key
        part = ".".join(filter(None, (self._name, str(was), inside)))
        if attribute == CLASS:
            return f"{part} is a {_word(old)}, and as layer {place} it would be a {_word(new)}"
        return f"{part}.{attribute} is {_word(old)}, and as layer {place} it would be {_word(new)}"


def facts_of(model: nn.Module) -> dict[Key, Hashable]:
    module_facts = ModuleFacts()
    return {
        (inside, key): value
        for inside, module in named_modules(model)
        for key, value in module_facts.of(module).items()
        if not isinstance(value, ConfigText)
    }


def _around(model: nn.Module, name: str) -> dict[str, Hashable]:
    """Return the class of every module outside a list, and the shape of every tensor there."""
    layers = model.get_submodule(name)
    modules = list(named_modules(model))
    inside = tuple(f"{alias}." for alias, module in modules if module is layers)
    classes: dict[str, Hashable] = {key: class_name(type(module)) for key, module in modules}
    tensors: dict[str, Hashable] = dict(shapes(model).items())
    return {key: v for key, v in (classes | tensors).items() if not key.startswith(inside)}


def _word(value: Hashable) -> str:
    if isinstance(value, Number):
        return str(value.value)
    return value.rpartition(".")[2] if isinstance(value, str) else str(value)
