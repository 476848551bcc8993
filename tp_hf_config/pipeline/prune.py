"""Prune a model folder into a new folder: source, plan, measure, cut, write."""

from __future__ import annotations

import random
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning as tp

from ..calibration.passes import shown_by
from ..errors import (
    CalibrationWarning,
    ConfigSyncError,
    PipelineError,
    UnsupportedModelError,
)
from ..fieldmap.learn_field_map import map_of
from ..fieldmap.model_view import by_layers
from ..hook.drop_layers import DroppedLayers, drop_layers
from ..hook.hook import HFConfigSyncHook
from ..hook.report import SyncReport
from ..model.config_json import field_name
from ..model.layer_class import layer_lists
from ..model.layer_entries import values_by_layer
from ..model.paging import is_paged, paged
from ..model.surroundings import same_random_state
from ..planning.allocate import Allocation, allocate
from ..planning.make_plan import plan
from ..planning.plan import Plan
from ..planning.quantised import sizes_compared, sizes_now
from ..planning.settings import Target
from .companions import card, copy_companions, snapshot
from .job import Job, Layerwise, Pruned, calibration_text, show, track
from .output import check_savable, check_target, output_folder, save_model
from .proofs import prove_roundtrip
from .source import Source, check_source, class_for, config_of, is_large, load
from .speed import Speed, measure_speed
from .text import Material, choose, gather, measure, recover

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_OF_TORCH_PRUNING = {
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "random": tp.importance.RandomImportance,
}
_RANKINGS = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}


def prune_checkpoint(job: Job) -> Pruned:
    """Prune a model; write it with its tokenizer and other files once it is proved to reload."""
    started = time.perf_counter()
    source = job.source

    # source: its config; can it be pruned, and the result be written?
    check_target(job.out, source=source.folder, overwrite=job.overwrite)
    text = calibration_text(job)
    _check_device(job.device)
    config = config_of(source)
    check_source(source, config)
    if source.folder is None:
        snapshot(source)
    dtype = None if job.dtype is None else getattr(torch, job.dtype)
    config.dtype = dtype or config.dtype
    model_class = class_for(source, config)

    # plan: all that follows from the config
    planned = planned_widths(job, config, model_class)
    choice = choose(job, text, config, model_class)

    with (
        output_folder(job.out, source=source.folder, overwrite=job.overwrite) as work,
        _seeded(job.seed),
        paged(work if _streams(job) else None),
    ):
        if planned is not None:
            _show(planned, job)

        # measure: the unpruned model on a text
        show(f"{'mapping' if is_paged() else 'loading'} {source.name}")
        model, notes_of_loading = load(source, config, model_class, dtype=dtype, device=job.device)
        check_savable(model)
        if planned is not None and job.ranking != "local":
            _check_ranking(model, planned, job)
        material = gather(job, choice, model)
        parameters, before = model.num_parameters(), material.perplexities(model)
        slow, target = _speed(job, model), Target.of(job.widths.get("target"))
        sizes = sizes_now(model, target, source.folder)

        # cut: layers first, then widths
        dropped = _dropped_layers(job, model, material)
        widths = planned or _widths_of_the_loaded(model, parameters, job, material)
        recipe = map_of(model, how=by_layers).recipe  # how the class runs before it is pruned
        steps = run_steps(job, model, widths, material)
        after = material.perplexities(model)
        fast = _speed(job, model)
        quantised = sizes_compared(sizes, sizes_now(model, target, source.folder), target)
        del material  # and the unpruned model: the process that loads the pruned one needs memory

        # write: the model and what belongs to it, once a fresh process has loaded it
        notes_of_saving = save_model(model, work, job.max_shard_size)
        copied = copy_companions(source, work)
        show("a fresh process loads what was written")
        proof = prove_roundtrip(model, work, recipe)
        plan_used = widths if isinstance(widths, Plan) else None
        layerwise = _layerwise(model)
        notes = [*notes_of_loading, *(plan_used.notes if plan_used else ())]
        notes += dropped.notes if dropped else ()
        notes += [note for step in steps for note in step.notes]
        notes += [
            f"perplexity on {text} was {old:.1f} and is not finite after pruning: prune less"
            for text, old in before.items()
            if text not in after
        ]
        notes += [*notes_of_saving, *copied.notes]
        if job.per_layer and layerwise is None:
            notes.append(
                "all layers have the same widths after pruning, so the stock class is used"
            )
        # the notes of steps have the sizes without the tokenizer
        sized = tuple(f"{size.format}: " for size in quantised)
        result = Pruned(
            type(model).__name__,
            job.out,
            plan_used,
            steps,
            (parameters, model.num_parameters()),
            proof,
            copied,
            {text: (old, after[text]) for text, old in before.items() if text in after},
            None if slow is None or fast is None else (slow, fast),
            tuple(dict.fromkeys(note for note in notes if not note.startswith(sized))),
            quantised,
            settings=choice.settings(job),
            dropped_layers=dropped,
            allocation=widths if isinstance(widths, Allocation) else None,
            layers_differ=layerwise,
        )
        (work / "README.md").write_text(card(source, result), encoding="utf-8")
    return replace(result, seconds=time.perf_counter() - started)


