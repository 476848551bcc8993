"""Make the plan, and refuse what can be refused before weights are read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigSyncError, PipelineError
from ..planning.make_plan import plan
from ..planning.plan import Plan
from ..planning.refusals import PlannedRefusal
from .job import Job
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def dtype_of(name: str | None) -> Any:
    """Return the torch dtype of this name, or ``None`` for ``None``.

    Raises:
        PipelineError: the name is not one of float32, float16, bfloat16 and float64.
    """
    import torch

    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise PipelineError(f"dtype {name}: expected float32, float16, bfloat16 or float64")
    return dtype


def check_device(name: str) -> None:
    """Raise if torch cannot use a device.

    Raises:
        PipelineError: torch cannot make a tensor on it.
    """
    import torch

    try:
        torch.zeros(1, device=name)
    except Exception as error:  # torch raises a different error for each device
        raise PipelineError(
            f"device {name} cannot be used: {str(error).splitlines()[0]}"
        ) from error


def plan_for(
    source: Source,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    settings: Mapping[str, Any],
) -> Plan:
    """Return the plan that :func:`~tp_hf_config.plan` makes from the config alone.

    ``settings``: keyword arguments for :func:`~tp_hf_config.plan`.

    Raises:
        PipelineError: a setting is invalid or the target cannot be reached.
        UnsupportedModelError: a field cannot be pruned.
    """
    try:
        return plan(config, model_class=model_class, **settings)
    except ValueError as error:
        raise PipelineError(f"{source.name}: {error}") from error


def check_plan(plan: Plan, job: Job) -> None:
    """Raise if a plan cannot be carried out or would prune nothing.

    Raises:
        ConfigSyncError: the class refuses the widths.
        PipelineError: no width changes, or the disk has too little room for the pruned model.
    """
    if plan.refusal is not None:
        raise ConfigSyncError(_refusal_text(plan, plan.refusal))
    if all(width.after == width.before for width in plan.widths):
        steps = "; ".join(
            f"{w.name} {w.asked:g} of {next(iter(w.before.values())):,}" for w in plan.widths
        )
        why = "; ".join(plan.adjusted) or "Ask for more"
        raise PipelineError(f"these ratios prune nothing ({steps}). {why}")
    free = shutil.disk_usage(job.out.expanduser().resolve().parent).free
    if plan.after is not None and plan.after.bytes > free:
        raise PipelineError(
            f"{job.out}: the pruned model takes {plan.after.bytes:,} bytes, and {free:,} are free"
        )


def _refusal_text(plan: Plan, refusal: PlannedRefusal) -> str:
    """Return a message: why the class refuses the widths, and ratios that it takes."""
    values = ", ".join(f"{name} {value}" for name, value in refusal.values.items())
    lines = [f"{plan.model} refuses {values}: {refusal.reason.rstrip('.')}."]
    for ratios, leads_to in refusal.nearest:
        options = ",".join(f"{name}={ratio:g}" for name, ratio in ratios.items())
        values = ", ".join(f"{name} {value}" for name, value in leads_to.items())
        lines.append(f"It takes --ratios {options} ({values})")
    if not refusal.nearest:
        lines.append("It takes nothing near them: change one ratio at a time")
    return "\n".join(lines)
