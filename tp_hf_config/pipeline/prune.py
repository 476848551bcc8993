"""Prune a model folder into a new folder: the steps, in order."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.building import Classes
from ..checkpoint.rotary import write_for_transformers_4
from ..errors import CalibrationWarning, PipelineError, UnsupportedModelError
from ..fieldmap.field_map import map_of
from ..fieldmap.layer_map import by_layers
from ..hook.drop_layers import drop_layers
from ..hook.dropped_layers import DroppedLayers
from ..hook.hook import HFConfigSyncHook
from ..hook.report import SyncReport
from ..model.build import Refusal
from ..planning.plan import Plan
from .card import card
from .checks import check_device, check_plan, dtype_of, plan_for
from .choice import Choice, choose
from .companions import copy_companions, notes_on_uncopied
from .job import Importance, Job, Pruned, changed, check_job
from .material import Material, gather, measure
from .output import new_folder, save_model
from .progress import Progress, Silent
from .recovery import accumulate_gradients, recover
from .roundtrip import prove_roundtrip
from .source import check_not_quantised, check_rotary, class_for, config_of, load

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..calibration.calibrate import Calibration

_OF_TORCH_PRUNING: dict[Importance, str] = {
    "magnitude": "GroupMagnitudeImportance",
    "taylor": "GroupTaylorImportance",
    "random": "RandomImportance",
}


def prune_checkpoint(job: Job, progress: Progress | None = None) -> Pruned:
    """Prune a model and write it with its tokenizer and other files, once it is proved to reload.

    Args:
        job: what to prune, how, and where to write the result.
        progress: where to show how far the job is; default: nowhere.

    Raises:
        PipelineError: something cannot be read or written, or the round trip is not proved.
        CalibrationError: the model cannot be measured on the text.
        UnsupportedModelError: the model, or one of its widths, cannot be pruned.
        ConfigSyncError: the class refuses the widths.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    text = check_job(job)
    with new_folder(job.out, source=job.source.folder, overwrite=job.overwrite) as work:
        check_device(job.device)
        config = config_of(job.source)
        check_not_quantised(job.source, config)
        check_rotary(job.source)
        config.dtype = dtype_of(job.dtype) or config.dtype
        model_class = class_for(job.source, config)
        plan = _plan(job, config, model_class)
        choice = choose(job, text, config, model_class)
        if plan is not None:
            progress.say(plan)
        with _seeded(job.seed):
            result = _prune_and_write(job, config, model_class, plan, choice, work, progress)
    return replace(result, seconds=time.perf_counter() - started)