def _speed(job: Job, model: PreTrainedModel) -> Speed | None:
    if not job.measure_speed:
        return None
    show("measuring the speed")
    try:
        return measure_speed(model)
    except (UnsupportedModelError, ValueError) as error:
        raise UnsupportedModelError(
            f"{error}. Leave --measure-speed out; in Python, tp_hf_config.measure_speed measures "
            "the model with other inputs"
        ) from error


def _streams(job: Job) -> bool:
    """True if computed weights go into mapped files, not memory; the result is the same."""
    return is_large(job.source) if job.stream is None else job.stream


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = random.getstate()
    try:
        with same_random_state(seed):
            random.seed(seed)  # Torch-Pruning 1.5 shuffles with it
            yield
    finally:
        random.setstate(state)


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except Exception as error:  # torch raises a different error for each device
        raise PipelineError(
            f"device {name} cannot be used: {str(error).splitlines()[0]}"
        ) from error


# ------------------------------------------------------------------------------------------- plan


def planned_widths(
    job: Job, config: PreTrainedConfig, model_class: type[PreTrainedModel]
) -> Plan | None:
    """Return the plan, checked; ``None`` if no width is pruned, or widths are decided later."""
    if not job.widths:
        return None
    if job.drop_layers or job.allocate:
        # only a check: the target is reached later, with widths by layer or with fewer layers
        widths = {name: value for name, value in job.widths.items() if name != "target_params"}
        plan_for(job.source, config, model_class, widths)
        return None
    return _checked(plan_for(job.source, config, model_class, job.widths), job)


def plan_for(
    source: Source,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    settings: Mapping[str, Any],
) -> Plan:
    try:
        return plan(config, model_class=model_class, **settings)
    except ValueError as error:
        raise PipelineError(f"{source.name}: {error}") from error


def _checked(planned: Plan, job: Job) -> Plan:
    if planned.refusal is not None:
        raise ConfigSyncError(f"{planned.model}: {planned.refusal}")
    if all(width.after == width.before for width in planned.widths):
        steps = "; ".join(
            f"{w.name} {w.asked:g} of {next(iter(w.before.values())):,}" for w in planned.widths
        )
        why = "; ".join(planned.adjusted) or "Increase the ratio"
        raise PipelineError(f"these ratios prune nothing ({steps}). {why}")
    free = shutil.disk_usage(job.out.expanduser().resolve().parent).free
    if planned.after is not None and planned.after.bytes > free:
        raise PipelineError(
            f"{job.out}: the pruned model needs {planned.after.bytes:,} bytes on the disk, but "
            f"only {free:,} are free"
        )
    return planned


def _show(widths: Plan | Allocation, job: Job) -> None:
    show(widths)
    if job.ranking != "local":
        show(
            f"the plan assumes one ratio for all layers; --ranking {job.ranking} decides how much "
            "of each layer is pruned"
        )


# -------------------------------------------------------------------------------------------- cut


