"""Apply a cut list: build the class from the new config, then fill it parameter by parameter.

Of a model sharded by FSDP2, pruners prune a copy on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigSyncError, UnsupportedModelError, listed
from ..fieldmap.learn_field_map import build_live, whole_build
from ..model.build import Builder, Refusal
from ..model.config_json import OF_NO_EFFECT, changed_values, config_json, field_name, value_at
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

    with torch.no_grad():
        fill(new, model, values_of)
        for name, buffer in list(model.named_buffers()):
            _put_buffer(new, name, buffer, cuts)
    missing = [name for name, parameter in new.named_parameters() if parameter.is_meta]
    if missing:
        raise ConfigSyncError(
            f"{cuts.model} has {listed(missing)} with the new config, but the model does not"
        )
    _take_over(new, model)
    return new  # type: ignore[no-any-return]


def empty_copy(model: PreTrainedModel) -> PreTrainedModel:  # also of a sharded model (FSDP2)
    """Return a model of the same class, config, ties, modes and buffers with meta parameters."""
    builder, built = build_live(model, buffers=True)
    new: Any = whole_build(model, builder, built)
    fill(new, model, lambda _, old: torch.empty(old.shape, dtype=old.dtype, device="meta"))
    unchanged = CutList("", {}, {}, {})
    for name, buffer in list(model.named_buffers()):
        _put_buffer(new, name, buffer, unchanged)
    _take_over(new, model)
    return new  # type: ignore[no-any-return]


def check_fits(model: PreTrainedModel, cuts: CutList) -> None:
    """Raise ``UnsupportedModelError`` if a cut list was made for another class or config."""
    name = stock_class(type(model)).__name__
    if name != cuts.model:
        raise UnsupportedModelError(
            f"the cut list is for a {cuts.model}, but this is a {name}. Load the class that was "
            f"pruned: {cuts.model}.from_pretrained(...)"
        )
    config = config_json(model.config)
    changed = {field for field, _ in changed_values(cuts.before, config)}
    changed |= {field for field, _ in changed_values(config, cuts.before)}
    for field in sorted(changed, key=field_name):
        if field[0] not in OF_NO_EFFECT:
            raise UnsupportedModelError(
                f"the cut list starts from a config with {field_name(field)} "
                f"{value_at(cuts.before, field)}, but this {name} has {value_at(config, field)}. "
                "Apply it to the model that was pruned, as it was before pruning"
            )
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    misfit = cuts.misfit({name: tuple(tensor.shape) for name, tensor in named})
    if misfit is not None:
        raise UnsupportedModelError(f"the cut list does not fit this {name}: {misfit}")


def _empty(model: PreTrainedModel, cuts: CutList) -> nn.Module:
    """Build the class from the new config: parameters on the meta device, buffers with values."""
    builder, _ = build_live(model)
    new = _of_class_for(model, cuts, builder).build(cuts.after, buffers=True)
    if isinstance(new, Refusal):
        raise ConfigSyncError(f"{cuts.model} refuses the cut list's config: {new.reason}")
    return new


def _of_class_for(model: PreTrainedModel, cuts: CutList, builder: Builder) -> Builder:
    """Return the builder of the layerwise class if the new config has per-layer entries."""
    if layer_lists(type(model)):
        return builder
    lists = {
        layers.name: layers.classes
        for layers in layer_lists_of(model)
        if value_at(cuts.after, (*layers.config_path, KEY))
    }
    return builder.of_class(layerwise_class(model, lists)) if lists else builder


def _put_buffer(new: nn.Module, name: str, old: Tensor, cuts: CutList) -> None:
    """Give a buffer its old device and dtype; a saved or cut one gets its old values too."""
    module, key = owner(new, name)
    built = module._buffers.get(key)
    if key not in module._non_persistent_buffers_set or name in cuts.edits or built is None:
        module._buffers[key] = cuts.of(name, old).clone()
    else:
        module._buffers[key] = built.to(old.device, old.dtype)


def take_modes(new: nn.Module, old: nn.Module) -> None:
    parts = dict(old.named_modules())
    for name, module in new.named_modules():
        part = parts.get(name)
        module.training = part is not None and part.training
        for key in _CHECKPOINTING & (vars(part).keys() if part is not None else set()):
            setattr(module, key, getattr(part, key))


def _take_over(new: Any, old: Any) -> None:
    """Copy what a model has besides weights: modes, kernel choice, generation config."""
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
