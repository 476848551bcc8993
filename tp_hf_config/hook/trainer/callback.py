"""A callback that prunes on a schedule while a ``transformers.Trainer`` trains.

A resumed run prunes again in the new process. A pruner's ratios are relative to the widths that it
finds when it is made. So the model first gets its old widths back, without its weights. Then the
pruner is made and prunes again what the history records. Then the weights are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, TypedDict

import torch
import torch_pruning as tp
from torch import nn
from transformers.trainer_callback import (
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from ...arguments import check_arguments, taken_by
from ...errors import TrainingError, listed
from ...fieldmap.learn_field_map import build_live
from ...graph.layer_fields import layers_listed
from ...model.build import Refusal
from ...model.config_json import FieldPath, changed_values, config_json, field_name, with_values
from ...model.locate import find_pretrained
from ...model.tensors import owner, parameter_names, saved_buffers
from ...planning.pruner_graph import check_names, check_values
from ...planning.settings import INNER
from ..apply import Changes, all_or_nothing, difference, write
from ..hook import HFConfigSyncHook
from ..registration import hooks_of
from .optimizer import cannot_follow, optimizer_follows, unwrapped

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


def _full_config(model: nn.Module, per_layer: bool) -> dict[str, Any]:
    with layers_listed(model, per_layer):
        return config_json(find_pretrained(model)[1].config, use_diff=False)


def _progress_of(pruner: Any, unpruned: Mapping[str, Any]) -> Progress:
    """Return how far a pruner has come; ``unpruned``: :func:`_full_config` at its start."""
    hook = _sync_hook_of(pruner)
    history = [
        (name, bool(out), [int(index) for index in idxs])
        for name, out, idxs in pruner.pruning_history()
    ]
    pruned = {name for report in hook.reports for name in report.fields}
    fields = [
        (field, value)
        for field, value in changed_values(_full_config(pruner.model, hook.per_layer), unpruned)
        if field_name(field) in pruned  # saving a model sets other fields too
    ]
    return Progress(
        step=pruner.current_step,
        history=history,
        fields=fields,
        scopes=dict(pruner._scope_initial_channels),
        per_layer=hook.per_layer,
        settings=_settings_of(pruner),
    )


def _settings_of(pruner: Any) -> dict[str, Any]:
    names = {layer: name for name, layer in pruner.model.named_modules()}
    settings = {name: getattr(pruner, name) for name in _SETTINGS if hasattr(pruner, name)}
    for key in ("pruning_ratio_dict", "head_pruning_ratio_dict"):
        for layer, ratios in getattr(pruner, key).items():
            if layer in names:
                settings[f"{key}[{names[layer]}]"] = float(list(ratios)[-1])
    return settings


def _sync_hook_of(pruner: Any) -> HFConfigSyncHook:
    for hook in hooks_of(pruner):
        if isinstance(hook, HFConfigSyncHook):
            return hook
    hook = HFConfigSyncHook()  # ``build`` made a pruner without one
    hook.register(pruner)
    return hook


def _pruner_at(progress: Progress, model: nn.Module, build: Callable[[nn.Module], Any]) -> Any:
    """Return a pruner in a recorded state, on a model that is pruned already, or change nothing.

    The model keeps its Parameters. ``build`` makes the pruner of a model.
    """
    _, pretrained = find_pretrained(model)
    loaded: dict[str, torch.Tensor] = dict(pretrained.named_parameters(remove_duplicate=False))
    loaded |= saved_buffers(pretrained)
    with layers_listed(model, progress["per_layer"]), all_or_nothing() as changes:
        _widen(changes, pretrained, progress)
        pruner = build(model)
        hook = _sync_hook_of(pruner)
        _check_settings(progress["settings"], _settings_of(pruner))
        with pruner.DG.recorded.held():
            pruner.load_pruning_history(list(progress["history"]))
            hook.sync()
        pruner.current_step = progress["step"]
        pruner._scope_initial_channels.update(progress["scopes"])
        for name, tensor in loaded.items():
            module, key = owner(pretrained, name)
            replayed = getattr(module, key).shape
            if replayed != tensor.shape:
                raise TrainingError(
                    f"{name} has shape {list(tensor.shape)}, but the pruning steps recorded in the "
                    f"checkpoint lead to {list(replayed)}. Load the model from the checkpoint, "
                    "from_pretrained(checkpoint), and pass PruningCallback the same arguments as "
                    "in the checkpoint's run."
                )
            setattr(module, key, tensor)  # setattr, because an LSTM also keeps a list of them
    return pruner


def _check_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise if a pruner's settings differ from those of the checkpoint's run."""
    names = [n for n in dict.fromkeys((*saved, *now)) if saved.get(n) != now.get(n)]
    if names:  # the run would be neither the old one nor a new one
        old, new = ([f"{n}={values.get(n)}" for n in names] for values in (saved, now))
        raise TrainingError(
            f"the checkpoint's run pruned with {listed(old)}, but this run has {listed(new)}. "
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
    wide_buffers = saved_buffers(wide_build)
    for name, old_buffer in saved_buffers(model).items():
        module, key = owner(model, name)
        changes.set(module._buffers, key, old_buffer.new_zeros(wide_buffers[name].shape))


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes a model while a ``Trainer`` trains it, and updates config and optimizer.

    ::

        Trainer(model, args, ..., callbacks=[
            PruningCallback(every=100, pruning_ratio=0.3, iterative_steps=5)
        ])

    The pruner steps right after an optimizer step, while its gradients are available to the
    importance; with gradient accumulation, after the last micro-batch. If the gradient scaler skips
    an optimizer step, pruning waits for the next one. Checkpoints load with ``from_pretrained``. To
    resume, build the model from the checkpoint and train with the same callback:
    ``Trainer(from_pretrained(checkpoint), ...).train(resume_from_checkpoint=checkpoint)``.

    Args:
        build: makes the pruner of a model. Default: ``MetaPruner`` with Taylor importance.
        every: number of optimizer steps between pruning steps, until ``iterative_steps`` are done.
        at: instead of ``every``: the optimizer steps after which to prune, one for each of the
            ``iterative_steps``.
        settings: arguments of :class:`~tp_hf_config.HFConfigSyncHook` (``prune``, by default
            ``"inner"``, ``ratios``, ``per_layer``, ``plan``, ...) and of the default pruner
            (``pruning_ratio``, ``iterative_steps``, ``importance``, ...).

    Attributes:
        pruner: the pruner; ``None`` before training begins.
        hook: its :class:`~tp_hf_config.HFConfigSyncHook`, which has the reports.

    Raises:
        ValueError: not exactly one of ``every`` and ``at`` is given, its value is no schedule, or
            ``settings`` come with ``build``. When training begins: the schedule does not fit
            ``iterative_steps`` or the length of the training.
        TrainingError: when training begins: this run cannot prune. After the first optimizer step:
            the optimizer's state cannot be cut.
    """

    @check_arguments
    def __init__(
        self,
        build: Callable[[Any], Any] | None = None,
        *,
        every: int | None = None,
        at: Sequence[int] = (),
        **settings: Any,
    ):
        if (every is None) == (not at):
            raise ValueError(
                "PruningCallback: say when to prune, either every=100 or at=(100, 200, 300)"
            )
        if every is not None and every < 1:
            raise ValueError(f"PruningCallback: every={every}: expected 1 or more optimizer steps")
        if min(at, default=1) < 1 or list(at) != sorted(set(at)):
            raise ValueError(
                f"PruningCallback: at={tuple(at)}: expected increasing optimizer steps"
            )
        if build is not None and settings:
            raise ValueError(
                f"PruningCallback: {', '.join(settings)}: your function makes the pruner, so pass "
                "these arguments to the pruner there"
            )
        names = signature(HFConfigSyncHook).parameters
        of_hook = {name: value for name, value in settings.items() if name in names}
        if not of_hook.keys() & {"prune", "ratios", "plan"}:
            of_hook["prune"] = INNER
        self._build, self._of_hook = build, taken_by(HFConfigSyncHook.__init__, of_hook)
        self._settings = {name: value for name, value in settings.items() if name not in names}
        check_names(self._settings)
        check_values(self._settings)
        self._every, self._at = every, tuple(at)
        self._unpruned: dict[str, Any] = {}
        self._checked = False
        self.pruner: Any = None
        self.hook: HFConfigSyncHook | None = None

    def state(self) -> dict[str, Any]:
        """Return what the ``Trainer`` stores of this callback in a checkpoint."""
        attributes: dict[str, Any] = {}
        if self.pruner is not None:
            attributes["progress"] = _progress_of(self.pruner, self._unpruned)
        return {"args": {}, "attributes": attributes}

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the pruner; when resuming, in the state that the checkpoint records."""
        model = kwargs["model"]
        reason = _unsupported_run(args)
        if reason is not None:
            raise TrainingError(f"PruningCallback: {reason}")
        saved = _saved_progress(state, type(self).__name__)
        self._checked = False
        if saved is None:
            self.pruner = self._make_pruner(model)
            self._unpruned = _full_config(model, _sync_hook_of(self.pruner).per_layer)
        else:
            self.pruner = _pruner_at(saved, model, self._make_pruner)
            self._unpruned = with_values(_full_config(model, saved["per_layer"]), fields_of(saved))
        self.hook = _sync_hook_of(self.pruner)
        reason = self._schedule_problem(state.max_steps)
        if reason is not None:
            raise ValueError(f"PruningCallback: {reason}")
        states: Any = state.stateful_callbacks
        states[type(self).__name__] = self.state()  # the Trainer saves only those listed here

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run a step of the pruner if one is due."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if not self._checked:  # an optimizer has no state before its first step
            refusal = cannot_follow(model, unwrapped(optimizer))
            if refusal is not None:
                raise TrainingError(f"PruningCallback: {refusal.reason}")
            self._checked = True
        if getattr(optimizer, "step_was_skipped", False):  # the gradients are not finite
            return
        done = self.pruner.current_step
        if done < self.pruner.iterative_steps and state.global_step + 1 >= self._due(done):
            with optimizer_follows(model, optimizer):
                self.pruner.step()

    def _make_pruner(self, model: Any) -> Any:
        if self._build is not None:
            return self._build(model)
        defaults = {
            "example_inputs": None,
            "importance": tp.importance.GroupTaylorImportance(),
            "hooks": [HFConfigSyncHook(**self._of_hook)],
        }
        return tp.pruner.MetaPruner(model, **(defaults | self._settings))

    def _due(self, done: int) -> int:
        """Return the optimizer step after which the pruner steps, given its ``done`` steps."""
        return self._at[done] if self._every is None else self._every * (done + 1)

    def _schedule_problem(self, max_steps: int) -> str | None:
        steps = self.pruner.iterative_steps
        if self._at and len(self._at) != steps:
            return (
                f"at= names {len(self._at)} optimizer steps, but the pruner has "
                f"iterative_steps={steps}. Name one optimizer step for each of them"
            )
        last = self._due(steps - 1)
        if last > max_steps:
            return (
                f"training ends after {max_steps} optimizer steps, but the last of the pruner's "
                f"{steps} steps comes after optimizer step {last}. Prune earlier or train longer"
            )
        return None


def _saved_progress(state: TrainerState, name: str) -> Progress | None:
    """Return the progress in the checkpoint that a run resumes from; None without one."""
    states: Any = state.stateful_callbacks
    saved = states.get(name, {})
    if isinstance(saved, list):
        raise TrainingError(
            f"{name}: the Trainer has {len(saved)} of these callbacks, but a checkpoint stores the "
            "progress of one. Pass one callback that takes all steps: at=(100, 200), "
            "iterative_steps=2"
        )
    if not state.global_step:
        return None
    progress: Progress | None = saved.get("attributes", {}).get("progress")
    return progress


# settings of a Trainer under which it would continue with something else than the pruned model
_UNSUPPORTED = {
    "load_best_model_at_end": "would load a checkpoint of other widths into the pruned model",
    "auto_find_batch_size": "restarts training with a model that is already pruned",
    "restore_callback_states_from_checkpoint": "makes new callbacks without their arguments",
}


def _unsupported_run(args: Any) -> str | None:
    several = max(args.world_size, args.n_gpu) > 1
    if several or getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        return (
            "the Trainer would continue with the unpruned Parameters that it has wrapped for "
            "several devices. Train in one process on one device (CUDA_VISIBLE_DEVICES=0), or "
            "prune in your own training loop: examples/accelerate_two_processes.py, "
            "examples/fsdp2_prune_and_recover.py"
        )
    for name, why in _UNSUPPORTED.items():
        if getattr(args, name, False):
            return f"{name}=True {why}. Leave it out"
    return None
