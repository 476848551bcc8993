"""A pruner that goes on where another process's stopped, from what a checkpoint says of it.

A pruner counts its ratios from the widths that it found when it was made.  So the model is made as
wide as it was, without its weights; the pruner is made, prunes again what the history says, and
the weights are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .apply import (
    Changes,
    all_or_nothing,
    changed_values,
    difference,
    write_attributes,
    write_buffers,
    write_fields,
)
from .errors import TrainingError
from .hook import HFConfigSyncHook
from .locate import find_pretrained
from .pruners import hooks_of
from .reference import FieldPath, Refusal, config_json, field_name, with_values
from .ties import owner, saved_buffers
from .whole import build_live


@dataclass(frozen=True)
class Progress:
    """How far a pruner has come, in plain data.

    Attributes:
        step: the pruner's steps that are done.
        history: what it pruned, as ``pruner.pruning_history()`` says.
        fields: what the config said before the first step, of the fields that pruning changed.
        scopes: the pruner's own count of channels at its first step, by ranking scope.
    """

    step: int
    history: list[tuple[str, bool, list[int]]]
    fields: list[tuple[FieldPath, Any]]
    scopes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Progress:
        """The other way round, from JSON."""
        fields = [(tuple(path), value) for path, value in data["fields"]]
        return cls(data["step"], data["history"], fields, data["scopes"])


def progress_of(pruner: Any, unpruned: Mapping[str, Any]) -> Progress:
    """How far a pruner has come; ``unpruned``: the JSON of the config before its first step."""
    _, model = find_pretrained(pruner.model)
    history = [
        (name, bool(out), [int(index) for index in idxs])
        for name, out, idxs in pruner.pruning_history()
    ]
    pruned = {name for report in sync_hook_of(pruner).reports for name in report.fields}
    fields = [
        (path, value)
        for path, value in changed_values(config_json(model.config, use_diff=False), unpruned)
        if field_name(path) in pruned  # saving a model sets others
    ]
    return Progress(pruner.current_step, history, fields, dict(pruner._scope_initial_channels))


def sync_hook_of(pruner: Any) -> HFConfigSyncHook:
    """The hook that keeps a pruner's config; one is registered where there is none."""
    for hook in hooks_of(pruner):
        if isinstance(hook, HFConfigSyncHook):
            return hook
    hook = HFConfigSyncHook()
    hook.register(pruner)
    return hook


def pruner_at(
    progress: Progress, model: nn.Module, build: Callable[[nn.Module], Any]
) -> tuple[Any, dict[nn.Parameter, nn.Parameter]]:
    """A pruner in the state of another one, on a model that is pruned already.

    The model keeps its weights, in new Parameters where something was pruned.

    Returns:
        The pruner; the model's Parameters of before with those that took their places.

    Raises:
        TrainingError: the model is not what the history leaves; nothing was changed.
    """
    _, pretrained = find_pretrained(model)
    names = dict(pretrained.named_parameters(remove_duplicate=False))
    buffers = saved_buffers(pretrained)
    with all_or_nothing() as changes:
        _widen(changes, pretrained, progress)
        pruner = build(model)
        hook = sync_hook_of(pruner)
        pruner.load_pruning_history(list(progress.history))
        pruner.current_step = progress.step
        pruner._scope_initial_channels.update(progress.scopes)
        _check_narrow(pretrained, {**names, **buffers})
        for name, parameter in names.items():
            pretrained.get_parameter(name).data = parameter.data
        for name, buffer in buffers.items():
            module, key = owner(pretrained, name)
            module._buffers[key] = buffer
        hook.sync()  # weights that are tied become one Parameter again, and all of it is proved
    return pruner, {old: pretrained.get_parameter(name) for name, old in names.items()}


def _widen(changes: Changes, model: Any, progress: Progress) -> None:
    """Give a model the shapes that it had, in config, attributes, buffers and Parameters."""
    builder, now = build_live(model, buffers=True)
    data = config_json(model.config)
    then = builder.build(with_values(data, dict(progress.fields)), buffers=True)
    if isinstance(now, Refusal) or isinstance(then, Refusal):
        raise TrainingError(
            f"{type(model).__name__} refuses the config that the checkpoint's run began with. "
            "Resume with the class and the version of transformers that it was saved by."
        )
    change = difference(model, now, then)
    write_fields(changes, model, change.fields)
    write_attributes(changes, model, change.attributes)
    write_buffers(changes, model, change.buffers)
    wide = dict(then.named_parameters(remove_duplicate=False))
    made: dict[nn.Parameter, nn.Parameter] = {}  # one Parameter under several names stays one
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if wide[name].shape != old.shape:
            empty = torch.zeros(wide[name].shape, dtype=old.dtype, device=old.device)
            made.setdefault(old, nn.Parameter(empty, old.requires_grad))
        module, key = owner(model, name)
        changes.set(module._parameters, key, made.get(old, old))
    for name, old_buffer in saved_buffers(model).items():
        module, key = owner(model, name)
        changes.set(module._buffers, key, old_buffer.new_zeros(saved_buffers(then)[name].shape))


def _check_narrow(model: nn.Module, loaded: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in loaded.items():
        module, key = owner(model, name)
        replayed = getattr(module, key)
        if replayed.shape != tensor.shape:
            raise TrainingError(
                f"{name} has shape {list(tensor.shape)}, but the pruning that the checkpoint "
                f"tells of leaves {list(replayed.shape)}. Build the model from the checkpoint: "
                "from_pretrained(checkpoint), and give PruningCallback the arguments that it had."
            )
