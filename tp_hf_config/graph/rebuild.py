"""Apply a cut list: build the class from the new config, then fill it parameter by parameter.

Of a model sharded by FSDP2, pruners prune a copy on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigSyncError, UnsupportedModelError, listed
from ..fieldmap.learn_field_map import build_live, whole_build
from ..model.build import Refusal
from ..model.config_json import OF_NO_EFFECT, config_json, field_name, value_at
from ..model.fill import fill
from ..model.layer_class import layer_lists, layerwise_class, stock_class
from ..model.layer_entries import KEY, layer_lists_of
from ..model.locate import check_followable, find_pretrained
from ..model.paging import copied
from ..model.shapes import shapes
from ..model.sharded import behind, is_sharded, meta_copies, plain_class, reshard
from ..model.tensors import owner
from .cut_list import CutList

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# set by Transformers' ``gradient_checkpointing_enable``
_CHECKPOINTING = {"gradient_checkpointing", "_gradient_checkpointing_func"}


def rebuilt(model: PreTrainedModel, cuts: CutList) -> PreTrainedModel:
    """Return the model after a cut list, or raise; only the tensor being cut is held twice."""
    check_fits(model, cuts)
    cuts.check_complete()
    new: Any = _empty(model, cuts)

    def values_of(name: str, old: Tensor) -> Tensor:
        return cuts.of(name, old) if name in cuts.edits else copied(old)

    _fill_and_take_over(new, model, cuts, values_of)
    missing = [name for name, parameter in new.named_parameters() if parameter.is_meta]
    if missing:
        raise ConfigSyncError(
            f"{cuts.model} has {listed(missing)} with the new config, but the model does not"
        )
    return new  # type: ignore[no-any-return]


def empty_copy(model: PreTrainedModel) -> PreTrainedModel:  # also of a sharded model (FSDP2)
    """Return a model of the same class, config, ties, modes and buffers with meta parameters."""
    builder, built = build_live(model, buffers=True)
    new: Any = whole_build(model, builder, built)
    _fill_and_take_over(
        new,
        model,
        CutList("", {}, {}, {}),
        lambda _, old: torch.empty(old.shape, dtype=old.dtype, device="meta"),
    )
    return new  # type: ignore[no-any-return]


def check_fits(model: PreTrainedModel, cuts: CutList) -> None:
    """Raise ``UnsupportedModelError`` if a cut list was made for another class or config."""
    name = stock_class(type(model)).__name__
    if name != cuts.model:
        raise UnsupportedModelError(
            f"the cut list is for a {cuts.model}, but this is a {name}. Load the class that was "
            f"pruned: {cuts.model}.from_pretrained(...)"
        )
    changes = replace(cuts, after=config_json(model.config)).changes()
    for field, expected, found in sorted(changes, key=lambda change: field_name(change[0])):
        if field[0] not in OF_NO_EFFECT:
            raise UnsupportedModelError(
                f"the cut list starts from a config with {field_name(field)} {expected}, but this "
                f"{name} has {found}. Apply it to the model that was pruned, as it was before "
                "pruning"
            )
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    misfit = cuts.misfit({name: tuple(tensor.shape) for name, tensor in named})
    if misfit is not None:
        raise UnsupportedModelError(f"the cut list does not fit this {name}: {misfit}")


def _empty(model: PreTrainedModel, cuts: CutList) -> nn.Module:
    """Build the class from the new config: parameters on the meta device, buffers with values."""
    builder, _ = build_live(model)
    lists = {
        layers.name: layers.classes
        for layers in ([] if layer_lists(type(model)) else layer_lists_of(model))
        if value_at(cuts.after, (*layers.config_path, KEY))
    }
    if lists:
        builder = builder.of_class(layerwise_class(model, lists))
    new = builder.build(cuts.after, buffers=True)
    if isinstance(new, Refusal):
        raise ConfigSyncError(f"{cuts.model} refuses the cut list's config: {new.reason}")
    return new


def take_modes(new: nn.Module, old: nn.Module) -> None:
    parts = dict(old.named_modules())
    for name, module in new.named_modules():
        part = parts.get(name)
        module.training = part is not None and part.training
        for key in _CHECKPOINTING & (vars(part).keys() if part is not None else set()):
            setattr(module, key, getattr(part, key))


def _fill_and_take_over(
    new: Any, old: Any, cuts: CutList, values_of: Callable[[str, Tensor], Tensor]
) -> None:
    """Give a model all that another has: tensors, modes, kernel choice, generation config."""
    with torch.no_grad():
        fill(new, old, values_of)
        for name, buffer in list(old.named_buffers()):
            module, key = owner(new, name)
            built = module._buffers.get(key)
            saved = key not in module._non_persistent_buffers_set
            if saved or name in cuts.edits or built is None:
                module._buffers[key] = cuts.of(name, buffer).clone()
            else:  # values that the class computed
                module._buffers[key] = built.to(buffer.device, buffer.dtype)
    take_modes(new, old)
    attention = getattr(old.config, "_attn_implementation", None)
    if attention:
        new.set_attn_implementation(attention)
    if hasattr(type(old.config), "_experts_implementation"):
        new.config._experts_implementation = old.config._experts_implementation
    if hasattr(old, "_weight_conversions"):  # maps names in files; saving applies it in reverse
        new._weight_conversions = old._weight_conversions
    if getattr(old, "generation_config", None) is not None:
        new.generation_config = old.generation_config
    new.config._name_or_path = old.config._name_or_path


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
    parts: dict[int, Any] = {id(m): copy.get_submodule(name) for name, m in module.named_modules()}
    parts |= {id(p): copy.get_parameter(name) for name, p in module.named_parameters()}
    return {name: _replaced(value, parts) for name, value in arguments.items()}


def _replaced(value: Any, parts: Mapping[int, Any]) -> Any:
    if type(value) in (list, tuple, set):
        return type(value)(_replaced(item, parts) for item in value)
    if type(value) is dict:
        return {_replaced(key, parts): _replaced(item, parts) for key, item in value.items()}
    return parts.get(id(value), value)
