"""Update config fields that repeat another one and that no code of the class reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CellType, CodeType
from typing import Any

from torch import nn

from ..model.build import Builder, Refusal
from ..model.config_json import (
    FieldPath,
    changed_values,
    config_json,
    field_name,
    value_at,
    with_values,
    without_field,
)
from .apply import difference


def with_mirrored_fields(
    builder: Builder, old: dict[str, Any], new: dict[str, Any], built: nn.Module
) -> tuple[dict[str, Any], nn.Module, list[str]]:
    """Update the fields of the new config that repeat another field, whose value has changed.

    A field repeats another one if the config's class derives it from that one when it is not given,
    and the class builds the same with it.  A field that only has the old value is noted.

    Args:
        builder: builds the class.
        old: the config's JSON before.
        new: the JSON with the widths that are proved now.
        built: the reference build of ``new``.

    Returns:
        The new JSON, its reference build, and notes for the user.
    """
    before, after = (_every_default(builder, data) for data in (old, new))
    changed = [(value_at(before, p), value) for p, value in changed_values(before, after)]
    pairs = {was: now for was, now in reversed(changed) if type(was) is type(now) is int}
    code: set[str] = set()
    notes: list[str] = []
    general = _of_every_config()
    for field, value in _whole_numbers(after) if pairs else ():
        if general & set(field) or value not in pairs or value_at(before, field) != value:
            continue
        code = code or _names_in_code(built)
        if field[-1] in code:
            continue  # probes have covered every field that is read
        without = (_every_default(builder, without_field(data, field)) for data in (old, new))
        derived = {value_at(data, field) for data in without}
        if derived == {value, pairs[value]}:
            candidate = with_values(new, {field: pairs[value]})
            candidate_build = builder.build(candidate, buffers=True)
            if not isinstance(candidate_build, Refusal) and _builds_alike(built, candidate_build):
                new, built = candidate, candidate_build
                continue
        source = next(field_name(p) for p, v in changed_values(before, after) if v == pairs[value])
        notes.append(
            f"config.{field_name(field)} is still {value}, as {source} was: no code of the class "
            f"reads it. Set it to {pairs[value]} if it means the same"
        )
    return new, built, notes


def _of_every_config() -> set[str]:
    """Return the fields that every config may have (labels, tokens, generation): no widths."""
    from transformers import GenerationConfig, PretrainedConfig

    configs: tuple[Any, ...] = (PretrainedConfig, GenerationConfig)
    return {name for config in configs for name in config().to_dict()}


def _every_default(builder: Builder, data: dict[str, Any]) -> dict[str, Any]:
    """Return a config's JSON with every default; empty if the class refuses the config."""
    try:
        return config_json(builder.config(data), use_diff=False)
    except Exception:  # as in Builder.build
        return {}


def _whole_numbers(node: dict[str, Any], field: FieldPath = ()) -> Iterator[tuple[FieldPath, int]]:
    """Yield each field with a whole number, and the number; ``field`` is where ``node`` is."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _whole_numbers(value, (*field, key))
        elif type(value) is int:
            yield (*field, key), value


def _names_in_code(model: nn.Module) -> set[str]:
    """Return every name and string in the code that a model's own classes run.

    The search starts at the classes of the model's modules, and goes on to what their code calls in
    the same packages or in ``transformers``.
    """
    from transformers import PretrainedConfig, PreTrainedModel

    generic = {*PreTrainedModel.__mro__, *nn.Sequential.__mro__, *nn.ModuleList.__mro__}
    waiting: list[Any] = list({type(module) for module in model.modules()})
    packages = {_package(kind) for kind in waiting} | {"transformers"}
    words: set[str] = set()
    visited: set[int] = set()
    while waiting:
        item = waiting.pop()
        item = getattr(item, "fget", None) or getattr(item, "__func__", None) or item
        if id(item) in visited or _package(item) not in packages - {"torch"}:
            continue
        visited.add(id(item))
        if isinstance(item, type) and not issubclass(item, PretrainedConfig):
            bases = [base for base in item.__mro__ if base not in generic]
            waiting += [value for base in bases for value in vars(base).values()]
        elif type(item) is dict:  # functions by name, as for rotary positions
            waiting += item.values()
        elif inspect.isfunction(item):
            names = set(_names(item.__code__))
            words |= names
            cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
            called = [item.__globals__[name] for name in names if name in item.__globals__]
            waiting += [x for x in (*cells, *called) if isinstance(x, type | dict) or callable(x)]
    return words


def _package(item: Any) -> str:
    """Return the package of a class or function; ``transformers`` if it has none."""
    return str(getattr(item, "__module__", "transformers")).partition(".")[0]


def _names(code: CodeType) -> Iterator[str]:
    """Yield every name and string in a code object, and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)


def _is_filled(cell: CellType) -> bool:
    """True if a cell of a closure holds something other than None."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _builds_alike(build: nn.Module, other: nn.Module) -> bool:
    """True if two builds of one class have the same attributes and unsaved buffers."""
    change = difference(build, build, other)
    return not change.attributes and not change.buffers