def _plan(job: Job, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Plan | None:
    """Return the plan; ``None`` if no width is pruned, or if layers are dropped first.

    For fewer layers it is made later. Whether the widths that the job names can be pruned is
    checked here all the same; a target may only be reached without these layers.
    """
    if not job.widths:
        return None
    if job.drop_layers:
        widths = {name: value for name, value in job.widths.items() if name != "target_params"}
        plan_for(job.source, config, model_class, widths)
        return None
    plan = plan_for(job.source, config, model_class, job.widths)
    check_plan(plan, job)
    return plan


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch and ``random`` for the block; restore the caller's CPU random state afterwards."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)  # Torch-Pruning 1.5 shuffles with it
            yield
    finally:
        random.setstate(state)


def _prune_and_write(
    job: Job,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    plan: Plan | None,
    choice: Choice,
    work: Path,
    progress: Progress,
) -> Pruned:
    """Load, prune and prove the model, and write everything into the unfinished folder ``work``."""
    dtype = dtype_of(job.dtype)
    progress.say(f"loading {job.source.name}")
    model, load_notes = load(job.source, config, model_class, dtype=dtype, device=job.device)
    choice, material = _material(job, choice, model, progress)
    parameters, before = model.num_parameters(), _perplexities(model, material)
    dropped = _drop(job, model, material, progress)
    if job.widths and dropped is not None:
        plan = _plan_of_fewer(job, model, parameters)
        progress.say(plan)
        if choice.measures and material is not None and material.calibration is not None:
            measure(material.calibration, progress)
    recipe = map_of(model, how=by_layers).recipe
    reports = _prune(job, plan, model, choice, material, progress)
    held_out, second = map(_pair, before, _perplexities(model, material))
    del material  # free the unpruned model: the process that loads the pruned one needs room
    save_model(model, work, job.max_shard_size)
    rotary_notes = write_for_transformers_4(work, Classes(type(model.config), type(model), 0))
    copied = copy_companions(job.source, model.config, work)
    progress.say("a fresh process loads what was written")
    proof = prove_roundtrip(model, work, recipe)
    notes = [*load_notes, *(plan.notes if plan else ()), *choice.notes]
    notes += dropped.notes if dropped else ()
    notes += [note for report in reports for note in report.notes]
    notes += rotary_notes
    notes += notes_on_uncopied(job.source, copied, changed(reports))
    result = Pruned(
        type(model).__name__,
        job.out,
        plan,
        reports,
        (parameters, model.num_parameters()),
        proof,
        copied,
        held_out,
        second,
        tuple(dict.fromkeys(notes)),
        settings=choice.settings(job),
        dropped=dropped,
    )
    (work / "README.md").write_text(card(job.source, result), encoding="utf-8")
    return result


def _material(
    job: Job, choice: Choice, model: PreTrainedModel, progress: Progress
) -> tuple[Choice, Material | None]:
    """Return what the job does with this model, and what it runs it on; ``None``: nothing.

    Raises:
        UnsupportedModelError: the model does not run on text alone, and the user asked for that.
    """
    material = None if choice.origin is None else gather(job, choice, model, progress)
    if not isinstance(material, Refusal):
        return choice, material
    if choice.asked:
        raise UnsupportedModelError(
            f"{material.reason}: leave --calibration and --recover out, and use --importance "
            "magnitude or random"
        )
    return choice.without_text(material.reason), None


def _perplexities(
    model: PreTrainedModel, material: Material | None
) -> tuple[float | None, float | None]:
    return (None, None) if material is None else material.perplexities(model)


def _pair(before: float | None, after: float | None) -> tuple[float, float] | None:
    return None if before is None or after is None else (before, after)


def _drop(
    job: Job, model: PreTrainedModel, material: Material | None, progress: Progress
) -> DroppedLayers | None:
    """Drop the layers that change least on the text; return the report, ``None`` if none go.

    Raises:
        PipelineError: there are not so many layers.
    """
    if not job.drop_layers or material is None:
        return None
    try:
        dropped = drop_layers(
            model, count=job.drop_layers, calibration=material.calibration, which=job.drop_from
        )
    except ValueError as error:
        raise PipelineError(f"--drop-layers {job.drop_layers}: {error}") from error
    progress.say(str(dropped))
    return dropped


def _plan_of_fewer(job: Job, model: PreTrainedModel, parameters: int) -> Plan:
    """Return the plan for a model that lost layers; a target stays a share of the whole model.

    Args:
        job: the job.
        model: the model, with the layers that are left.
        parameters: how many it had before.
    """
    widths = dict(job.widths)
    if widths.get("target_params", 2) <= 1:
        widths["target_params"] = int(widths["target_params"] * parameters)
    plan = plan_for(job.source, model.config, type(model), widths)
    check_plan(plan, job)
    return plan


def _prune(
    job: Job,
    plan: Plan | None,
    model: PreTrainedModel,
    choice: Choice,
    material: Material | None,
    progress: Progress,
) -> tuple[SyncReport, ...]:
    """Run all steps, with gradients before and recovery after each; return one report per step."""
    import torch_pruning as tp

    if plan is None:
        if material is not None and material.teacher is not None:
            objective, batches = material.objective, material.batches
            recover(model, material.teacher, objective, batches, job.recover, progress, "recovery")
        return ()
    calibration = None if material is None else material.calibration
    hook = HFConfigSyncHook(strict=True, compensate=calibration if choice.compensate else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # it says what to do in Python
        pruner = tp.pruner.MetaPruner(
            model,
            **plan.pruner_kwargs(model),
            importance=_importance(choice, calibration),
            hooks=[hook],
        )
    steps = plan.settings.iterative_steps
    for step in range(1, steps + 1):
        name = f"step {step}/{steps}"
        if material is not None and choice.importance == "taylor":
            what = f"{name}: gradients"
            accumulate_gradients(model, material.objective, material.batches, progress, what)
        pruner.step()
        progress.say(str(hook.last_report))
        updates = job.recover * step // steps - job.recover * (step - 1) // steps
        if material is not None and material.teacher is not None and updates:
            what = f"{name}: recovery"
            objective, batches = material.objective, material.batches
            recover(model, material.teacher, objective, batches, updates, progress, what)
    model.zero_grad()
    return tuple(hook.reports)


def _importance(choice: Choice, calibration: Calibration | None) -> Any:
    """Return what a pruner calls to rank the channels of a group."""
    import torch_pruning as tp

    name: Any = choice.importance
    if name in _OF_TORCH_PRUNING:
        return getattr(tp.importance, _OF_TORCH_PRUNING[name])()
    assert calibration is not None  # the choice has a text for all others
    return calibration.importance(name)
