"""Numbers in the modules around a model that say what a config field says."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .apply import Changes, is_own, is_plain
from .reference import FieldPath, field_name

_UNKNOWN = object()


@dataclass(frozen=True)
class Number:
    """A whole number in a module around the model that a field has too.

    Attributes:
        name: where it stands, for people.
        module: the module.
        key: the attribute.
        field: the field.
        value: what both say before the field changes.
        readers: the modules that hold the model and have something to ask of the same name.
    """

    name: str
    module: nn.Module
    key: str
    field: FieldPath
    value: int
    readers: tuple[nn.Module, ...]


class Beside:
    """The modules around a model, followed where they say what its config says.

    A number follows a field where a module that holds the model gives another number of the same
    name (``embedding_dimension``, or ``get_embedding_dimension()``) and that one moves with the
    field. What equals a field's old value only is told.
    """

    def __init__(self, model: nn.Module, pruned: nn.Module, holders: Sequence[nn.Module]):
        self._holders = [weakref.ref(one) for one in holders if one is not model]
        self._model, self._pruned = model, pruned

    def numbers(self, changed: Mapping[FieldPath, tuple[Any, Any]]) -> list[Number]:
        """The numbers that are as a field was; to be called before the fields are written."""
        olds = {old: path for path, (old, _) in reversed(list(changed.items())) if type(old) is int}
        outside = list(self._outside()) if olds else []
        holding = [one for _, one in outside if any(part is self._model for part in one.modules())]
        return [
            Number(
                f"{name}.{key}",
                module,
                key,
                olds[value],
                value,
                tuple(one for one in holding if one is not module and _asked(one, key) == value),
            )
            for name, module in outside
            for key, value in vars(module).items()
            if type(value) is int and value in olds and is_own(key)
        ]

    def follow(
        self, changes: Changes, numbers: list[Number], changed: Mapping[FieldPath, tuple[Any, Any]]
    ) -> tuple[list[str], list[str]]:
        """Write what is proved, once the fields are written; what was, and what to know."""
        written: list[str] = []
        for one in numbers:
            new = changed[one.field][1]
            if any(_asked(reader, one.key) == new for reader in one.readers):
                prefix = one.name.removesuffix(one.key)
                for key, value in {one.key: new, **_derived(one, new)}.items():
                    if getattr(one.module, key) != value:
                        changes.set(one.module, key, value)
                        written.append(f"{prefix}{key}")
        return written, [
            f"{one.name} ({type(one.module).__name__}) is still {one.value}, as "
            f"{field_name(one.field)} was: it stands outside the model, and nothing proves that it "
            f"means the same. Set it to {changed[one.field][1]} if it does"
            for one in numbers
            if getattr(one.module, one.key) == one.value
        ]

    def _outside(self) -> Iterator[tuple[str, nn.Module]]:
        inside = {id(module) for module in self._model.modules()}
        for holder in (ref() for ref in self._holders):
            if holder is None:  # gone
                continue
            first = "" if holder is self._pruned else type(holder).__name__
            for name, module in holder.named_modules():
                if id(module) not in inside:
                    inside.add(id(module))
                    yield ".".join(filter(None, (first, name))) or type(module).__name__, module


def _asked(module: nn.Module, key: str) -> Any:
    """What a module says of a name by a property or a getter without arguments."""
    try:
        if isinstance(getattr(type(module), key, None), property):
            return getattr(module, key)
        getter = getattr(type(module), f"get_{key}", None)
        return getter(module) if inspect.isfunction(getter) else _UNKNOWN
    except Exception:  # it may want arguments, or another state
        return _UNKNOWN


def _derived(one: Number, new: int) -> dict[str, Any]:
    """What the module's constructor makes of the new number, where it makes the module as it is.

    Only of modules without weights and parts, whose constructor is given attributes by their names.
    """
    module = one.module
    if module._modules or module._parameters or module._buffers:
        return {}
    names = list(inspect.signature(type(module)).parameters)
    given = {name: vars(module)[name] for name in names if name in vars(module)}
    if one.key not in given:
        return {}
    try:
        before, after = (
            {key: value for key, value in vars(type(module)(**values)).items() if is_own(key)}
            for values in (given, {**given, one.key: new})
        )
    except Exception:  # it wants more than that
        return {}
    plain = {key for key, value in before.items() if is_plain(value)}
    if any(before[key] != vars(module).get(key, _UNKNOWN) for key in plain):
        return {}
    return {key: after[key] for key in plain if after.get(key, before[key]) != before[key]}
