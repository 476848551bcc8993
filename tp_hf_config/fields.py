"""Which config fields are worth trying: those that building the class reads.

A field that is read but not declared (``getattr(config, "head_dim", None)``) is found the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .reference import Builder, FieldPath

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_FEW = 64


def candidates(
    builder: Builder, config: PreTrainedConfig, data: dict[str, Any]
) -> tuple[dict[FieldPath, int], list[FieldPath]]:
    """The fields worth trying: whole numbers, and unset ones, that building the class reads."""
    live = builder.config(data)
    nodes = dict(_config_nodes(live))
    with _recorded({type(node) for node in nodes.values()}) as reads:
        builder.build(data)
    declared: dict[FieldPath, int] = {}
    unset: list[FieldPath] = []
    for path, node in nodes.items():
        part: Any = data
        for key in path:
            part = part.get(key) if isinstance(part, dict) else None
        part = part if isinstance(part, dict) else {}
        for name in sorted(reads.get(type(node), ())):
            value = part.get(name)
            field: FieldPath = (*path, name)
            whole = {} if field in nodes else dict(_entries(value, field))
            declared.update({key: entry for key, entry in whole.items() if _is_count(entry)})
            own = not name.startswith("_") and not _is_machinery(name)
            if value is None and own and _takes_numbers(type(node), name):
                unset.append(field)
    return declared, sorted(unset, key=lambda path: str(path[-1]))  # like fields stand together


def _takes_numbers(config_class: type, name: str) -> bool:
    """Whether a config's field may be a whole number, going by what is written beside it."""
    declared = getattr(config_class, "__dataclass_fields__", {}).get(name)
    return declared is None or any(word in str(declared.type) for word in ("int", "Any"))


def _entries(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    """A value, or what stands in a list or a small dictionary, and in those in it."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _entries(entry, (*path, index))
    elif isinstance(value, dict):  # a large one names labels
        for key, entry in value.items() if len(value) <= _FEW else ():
            yield from _entries(entry, (*path, key))
    else:
        yield path, value


def is_everyones(path: FieldPath) -> bool:
    """Whether every config has the field, so that no width of a class is behind its default."""
    from transformers import PretrainedConfig

    return hasattr(PretrainedConfig, str(path[-1]))


def _is_machinery(name: str) -> bool:
    """Whether a name is a method or constant that every config has; ``num_labels`` is neither."""
    from transformers import PretrainedConfig

    found = getattr(PretrainedConfig, name, None)
    if isinstance(found, property):
        return found.fset is None
    return hasattr(PretrainedConfig, name)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _config_nodes(
    config: PreTrainedConfig, path: FieldPath = ()
) -> Iterator[tuple[FieldPath, PreTrainedConfig]]:
    from transformers import PretrainedConfig

    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _config_nodes(value, (*path, name))


@contextmanager
def _recorded(classes: set[type]) -> Iterator[dict[type, set[str]]]:
    """Note the attributes that are read from configs of some classes, declared or not."""
    reads: dict[type, set[str]] = {cls: set() for cls in classes}
    own = {cls: cls.__dict__.get("__getattribute__") for cls in classes}

    def recorder(cls: type, inherited: Any) -> Any:
        def __getattribute__(self: Any, key: str) -> Any:
            if not key.startswith("__"):
                reads[cls].add(inherited(self, "attribute_map").get(key, key))
            return inherited(self, key)

        return __getattribute__

    try:
        for cls in classes:
            setattr(cls, "__getattribute__", recorder(cls, cls.__getattribute__))
        yield reads
    finally:
        for cls, original in own.items():
            if original is None:
                delattr(cls, "__getattribute__")
            else:
                setattr(cls, "__getattribute__", original)
