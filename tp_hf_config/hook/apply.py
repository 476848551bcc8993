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
from ..model.layer_entries import KEY, entries_of, entries_supported
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
    if key == KEY and entries_supported():
        return entries_of(target)
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


@dataclass(frozen=True)
class Difference:
    fields: Sequence[tuple[str, FieldPath, Any]]  # (module that holds the config, field, new value)
    attributes: Sequence[Attribute]
    buffers: Sequence[Attribute]


def difference(live: nn.Module, old: nn.Module, new: nn.Module) -> Difference:
    """Return the difference between builds from the old and new config, with buffers computed."""
    present = {name for name, _ in live.named_modules()}
    fields: list[tuple[str, FieldPath, Any]] = []
    attributes: list[Attribute] = []
    buffers: list[Attribute] = []
    before = dict(old.named_modules())
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
            fields += [(name, field, value) for field, value in changed]
        attributes += _attributes(name, reference, module)
        buffers += _buffers(name, reference, module, live.get_submodule(name))
    return Difference(fields, attributes, buffers)


def _attributes(name: str, old: nn.Module, new: nn.Module) -> Iterator[Attribute]:
    before = vars(old)
    for key, value in vars(new).items():
        if not is_own(key) or not is_plain(value):
            continue
        previous = before.get(key, _MISSING)
        if previous is _MISSING or (is_plain(previous) and previous != value):
            yield Attribute(name, key, value)


def _buffers(name: str, old: nn.Module, new: nn.Module, live: nn.Module) -> Iterator[Attribute]:
    """Yield the non-persistent buffers and tensor attributes of a module that differ."""
    loose = {key: value for key, value in vars(new).items() if isinstance(value, torch.Tensor)}
    for key, built in {**_unsaved(new), **loose}.items():
        previous = getattr(old, key, None)
        value = built
        if built.is_meta and (previous is None or previous.shape != built.shape):
            value = _same_number(getattr(live, key, None), built)
        if value.is_meta:
            continue
        if (
            previous is None
            or previous.shape != value.shape
            or previous.dtype != value.dtype
            or not torch.equal(previous, value)
        ):
            yield Attribute(name, key, value, None if previous is None else previous.dtype)


def _unsaved(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = {key: module._buffers[key] for key in module._non_persistent_buffers_set}
    return {key: value for key, value in buffers.items() if value is not None}


def _same_number(held: Any, built: torch.Tensor) -> torch.Tensor:
    """Return ``built`` filled with the live buffer's value if that has only one; else ``built``."""
    if isinstance(held, torch.Tensor) and held.numel() and bool((held == held.flatten()[0]).all()):
        return held.flatten()[:1].cpu().expand(built.shape).clone()
    return built


def unfilled_buffers(live: nn.Module, old: nn.Module, new: nn.Module) -> list[str]:
    """Names of non-persistent buffers with a new shape whose values cannot be computed."""
    before, now = dict(old.named_modules()), dict(live.named_modules())
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in new.named_modules()
        if name in before and name in now
        for key, built in _unsaved(module).items()
        if built.is_meta and built.shape != getattr(before[name], key, built).shape
        # filled together with the weights, and the live one holds several numbers
        if _same_number(getattr(now[name], key, None), built).is_meta
    ]


def write(changes: Changes, live: nn.Module, difference: Difference) -> tuple[list[str], list[str]]:
    """Write a difference; return the names of attributes, and of buffers."""
    write_fields(changes, live, difference.fields)
    attributes = _write_attributes(changes, live, difference.attributes)
    return attributes, _write_buffers(changes, live, difference.buffers)


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
            _set_field(changes, target, field[-1], value)
    for (module_name, path), written in entries.items():
        target = _config_part(changes, live, module_name, path)
        layers = entries_of(target)
        for (number, key), value in written.items():
            layers.setdefault(int(number), {})[str(key)] = value
        if _read(target, KEY) != layers:
            changes.set(target, KEY, layers)


def _set_field(changes: Changes, config: Any, key: Any, value: Any) -> None:
    try:
        changes.set(config, key, value)
    except Exception as error:  # a config's setter may raise anything
        raise ConfigSyncError(
            f"{type(config).__name__} refuses {key}={value!r}: {in_one_line(error)}. Nothing was "
            "changed."
        ) from error


def _config_part(changes: Changes, live: nn.Module, module_name: str, path: FieldPath) -> Any:
    """Return the part of a module's config at a path; create missing dicts on the way."""
    target: Any = live.get_submodule(module_name).config
    for key in path:
        if _part(target, key) is None:
            changes.set(target, key, {})
        target = _part(target, key)
    return target


def _write_attributes(
    changes: Changes, live: nn.Module, attributes: Sequence[Attribute]
) -> list[str]:
    """Write plain attributes; return the names of those that changed, without torch's layers."""
    written: list[str] = []
    for item in attributes:
        module = live.get_submodule(item.module)
        if getattr(module, item.key, _MISSING) != item.value:
            changes.set(module, item.key, item.value)
            # sizes of torch's own layers (out_features) say no more than the weights' shapes
            if not type(module).__module__.startswith("torch.nn."):
                written.append(f"{item.module}.{item.key}".lstrip("."))
    return written


def _write_buffers(changes: Changes, live: nn.Module, buffers: Sequence[Attribute]) -> list[str]:
    written: list[str] = []
    for item in buffers:
        module = live.get_submodule(item.module)
        value = item.value
        present = getattr(module, item.key, None)
        if isinstance(present, torch.Tensor):
            same = present.dtype == item.old_dtype  # else the user chose the dtype: keep it
            value = value.to(present.device, value.dtype if same else present.dtype)
        holder = module._buffers if item.key in module._buffers else module
        changes.set(holder, item.key, value.clone())
        written.append(f"{item.module}.{item.key}".lstrip("."))
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
