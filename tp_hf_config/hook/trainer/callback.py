"""A callback that prunes on a schedule while a ``transformers.Trainer`` trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch_pruning as tp
from transformers.trainer_callback import (
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from ...arguments import check_arguments, taken_by
from ...errors import TrainingError
from ...model.config_json import with_values
from ...planning.pruner_graph import check_names, check_values
from ...planning.settings import INNER
from ..hook import HFConfigSyncHook
from .optimizer import cannot_follow, optimizer_follows, unwrapped
from .resume import Progress, fields_of, full_config, progress_of, pruner_at, sync_hook_of


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
        if self.pruner is None:
            return {"args": {}, "attributes": {}}
        progress = progress_of(self.pruner, self._unpruned)
        return {"args": {}, "attributes": {"progress": progress}}

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
            self._unpruned = full_config(model, sync_hook_of(self.pruner).per_layer)
        else:
            self.pruner = pruner_at(saved, model, self._make_pruner)
            self._unpruned = with_values(full_config(model, saved["per_layer"]), fields_of(saved))
        self.hook = sync_hook_of(self.pruner)
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
