"""Meta-device copies of models sharded by FSDP2; pruners prune the copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..model.config_json import config_json
from ..model.locate import check_followable, find_pretrained
from ..model.shapes import shapes
from ..model.sharded import behind, is_sharded, meta_copies, plain_class, reshard
from .rebuild import empty_copy


def meta_copy_of(module: nn.Module) -> nn.Module:
    """Return the meta copy of a model sharded by FSDP2, or raise; any other module itself."""
    if not isinstance(module, nn.Module) or not is_sharded(module):
        return module
    prefix, model = find_pretrained(module)
    if prefix:
        raise UnsupportedModelError(
            f"{plain_class(type(model)).__name__} is under fully_shard (FSDP2) and inside a "
            f"{plain_class(type(module)).__name__}. Pass the model itself, the .{prefix} of that "
            "module"
        )
    check_followable(model, sharded=True)
    reshard(model)
    copy: Any = meta_copies.get(model)
    same = copy is not None and config_json(copy.config) == config_json(model.config)
    if not same or shapes(copy) != shapes(model):
        copy = meta_copies[model] = empty_copy(model)
    refresh(copy)
    return copy  # type: ignore[no-any-return]


def refresh(copy: nn.Module) -> None:
    """Copy ``requires_grad`` to a meta copy; add empty gradients where the original has some."""
    source = behind(copy)
    reshard(source)
    for name, parameter in copy.named_parameters():
        original = source.get_parameter(name)
        parameter.requires_grad_(original.requires_grad)
        parameter.grad = None if original.grad is None else torch.empty_like(parameter)


def on_meta_copy(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a sharded model's layers and parameters in arguments by the meta copy's."""
    copy = meta_copy_of(module)
    if copy is module:
        return dict(arguments)
    parts: dict[int, Any] = {}
    for name, layer in module.named_modules():
        parts[id(layer)] = copy.get_submodule(name)
    for name, parameter in module.named_parameters():
        parts[id(parameter)] = copy.get_parameter(name)
    return {name: _replaced(value, parts) for name, value in arguments.items()}


def _replaced(value: Any, parts: Mapping[int, Any]) -> Any:
    if type(value) in (list, tuple, set):
        return type(value)(_replaced(item, parts) for item in value)
    if type(value) is dict:
        return {_replaced(key, parts): _replaced(item, parts) for key, item in value.items()}
    return parts.get(id(value), value)
