"""Config fields that say what another one says, and that no code of the class reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CellType, CodeType
from typing import Any

from torch import nn

from .apply import changed_values, difference
from .fit import value_at
from .reference import Builder, FieldPath, Refusal, config_json, field_name, with_values


def mirrored(
    builder: Builder, old: dict[str, Any], new: dict[str, Any], built: nn.Module
) -> tuple[dict[str, Any], nn.Module, list[str]]:
    """The new config with the fields that follow another one, what it builds, and what to know.

    A field follows where the config's class makes it of the other one when it is not given, and
    the class builds the same with it.  A field of the old value only is told.

    Args:
        builder: builds the class.
        old: the config's JSON before.
        new: with the widths that are proved now.
        built: what that builds.
    """
    before, after = (_every(builder, data) for data in (old, new))
    changed = [(value_at(before, p), value) for p, value in changed_values(before, after)]
    pairs = {was: now for was, now in reversed(changed) if type(was) is type(now) is int}
    code: set[str] = set()
    notes: list[str] = []
    general = _of_every_config()
    for path, value in _whole_numbers(after) if pairs else ():
        if general & set(path) or value not in pairs or value_at(before, path) != value:
            continue
        code = code or _names_in_code(built)
        if path[-1] in code:
            continue  # what is read has been looked at by experiment
        follows = {value_at(_every(builder, _without(data, path)), path) for data in (old, new)}
        if follows == {value, pairs[value]}:
            trial = with_values(new, {path: pairs[value]})
            other = builder.build(trial, buffers=True)
            if not isinstance(other, Refusal) and _alike(built, other):
                new, built = trial, other
                continue
        source = next(field_name(p) for p, v in changed_values(before, after) if v == pairs[value])
        notes.append(
            f"config.{field_name(path)} is still {value}, as {source} was: no code of the class "
            f"reads it. Set it to {pairs[value]} if it means the same"
        )
    return new, built, notes


def _of_every_config() -> set[str]:
    """The names of what any config may hold: labels, tokens, generation; no widths."""
    from transformers import GenerationConfig, PretrainedConfig

    configs: tuple[Any, ...] = (PretrainedConfig, GenerationConfig)
    return {name for config in configs for name in config().to_dict()}


def _every(builder: Builder, data: dict[str, Any]) -> dict[str, Any]:
    """A config's JSON with every default; nothing where the class refuses it."""
    try:
        return config_json(builder.config(data), use_diff=False)
    except Exception:  # as in Builder.build
        return {}


def _without(data: dict[str, Any], path: FieldPath) -> dict[str, Any]:
    """The JSON without one field."""
    parents = with_values(data, {})
    node: Any = parents
    for key in path[:-1]:
        node = node.get(key, {}) if isinstance(node, dict) else {}
    if isinstance(node, dict):
        node.pop(path[-1], None)
    return parents


def _whole_numbers(node: dict[str, Any], path: FieldPath = ()) -> Iterator[tuple[FieldPath, int]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _whole_numbers(value, (*path, key))
        elif type(value) is int:
            yield (*path, key), value


def _names_in_code(model: nn.Module) -> set[str]:
    """Every name and text in the code that a model's own classes run, by what they call."""
    from transformers import PretrainedConfig, PreTrainedModel

    generic = {*PreTrainedModel.__mro__, *nn.Sequential.__mro__, *nn.ModuleList.__mro__}
    waiting: list[Any] = list({type(module) for module in model.modules()})
    packages = {_package(kind) for kind in waiting} | {"transformers"}
    found: set[str] = set()
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        one = getattr(one, "fget", None) or getattr(one, "__func__", None) or one
        if id(one) in seen or _package(one) not in packages - {"torch"}:
            continue
        seen.add(id(one))
        if isinstance(one, type) and not issubclass(one, PretrainedConfig):
            bases = [base for base in one.__mro__ if base not in generic]
            waiting += [value for base in bases for value in vars(base).values()]
        elif type(one) is dict:  # functions by a name, as rotary positions have
            waiting += one.values()
        elif inspect.isfunction(one):
            names = set(_names(one.__code__))
            found |= names
            cells = [cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell)]
            called = [one.__globals__[name] for name in names if name in one.__globals__]
            waiting += [x for x in (*cells, *called) if isinstance(x, type | dict) or callable(x)]
    return found


def _package(one: Any) -> str:
    """The package that a class or function is from; what has none counts as the library's."""
    return str(getattr(one, "__module__", "transformers")).partition(".")[0]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models are built alike, but for the config."""
    change = difference(one, one, other)
    return not change.attributes and not change.buffers