def _widths_of_the_loaded(
    model: PreTrainedModel, parameters: int, job: Job, material: Material
) -> Plan | Allocation | None:
    """Decide the widths for which there is no plan: layers were dropped, or each has its own.

    ``parameters``: of the model before layers were dropped, of which a target is a share.
    """
    if not job.widths:
        return None
    settings = dict(job.widths)
    if settings.get("target_params", 2) <= 1:
        settings["target_params"] = int(settings["target_params"] * parameters)
    if job.drop_layers and material.choice.measures and material.calibration is not None:
        measure(material.calibration)
    widths: Plan | Allocation
    if job.allocate:
        widths = _allocated(model, settings, material)
    else:
        widths = _checked(plan_for(job.source, model.config, type(model), settings), job)
    _show(widths, job)
    return widths


def _dropped_layers(job: Job, model: PreTrainedModel, material: Material) -> DroppedLayers | None:
    count = job.drop_layers
    if not count:
        return None
    try:
        dropped = drop_layers(
            model,
            count=count,
            calibration=material.calibration,
            refit=material.refit,
            which=job.drop_from,
        )
    except ValueError as error:
        raise PipelineError(f"--drop-layers {count}: {error}") from error
    show(str(dropped))
    return dropped


def _allocated(
    model: PreTrainedModel, settings: Mapping[str, Any], material: Material
) -> Allocation:
    calibration, target = material.calibration, settings["target_params"]
    assert calibration is not None  # the user asked for --allocate, so there is a text
    if not calibration.held_out:
        raise PipelineError(
            "--allocate compares layers on held-out text, but the text has only one window: give a "
            "longer text (--calibration FILE), or leave --tokens out"
        )
    if model.num_parameters() <= target:
        raise PipelineError(
            f"--allocate: the model already has only {model.num_parameters():,} parameters, so "
            f"--target-params {target:,.0f} prunes no width. Choose a smaller target"
        )
    show(
        "allocating: each layer is pruned and refitted on its own, and the model's outputs are "
        "compared"
    )
    kind: Any = material.choice.importance
    try:
        return allocate(
            model,
            calibration,
            target_params=target,
            prune=settings.get("prune"),
            importance=kind,
            round_to=settings.get("round_to"),
            target=settings.get("target"),
        )
    except ValueError as error:
        raise PipelineError(f"--allocate: {error}") from error


def run_steps(
    job: Job,
    model: PreTrainedModel,
    widths: Plan | Allocation | None,
    material: Material,
) -> tuple[SyncReport, ...]:
    if widths is None:
        recover(model, material, job.recover, "recovery")
        return ()
    hook = HFConfigSyncHook(plan=widths, refit=material.refit)
    name: Any = material.choice.importance
    if name in _OF_TORCH_PRUNING:
        importance = _OF_TORCH_PRUNING[name]()
    else:
        assert material.calibration is not None  # all other importances have a text
        importance = material.calibration.importance(name)
    pruner = _pruner(job, model, importance, hook)
    steps = job.steps
    for step in range(1, steps + 1):
        with shown_by(track):
            pruner.step()
        show(str(hook.last_report))
        updates = job.recover * step // steps - job.recover * (step - 1) // steps
        recover(model, material, updates, f"step {step}/{steps}: recovery")
    return tuple(hook.reports)


def _check_ranking(model: PreTrainedModel, planned: Plan, job: Job) -> None:
    """Raise if layers ranked together would end with widths that no config describes."""
    # the constructor of a pruner checks it, before the model is run on a text
    hook = HFConfigSyncHook(plan=planned)
    _pruner(job, model, tp.importance.GroupMagnitudeImportance(), hook)


def _pruner(job: Job, model: PreTrainedModel, importance: Any, hook: HFConfigSyncHook) -> Any:
    ranking = _RANKINGS[job.ranking]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # its advice is for Python users
        return tp.pruner.MetaPruner(
            model, None, importance, iterative_steps=job.steps, **ranking, hooks=[hook]
        )


def _layerwise(model: PreTrainedModel) -> Layerwise | None:
    model_class: Any = type(model)
    if not layer_lists(model_class):
        return None
    return Layerwise(
        {field_name(field): values for field, values in values_by_layer(model).items()},
        model_class._auto_class,
        f"{model_class.__module__.rpartition('.')[2]}.py",
    )
