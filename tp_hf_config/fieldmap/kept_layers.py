"""Compare a build with fewer layers with the layers that are to stay."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import nn

from ..model.shapes import named_modules, shapes
from .layer_kinds import CLASS, ConfigText, ModuleFacts, Number, class_name, lists_of

Key = tuple[str, str]
"""A module inside a layer, and its attribute."""
_MISSING = "nothing"
_Pair = tuple[Hashable, Hashable]


class KeptLayers:
    """The layers of a list that are to stay, by their rising numbers, and everything around them.

    ``length`` is how many layers there are now.
    """

    def __init__(self, model: nn.Module, name: str, keep: tuple[int, ...]):
        self._name, self._keep = name, keep
        layers = list(model.get_submodule(name).children())
        self.length = len(layers)
        self._layers = [facts_of(layers[number]) for number in keep]
        self._around = _around(model, name)

    def has_length(self, built: nn.Module) -> bool:
        """True if a build has as many layers in this list as are to stay."""
        layers = lists_of(built).get(self._name)
        return layers is not None and len(layers) == len(self._keep)

    def difference(self, built: nn.Module) -> str | None:
        """Return what a build has other than the layers that stay; ``None`` if it is the same.

        Numbers that number the layers are to be the new ones. Rates may differ, since some follow
        the depth; running the model shows whether they matter.
        """
        if not self.has_length(built):
            return f"{self._name} does not get {len(self._keep)} layers"
        around = _around(built, self._name)
        for part in dict.fromkeys((*self._around, *around)):
            if self._around.get(part) != around.get(part):
                return f"with fewer layers the config builds another {part} too"
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
                    continue
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
        """Return which layer would be built otherwise, and how."""
        place = next(place for place, (old, new) in enumerate(pairs) if old != new)
        was, (old, new) = self._keep[place], pairs[place]
        inside, attribute = key
        part = ".".join(filter(None, (self._name, str(was), inside)))
        if attribute == CLASS:
            return f"{part} is a {_word(old)}, and as layer {place} it would be a {_word(new)}"
        return f"{part}.{attribute} is {_word(old)}, and as layer {place} it would be {_word(new)}"


def facts_of(model: nn.Module) -> dict[Key, Hashable]:
    """Return the facts about a layer or a whole model, without the configs in its modules."""
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
    """Return a fact's value as people write it; of a class, its last name."""
    if isinstance(value, Number):
        return str(value.value)
    return value.rpartition(".")[2] if isinstance(value, str) else str(value)
