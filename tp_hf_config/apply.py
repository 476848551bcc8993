"""Write a proved config into the live model, and take everything back if anything fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .reference import FieldPath, config_json
from .ties import Tie, owner

_MISSING = object()
_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"training"}


class Changes:
    """Attribute writes that can be taken back, newest first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, Any, Any]] = []

    def set(self, target: Any, key: Any, value: Any) -> None:
        """Set an attribute, or an item where ``target`` is a dict."""
        self._undo.append((target, key, _read(target, key)))
        _write(target, key, value)

    def roll_back(self) -> None:
        """Put every old value back."""
        while self._undo:
            target, key, value = self._undo.pop()
            _write(target, key, value)


@contextmanager
def all_or_nothing() -> Iterator[Changes]:
    """Changes that stay only if the block ends without an exception."""
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
        return vars(target).get(key, _MISSING)  # the config asks its readers for a layer's own
    return getattr(target, key, _MISSING)


def _part(target: Any, key: Any) -> Any:
    """What stands under a key of a config; settings of single layers as the config holds them."""
    if isinstance(target, dict):
        return target[key if key in target else int(key)]
    if key == "per_layer_config" and hasattr(target, "_heterogeneity_spec"):
        return target._heterogeneity_spec.per_layer_overrides
    return getattr(target, str(key))


def _write(target: Any, key: Any, value: Any) -> None:
    if isinstance(target, dict):
        if value is _MISSING:
            del target[key]
        else:
            target[key] = value
    elif value is _MISSING:
        delattr(target, key)
    else:
        setattr(target, key, value)


@dataclass(frozen=True)
class Attribute:
    """A plain attribute of a module that a fresh model would have with another value."""

    module: str
    key: str
    value: Any


@dataclass(frozen=True)
class Buffer:
    """A buffer that is not saved, or a tensor attribute, that a fresh model would have anew."""

    module: str
    key: str
    value: torch.Tensor
    old_dtype: torch.dtype | None


@dataclass(frozen=True)
class Difference:
    """What a model built from the new config has and one built from the old had not."""

    fields: Sequence[tuple[str, FieldPath, Any]]
    attributes: Sequence[Attribute]
    buffers: Sequence[Buffer]


def difference(live: nn.Module, old: nn.Module, new: nn.Module) -> Difference:
    """Compare two models of one class, built without weights but with real buffers.

    Config fields are compared for every config object that some module holds (an encoder's config
    is often a copy of the model's). Modules that the live model was built without are passed over.
    """
    present = {name for name, _ in live.named_modules()}
    fields: list[tuple[str, FieldPath, Any]] = []
    attributes: list[Attribute] = []
    buffers: list[Buffer] = []
    before = dict(old.named_modules())
    seen: set[int] = set()
    for name, module in new.named_modules():
        reference = before.get(name)
        if reference is None or name not in present:
            continue
        config = vars(module).get("config")
        if config is not None and hasattr(config, "to_json_string") and id(config) not in seen:
            seen.add(id(config))
            changed = changed_values(
                config_json(reference.config, False), config_json(config, False)
            )
            fields += [(name, path, value) for path, value in changed]
        attributes += _attributes(name, reference, module)
        buffers += _buffers(name, reference, module)
    return Difference(fields, attributes, buffers)


def changed_values(old: Any, new: Any, path: FieldPath = ()) -> list[tuple[FieldPath, Any]]:
    """The leaves of a config's JSON that changed; a list counts as one leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[tuple[FieldPath, Any]] = []
        for key, value in new.items():
            if key not in old or old[key] != value:
                found += changed_values(old.get(key), value, (*path, key))
        return found
    return [(path, new)] if old != new else []


def _attributes(name: str, old: nn.Module, new: nn.Module) -> Iterator[Attribute]:
    before = vars(old)
    for key, value in vars(new).items():
        if not is_own(key) or not is_plain(value):
            continue
        previous = before.get(key, _MISSING)
        if previous is _MISSING or (is_plain(previous) and previous != value):
            yield Attribute(name, key, value)


def _buffers(name: str, old: nn.Module, new: nn.Module) -> Iterator[Buffer]:
    unsaved = {key: new._buffers[key] for key in new._non_persistent_buffers_set}
    loose = {key: value for key, value in vars(new).items() if isinstance(value, torch.Tensor)}
    for key, value in {**unsaved, **loose}.items():
        if value is None or value.is_meta:
            continue
        previous = getattr(old, key, None)
        if (
            previous is None
            or previous.shape != value.shape
            or previous.dtype != value.dtype
            or not torch.equal(previous, value)
        ):
            yield Buffer(name, key, value, None if previous is None else previous.dtype)


def is_own(key: str) -> bool:
    """Whether an attribute of a module is its class's own, and not one that all modules have."""
    return key not in _MODULE_INTERNALS


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, texts and ``None`` alone."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(is_plain(item) for item in value.values())
    return value is None or isinstance(value, (bool, int, float, str))


def write_fields(
    changes: Changes, live: nn.Module, fields: Sequence[tuple[str, FieldPath, Any]]
) -> None:
    """Write config values into the config objects that the live modules hold."""
    for module_name, path, value in fields:
        target: Any = live.get_submodule(module_name).config
        for key in path[:-1]:
            target = _part(target, key)
        if _read(target, path[-1]) != value:
            changes.set(target, path[-1], value)


def write_attributes(
    changes: Changes, live: nn.Module, attributes: Sequence[Attribute]
) -> list[str]:
    """Write plain attributes; returns the names of those that were not so already."""
    written: list[str] = []
    for item in attributes:
        module = live.get_submodule(item.module)
        if getattr(module, item.key, _MISSING) != item.value:
            changes.set(module, item.key, item.value)
            written.append(f"{item.module}.{item.key}".lstrip("."))
    return written


def write_buffers(changes: Changes, live: nn.Module, buffers: Sequence[Buffer]) -> list[str]:
    """Write buffers on the device of the live ones; a dtype that the user chose stays."""
    written: list[str] = []
    for item in buffers:
        module = live.get_submodule(item.module)
        value = item.value
        present = getattr(module, item.key, None)
        if isinstance(present, torch.Tensor):
            same = present.dtype == item.old_dtype
            value = value.to(present.device, value.dtype if same else present.dtype)
        holder = module._buffers if item.key in module._buffers else module
        changes.set(holder, item.key, value.clone())
        written.append(f"{item.module}.{item.key}".lstrip("."))
    return written


def write_ties(changes: Changes, live: nn.Module, ties: Sequence[Tie]) -> list[str]:
    """Make every tied group one Parameter again; returns a line for each that was not."""
    written: list[str] = []
    for tie in ties:
        parameter = live.get_parameter(tie.keeper(live))
        apart = [name for name in tie.names if live.get_parameter(name) is not parameter]
        for name in apart:
            module, key = owner(live, name)
            changes.set(module._parameters, key, parameter)
        if apart:
            written.append(" = ".join(tie.names))
    return written
