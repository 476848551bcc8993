"""Resume a pruner in another process, from what a checkpoint records of it.

A pruner's ratios are relative to the widths that it finds when it is made. So the model first gets
its old widths back, without its weights. Then the pruner is made and prunes again what the history
records. Then the weights are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import nn

from ...errors import TrainingError, listed
from ...fieldmap.completeness import build_live
from ...graph.layer_fields import layers_listed
from ...model.build import Refusal
from ...model.config_json import FieldPath, changed_values, config_json, field_name, with_values
from ...model.locate import find_pretrained
from ...model.tensors import owner, parameter_names, put_parameter, saved_buffers
from ..apply import Changes, all_or_nothing, difference, write
from ..hook import HFConfigSyncHook
from ..registration import hooks_of

_SETTINGS = (
    *("pruning_ratio", "head_pruning_ratio", "max_pruning_ratio", "iterative_steps", "round_to"),
    *("global_pruning", "isomorphic", "prune_num_heads", "prune_head_dims"),
)


class Progress(TypedDict):
    """How far a pruner has come, as plain data."""

    step: int  # pruner steps that are done
    history: list[tuple[str, bool, list[int]]]  # as ``pruner.pruning_history()`` returns it
    fields: list[tuple[FieldPath, Any]]  # that pruning changed, with values before the first step
    scopes: dict[str, int]  # ranking scope -> channels at the first step
    per_layer: bool
    settings: dict[str, Any]  # the pruner's own; a resumed run needs the same


def fields_of(progress: Progress) -> dict[FieldPath, Any]:
    return {tuple(field): value for field, value in progress["fields"]}  # JSON has no tuples


def full_config(model: nn.Module, per_layer: bool) -> dict[str, Any]:
    with layers_listed(model, per_layer):
        return config_json(find_pretrained(model)[1].config, use_diff=False)


def progress_of(pruner: Any, unpruned: Mapping[str, Any]) -> Progress:
    """Return how far a pruner has come; ``unpruned``: :func:`full_config` before its first step."""
    hook = sync_hook_of(pruner)
    history = [
        (name, bool(out), [int(index) for index in idxs])
        for name, out, idxs in pruner.pruning_history()
    ]
    pruned = {name for report in hook.reports for name in report.fields}
    fields = [
        (field, value)
        for field, value in changed_values(full_config(pruner.model, hook.per_layer), unpruned)
        if field_name(field) in pruned  # saving a model sets other fields too
    ]
    return Progress(
        step=pruner.current_step,
        history=history,
        fields=fields,
        scopes=dict(pruner._scope_initial_channels),
        per_layer=hook.per_layer,
        settings=settings_of(pruner),
    )


def settings_of(pruner: Any) -> dict[str, Any]:
    names = {layer: name for name, layer in pruner.model.named_modules()}
    settings = {name: getattr(pruner, name) for name in _SETTINGS if hasattr(pruner, name)}
    for key in ("pruning_ratio_dict", "head_pruning_ratio_dict"):
        for layer, ratios in getattr(pruner, key).items():
            if layer in names:
                settings[f"{key}[{names[layer]}]"] = float(list(ratios)[-1])
    return settings


def sync_hook_of(pruner: Any) -> HFConfigSyncHook:
    for hook in hooks_of(pruner):
        if isinstance(hook, HFConfigSyncHook):
            return hook
    hook = HFConfigSyncHook()  # ``build`` made a pruner without one
    hook.register(pruner)
    return hook


def pruner_at(progress: Progress, model: nn.Module, build: Callable[[nn.Module], Any]) -> Any:
    """Return a pruner in a recorded state, on a model that is pruned already, or change nothing.

    The model keeps its Parameters. ``build`` makes the pruner of a model.
    """
    _, pretrained = find_pretrained(model)
    names = dict(pretrained.named_parameters(remove_duplicate=False))
    buffers = saved_buffers(pretrained)
    with layers_listed(model, progress["per_layer"]), all_or_nothing() as changes:
        _widen(changes, pretrained, progress)
        pruner = build(model)
        hook = sync_hook_of(pruner)
        _check_settings(progress["settings"], settings_of(pruner))
        with pruner.DG.recorded.held():
            pruner.load_pruning_history(list(progress["history"]))
            hook.sync()
        pruner.current_step = progress["step"]
        pruner._scope_initial_channels.update(progress["scopes"])
        _check_narrow(pretrained, {**names, **buffers})
        for name, parameter in names.items():
            put_parameter(pretrained, [name], parameter)
        for name, buffer in buffers.items():
            module, key = owner(pretrained, name)
            module._buffers[key] = buffer
    return pruner


def _check_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise if a pruner's settings differ from those of the checkpoint's run."""
    names = dict.fromkeys((*saved, *now))
    other = [f"{n}={now.get(n)}" for n in names if saved.get(n) != now.get(n)]
    if other:  # the run would be neither the old one nor a new one
        old = [f"{n}={saved.get(n)}" for n in names if saved.get(n) != now.get(n)]
        raise TrainingError(
            f"the checkpoint's run pruned with {listed(old)}, but this run has {listed(other)}. "
            "Resume with the settings of the checkpoint's run. For other settings, start a new "
            "run: call train() without resume_from_checkpoint="
        )


def _widen(changes: Changes, model: Any, progress: Progress) -> None:
    """Give a model its unpruned shapes; changed Parameters and saved buffers become zeros."""
    builder, pruned_build = build_live(model, buffers=True)
    data = config_json(model.config)
    wide_build = builder.build(with_values(data, fields_of(progress)), buffers=True)
    if isinstance(pruned_build, Refusal) or isinstance(wide_build, Refusal):
        raise TrainingError(
            f"{type(model).__name__} refuses the config that the checkpoint's run began with. "
            "Resume with the class and the version of transformers that saved the checkpoint."
        )
    write(changes, model, difference(model, pruned_build, wide_build))
    for old, names in parameter_names(model).items():
        shape = wide_build.get_parameter(names[0]).shape
        if shape != old.shape:
            empty = nn.Parameter(old.new_zeros(shape), old.requires_grad)
            for module, key in (owner(model, name) for name in names):
                changes.set(module._parameters, key, empty)
    for name, old_buffer in saved_buffers(model).items():
        module, key = owner(model, name)
        changes.set(
            module._buffers, key, old_buffer.new_zeros(saved_buffers(wide_build)[name].shape)
        )


def _check_narrow(model: nn.Module, loaded: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in loaded.items():
        module, key = owner(model, name)
        replayed = getattr(module, key)
        if replayed.shape != tensor.shape:
            raise TrainingError(
                f"{name} has shape {list(tensor.shape)}, but the pruning steps recorded in the "
                f"checkpoint lead to {list(replayed.shape)}. Load the model from the checkpoint, "
                "from_pretrained(checkpoint), and pass PruningCallback the same arguments as in "
                "the checkpoint's run."
            )
