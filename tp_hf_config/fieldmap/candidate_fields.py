"""Find the config fields worth probing: those that the class reads when it is built.

Fields that are read but not declared are included (``getattr(config, "head_dim", None)``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..model.build import Builder, Refusal
from ..model.config_json import FieldPath, config_nodes, value_at
from ..model.surroundings import replaced

_FEW = 64
"""Entries up to which a dictionary in a config may hold widths."""


def candidates(
    builder: Builder, data: dict[str, Any]
) -> tuple[dict[FieldPath, int], list[FieldPath]]:
    """Return the fields worth probing: the whole numbers and unset fields that the class reads.

    The first are numbers above 0, with their values. The second may hold a number, and are sorted
    by their last key.
    """
    live = builder.config(data)
    nodes = dict(config_nodes(live))
    with _recording_reads({type(node) for node in nodes.values()}) as reads:
        builder.build(data)
    declared: dict[FieldPath, int] = {}
    unset: list[FieldPath] = []
    for nested, node in nodes.items():
        part = value_at(data, nested)
        part = part if isinstance(part, dict) else {}
        for name in sorted(reads.get(type(node), ())):
            value = part.get(name)
            field: FieldPath = (*nested, name)
            entries = {} if field in nodes else dict(_entries(value, field))
            counts = {key: n for key, n in entries.items() if type(n) is int and n > 0}
            declared.update(counts)
            own = not name.startswith("_") and not _is_machinery(name)
            if value is None and own and _takes_numbers(type(node), name):
                unset.append(field)
    return declared, sorted(unset, key=lambda field: str(field[-1]))  # same names side by side


def numbers_read(
    builder: Builder, data: dict[str, Any], run: Callable[[nn.Module], Any]
) -> dict[FieldPath, int]:
    """Return the whole numbers above 0 that the class reads while it runs.

    ``run`` runs a model on the meta device.
    """
    model: Any = builder.build(data)
    if isinstance(model, Refusal):
        return {}
    nodes = dict(config_nodes(model.config))
    with _recording_reads({type(node) for node in nodes.values()}) as reads:
        run(model)
    numbers: dict[FieldPath, int] = {}
    for nested, node in nodes.items():
        part = value_at(data, nested)
        for name in sorted(reads.get(type(node), ())) if isinstance(part, dict) else ():
            field: FieldPath = (*nested, name)
            entries = {} if field in nodes else dict(_entries(part.get(name), field))
            numbers |= {key: n for key, n in entries.items() if type(n) is int and n > 0}
    return numbers


def _takes_numbers(config_class: type, name: str) -> bool:
    """True if a field's annotation allows whole numbers, or if it is not declared."""
    declared = getattr(config_class, "__dataclass_fields__", {}).get(name)
    return declared is None or any(word in str(declared.type) for word in ("int", "Any"))


def _entries(value: Any, field: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    """Yield a value, or every value inside a list or a small dictionary, each with its field."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _entries(entry, (*field, index))
    elif isinstance(value, dict):  # a large one holds label names
        for key, entry in value.items() if len(value) <= _FEW else ():
            yield from _entries(entry, (*field, key))
    else:
        yield field, value


def is_in_every_config(field: FieldPath) -> bool:
    """True if every config has the field, so that its default stands for no width of a class."""
    from transformers import PretrainedConfig

    return hasattr(PretrainedConfig, str(field[-1]))


def _is_machinery(name: str) -> bool:
    """True if every config has this method or constant; ``num_labels`` is neither."""
    from transformers import PretrainedConfig

    attribute = getattr(PretrainedConfig, name, None)
    if isinstance(attribute, property):
        return attribute.fset is None
    return hasattr(PretrainedConfig, name)


@contextmanager
def _recording_reads(classes: set[type]) -> Iterator[dict[type, set[str]]]:
    """Record which attributes this thread reads from configs of these classes, declared or not.

    A config is read while it is made, too, so that no object but the class can record.
    """
    reads: dict[type, set[str]] = {cls: set() for cls in classes}

    def recorder(cls: type, inherited: Any) -> Any:
        def __getattribute__(self: Any, key: str) -> Any:
            if not key.startswith("__"):
                reads[cls].add(inherited(self, "attribute_map").get(key, key))
            return inherited(self, key)

        return __getattribute__

    with ExitStack() as stack:
        for cls in classes:
            recording = recorder(cls, cls.__getattribute__)
            stack.enter_context(replaced(cls, "__getattribute__", recording))
        yield reads
