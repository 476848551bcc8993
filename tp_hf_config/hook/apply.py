"""Write a proved config into the live model, and undo every write if anything fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigSyncError, in_one_line
from ..model.config_json import FieldPath, changed_values, config_json, is_own, is_plain
from ..model.layer_entries import KEY, entries_of
from ..model.tensors import Tie, owner

_MISSING = object()


class Changes:
    """Writes to dicts and to attributes of objects, which can be undone."""

    def __init__(self) -> None:
        self._undo: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # dicts, and what they held

    def set(self, target: Any, key: Any, value: Any) -> None:
        # an attribute may be a property that sets others, and refuses values (out_features)
        values = target if isinstance(target, dict) else vars(target)
        self._undo.append((values, dict(values)))
        if isinstance(target, dict):
            target[key] = value
        else:
            setattr(target, key, value)

    def roll_back(self) -> None:
        while self._undo:
            values, before = self._undo.pop()
            values.clear()
            values.update(before)


@contextmanager
def all_or_nothing() -> Iterator[Changes]:
    changes = Changes()
    try:
        yield changes
    except BaseException:
        changes.roll_back()
        raise


def _read(target: Any, key: Any) -> Any:
    if isinstance(target, dict):
        return target.get(key, _MISSING)
    if key in (getattr(target, "per_layer_attributes", None) or ()):
        return vars(target).get(key, _MISSING)  # getattr would ask for one layer's value
    return getattr(target, key, _MISSING)


def _part(target: Any, key: Any) -> Any:
    if isinstance(target, dict):
        return target[key if key in target else int(key)]
    return getattr(target, str(key))


@dataclass(frozen=True)
class Attribute:
    """A plain attribute, non-persistent buffer or other tensor that differs in the new build."""

    module: str  # name in the model
    key: str
    value: Any
    old_dtype: torch.dtype | None = None  # of a tensor in the old reference build

    @property
    def name(self) -> str:
        return f"{self.module}.{self.key}".lstrip(".")


@dataclass(frozen=True)
class Difference:
    """What a build from the new config changes beside parameters and saved buffers."""

    fields: list[tuple[str, FieldPath, Any]]  # (module that holds the config, field, new value)
    attributes: list[Attribute]
    unfilled: list[str]  # non-persistent buffers of a new shape whose values cannot be computed


def difference(live: nn.Module, old: nn.Module, new: nn.Module) -> Difference:
    """Return the difference between builds from the old and new config, with buffers computed."""
    present, before = dict(live.named_modules()), dict(old.named_modules())
    result = Difference([], [], [])
    compared: set[int] = set()
    for name, module in new.named_modules():
        reference = before.get(name)
        if reference is None or name not in present:
            continue
        config = vars(module).get("config")  # an encoder often has a copy of the model's config
        if config is not None and hasattr(config, "to_json_string") and id(config) not in compared:
            compared.add(id(config))
            changed = changed_values(
                config_json(reference.config, False), config_json(config, False)
            )
            result.fields.extend((name, field, value) for field, value in changed)
        for key, value in vars(module).items():
            previous = vars(reference).get(key, _MISSING)
            comparable = previous is _MISSING or is_plain(previous)
            if is_own(key) and is_plain(value) and comparable and previous != value:
                result.attributes.append(Attribute(name, key, value))
        _compare_buffers(result, name, reference, module, present[name])
    return result


def _compare_buffers(
    result: Difference, name: str, old: nn.Module, new: nn.Module, live: nn.Module
) -> None:
    """Add the non-persistent buffers and tensor attributes of a module that differ."""
    unsaved = {key: new._buffers[key] for key in new._non_persistent_buffers_set}
    for key, value in (unsaved | vars(new)).items():
        if not isinstance(value, torch.Tensor):
            continue
        previous: Any = getattr(old, key, None)
        dtype = None if previous is None else previous.dtype
        reshaped = previous is None or previous.shape != value.shape
        if value.is_meta and reshaped:  # it is filled together with the weights
            held: Any = getattr(live, key, None)
            number = held.flatten()[:1] if isinstance(held, torch.Tensor) else None
            if number is not None and number.numel() and torch.equal(held, number.expand_as(held)):
                value = number.cpu().expand(value.shape).clone()
        attribute = Attribute(name, key, value, dtype)
        if value.is_meta:
            if reshaped and previous is not None and key in unsaved:
                result.unfilled.append(attribute.name)
        elif reshaped or dtype != value.dtype or not torch.equal(previous, value):
            result.attributes.append(attribute)


def write(changes: Changes, live: nn.Module, difference: Difference) -> list[Attribute]:
    """Write a difference; return the attributes that changed."""
    write_fields(changes, live, difference.fields)
    return _write_values(changes, live, difference.attributes)


def write_fields(
    changes: Changes, live: nn.Module, fields: Sequence[tuple[str, FieldPath, Any]]
) -> None:
    entries: dict[tuple[str, FieldPath], dict[FieldPath, Any]] = {}
    for module_name, field, value in fields:
        if KEY in field:
            at = field.index(KEY)
            entries.setdefault((module_name, field[:at]), {})[field[at + 1 :]] = value
            continue
        target = _config_part(changes, live, module_name, field[:-1])
        if _read(target, field[-1]) != value:
            try:
                changes.set(target, field[-1], value)
            except Exception as error:  # a config's setter may raise anything
                raise ConfigSyncError(
                    f"{type(target).__name__} refuses {field[-1]}={value!r}: "
                    f"{in_one_line(error)}. Nothing was changed."
                ) from error
    for (module_name, path), written in entries.items():
        target = _config_part(changes, live, module_name, path)
        layers = entries_of(target)
        for (number, key), value in written.items():
            layers.setdefault(int(number), {})[str(key)] = value
        if entries_of(target) != layers:
            changes.set(target, KEY, layers)


def _config_part(changes: Changes, live: nn.Module, module_name: str, path: FieldPath) -> Any:
    """Return the part of a module's config at a path; create missing dicts on the way."""
    target: Any = live.get_submodule(module_name).config
    for key in path:
        if _part(target, key) is None:
            changes.set(target, key, {})
        target = _part(target, key)
    return target


def _write_values(changes: Changes, live: nn.Module, items: Sequence[Attribute]) -> list[Attribute]:
    written: list[Attribute] = []
    for item in items:
        module, value = live.get_submodule(item.module), item.value
        present = getattr(module, item.key, _MISSING)
        if isinstance(value, torch.Tensor):
            if isinstance(present, torch.Tensor):
                same = present.dtype == item.old_dtype  # else the user chose the dtype: keep it
                value = value.to(present.device, value.dtype if same else present.dtype)
            value = value.clone()
        elif present == value:
            continue
        changes.set(module._buffers if item.key in module._buffers else module, item.key, value)
        # sizes of torch's own layers (out_features) say no more than the weights' shapes
        if not type(module).__module__.startswith("torch.nn."):
            written.append(item)
    return written


def write_ties(changes: Changes, live: nn.Module, ties: Sequence[Tie]) -> list[str]:
    """Make each tied group one Parameter again; return the names of each group that was not."""
    written: list[str] = []
    for tie in ties:
        parameter = live.get_parameter(tie.keeper(live))
        separate = [name for name in tie.names if live.get_parameter(name) is not parameter]
        for name in separate:
            module, key = owner(live, name)
            changes.set(module._parameters, key, parameter)
        if separate:
            written.append(" = ".join(tie.names))
    return written
