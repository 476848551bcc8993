"""Update numbers in the modules around a model that repeat a config field."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model.config_json import FieldPath, field_name, is_own, is_plain
from .apply import Changes

_UNKNOWN = object()


@dataclass(frozen=True)
class Number:
    """A whole number in a module around the model that has the value of a config field.

    Attributes:
        name: the number's full name, for messages.
        module: the module that has it.
        key: the module's attribute.
        field: the config field.
        value: the value of both before the field changes.
        readers: modules that hold the model and say the same value under the same name, by a
            property or a getter.
    """

    name: str
    module: nn.Module
    key: str
    field: FieldPath
    value: int
    readers: tuple[nn.Module, ...]


class EnclosingModules:
    """The modules around a model, whose numbers follow the model's config.

    A number follows a field if a module that holds the model says another number of the same name
    (``embedding_dimension``, or ``get_embedding_dimension()``), and that one changes with the
    field.  A number that only equals a field's old value is reported, not changed.

    Args:
        model: the Hugging Face model.
        pruned: the module that the pruner prunes.
        holders: the outermost modules that hold the model, as far as the garbage collector finds
            them: not those that ``gc.freeze()`` has put aside.
    """

    def __init__(self, model: nn.Module, pruned: nn.Module, holders: Sequence[nn.Module]):
        held = [holder for holder in holders if holder is not model]
        if pruned is not model and not any(pruned in holder.modules() for holder in held):
            held.append(pruned)
        self._holders = [weakref.ref(holder) for holder in held]
        self._model, self._pruned = model, pruned

    def numbers(self, changed: Mapping[FieldPath, tuple[Any, Any]]) -> list[Number]:
        """Return the numbers that equal a field's old value; call it before the fields are written.

        ``changed``: field -> (old value, new value).
        """
        olds = {
            old: field for field, (old, _) in reversed(list(changed.items())) if type(old) is int
        }
        outside = list(self._outside()) if olds else []
        holding = [
            holder for _, holder in outside if any(part is self._model for part in holder.modules())
        ]
        return [
            Number(
                f"{name}.{key}",
                module,
                key,
                olds[value],
                value,
                tuple(
                    holder
                    for holder in holding
                    if holder is not module and _stated_value(holder, key) == value
                ),
            )
            for name, module in outside
            for key, value in vars(module).items()
            if type(value) is int and value in olds and is_own(key)
        ]

    def follow(
        self, changes: Changes, numbers: list[Number], changed: Mapping[FieldPath, tuple[Any, Any]]
    ) -> tuple[list[str], list[str]]:
        """Write the numbers that are proved to follow; call it after the fields are written.

        Args:
            changes: records the writes.
            numbers: what :meth:`numbers` returned.
            changed: field -> (old value, new value).

        Returns:
            The names of the attributes that were written, and notes on numbers that stay.
        """
        written: list[str] = []
        for number in numbers:
            new = changed[number.field][1]
            if any(_stated_value(reader, number.key) == new for reader in number.readers):
                prefix = number.name.removesuffix(number.key)
                for key, value in {number.key: new, **_derived(number, new)}.items():
                    if getattr(number.module, key) != value:
                        changes.set(number.module, key, value)
                        written.append(f"{prefix}{key}")
        return written, [
            f"{number.name} ({type(number.module).__name__}) is still {number.value}, as "
            f"{field_name(number.field)} was: it stands outside the model, and nothing proves that "
            f"it means the same. Set it to {changed[number.field][1]} if it does"
            for number in numbers
            if getattr(number.module, number.key) == number.value
        ]

    def _outside(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules around the model with names for messages."""
        inside = {id(module) for module in self._model.modules()}
        for holder in (ref() for ref in self._holders):
            if holder is None:  # no longer alive
                continue
            first = "" if holder is self._pruned else type(holder).__name__
            for name, module in holder.named_modules():
                if id(module) not in inside:
                    inside.add(id(module))
                    yield ".".join(filter(None, (first, name))) or type(module).__name__, module


def _stated_value(module: nn.Module, key: str) -> Any:
    """Return the value of a module's property ``key`` or getter ``get_key``, or ``_UNKNOWN``."""
    try:
        if isinstance(getattr(type(module), key, None), property):
            return getattr(module, key)
        getter = getattr(type(module), f"get_{key}", None)
        return getter(module) if inspect.isfunction(getter) else _UNKNOWN
    except Exception:  # the getter may need arguments, or another state
        return _UNKNOWN


def _derived(number: Number, new: int) -> dict[str, Any]:
    """Return the attributes that the module's constructor derives from the new number, with values.

    There are none unless the module has no weights and no submodules, its constructor takes
    attributes by their names, and calling it with them gives the module as it is.
    """
    module = number.module
    if module._modules or module._parameters or module._buffers:
        return {}
    names = list(inspect.signature(type(module)).parameters)
    given = {name: vars(module)[name] for name in names if name in vars(module)}
    if number.key not in given:
        return {}
    try:
        before, after = (
            {key: value for key, value in vars(type(module)(**values)).items() if is_own(key)}
            for values in (given, {**given, number.key: new})
        )
    except Exception:  # the constructor needs more arguments
        return {}
    plain = {key for key, value in before.items() if is_plain(value)}
    if any(before[key] != vars(module).get(key, _UNKNOWN) for key in plain):
        return {}
    return {key: after[key] for key in plain if after.get(key, before[key]) != before[key]}
