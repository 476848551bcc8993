"""Decide which widths a job prunes to: planned from the config, or allocated by sensitivity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import PipelineError
from ..planning.allocate import Allocation, allocate
from ..planning.plan import Plan
from .checks import check_plan, plan_for
from .job import Job
from .material import Run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def planned(job: Job, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Plan | None:
    """Return the plan; ``None`` if no width is pruned, or if :func:`decided` has to say which.

    Whether the widths that the job names can be pruned is checked in either case.

    Raises:
        PipelineError: a setting is invalid, the plan prunes nothing or cannot be carried out.
        UnsupportedModelError: a field cannot be pruned, or layers cannot differ.
        ConfigSyncError: the class refuses the widths.
    """
    if not job.widths:
        return None
    if job.drop_layers or job.allocate:
        # the target is met later, by other means or with fewer layers
        widths = {name: value for name, value in job.widths.items() if name != "target_params"}
        plan_for(job.source, config, model_class, widths)
        return None
    plan = plan_for(job.source, config, model_class, job.widths)
    check_plan(plan, job)
    return plan


def decided(run: Run, parameters: int) -> Plan | Allocation:
    """Return the widths of a model that has been read, and has lost the layers that go.

    A target stays a share of the whole model, which had so many ``parameters``.

    Raises:
        PipelineError: a setting is invalid, or the target cannot be reached.
        UnsupportedModelError: a field cannot be pruned, or not in single layers.
        ConfigSyncError: the class refuses the widths.
    """
    job, model = run.job, run.model
    widths = dict(job.widths)
    if widths.get("target_params", 2) <= 1:
        widths["target_params"] = int(widths["target_params"] * parameters)
    if job.allocate:
        return _allocated(run, widths)
    plan = plan_for(job.source, model.config, type(model), widths)
    check_plan(plan, job)
    return plan


def _allocated(run: Run, widths: dict[str, Any]) -> Allocation:
    """Return widths for every layer, by sensitivity; ``widths`` has the target as a number."""
    model, material = run.model, run.material
    assert material is not None  # the user asked for it, so that there is a text or an error
    calibration, target = material.calibration, widths["target_params"]
    assert calibration is not None
    if not calibration.held_out:
        raise PipelineError(
            "--allocate compares layers on text that is held out, and there is one window alone: "
            "give a longer text (--calibration FILE), or leave --tokens out"
        )
    if model.num_parameters() <= target:
        raise PipelineError(
            f"--allocate: the model has {model.num_parameters():,} parameters by then, so "
            f"--target-params {target:,.0f} prunes no width: take a smaller target"
        )
    run.progress.say(
        "allocating: every layer is cut and refitted alone, the model's answers compared"
    )
    kind: Any = run.choice.importance
    try:
        return allocate(
            model,
            calibration,
            target_params=target,
            prune=widths.get("prune"),
            importance=kind,
            round_to=widths.get("round_to", 1),
        )
    except ValueError as error:
        raise PipelineError(f"--allocate: {error}") from error
