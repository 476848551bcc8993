"""Run a pruner's steps, with gradients before and recovery after each."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch_pruning as tp

from ..calibration.passes import shown_by
from ..errors import CalibrationWarning
from ..hook.hook import HFConfigSyncHook
from ..hook.report import SyncReport
from ..planning.allocate import Allocation
from ..planning.plan import Plan
from .choice import Choice
from .job import Importance
from .material import Run
from .recovery import accumulate_gradients, recover

if TYPE_CHECKING:
    from ..calibration.calibrate import Calibration

_OF_TORCH_PRUNING: dict[Importance, str] = {
    "magnitude": "GroupMagnitudeImportance",
    "taylor": "GroupTaylorImportance",
    "random": "RandomImportance",
}
_RANKINGS = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}


def run_steps(run: Run, widths: Plan | Allocation | None) -> tuple[SyncReport, ...]:
    """Run all steps; return one report per step.

    Without widths there is none, but the model recovers.
    """
    job, model, choice = run.job, run.model, run.choice
    material, progress = run.material, run.progress
    if widths is None:
        if material is not None and material.teacher is not None:
            recover(model, material, job.recover, progress, "recovery")
        return ()
    calibration = None if material is None else material.calibration
    hook = HFConfigSyncHook(
        compensate=calibration if choice.compensate else None, layers=job.layers
    )
    pruner = _pruner(run, widths, _importance(choice, calibration), hook)
    steps = job.steps
    for step in range(1, steps + 1):
        name = f"step {step}/{steps}"
        if material is not None and choice.importance == "taylor":
            accumulate_gradients(model, material, progress, f"{name}: gradients")
        with shown_by(progress.track):
            pruner.step()
        progress.say(str(hook.last_report))
        updates = job.recover * step // steps - job.recover * (step - 1) // steps
        if material is not None and material.teacher is not None and updates:
            recover(model, material, updates, progress, f"{name}: recovery")
    model.zero_grad()
    return tuple(hook.reports)


def check_ranking(run: Run, plan: Plan) -> None:
    """Raise if layers that are ranked together would end with widths that no config can say.

    A pruner that is made and not used tells, before the model is run on any text.

    Raises:
        ConfigSyncError: as above.
    """
    hook = HFConfigSyncHook(layers=run.job.layers)
    _pruner(run, plan, tp.importance.GroupMagnitudeImportance(), hook)


def _pruner(run: Run, widths: Plan | Allocation, importance: Any, hook: HFConfigSyncHook) -> Any:
    """Return a pruner that prunes to these widths, and a hook follows."""
    job, model = run.job, run.model
    if isinstance(widths, Allocation):
        arguments = widths.pruner_kwargs(model, iterative_steps=job.steps)
    else:
        arguments = widths.pruner_kwargs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # it says what to do in Python
        return tp.pruner.MetaPruner(
            model, **{**arguments, **_RANKINGS[job.ranking]}, importance=importance, hooks=[hook]
        )


def _importance(choice: Choice, calibration: Calibration | None) -> Any:
    """Return what a pruner calls to rank the channels of a group."""
    name: Any = choice.importance
    if name in _OF_TORCH_PRUNING:
        return getattr(tp.importance, _OF_TORCH_PRUNING[name])()
    assert calibration is not None  # the choice has a text for all others
    return calibration.importance(name)
