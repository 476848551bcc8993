"""Prune a model folder into a new folder: the steps, in order."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoint.building import Classes
from ..checkpoint.rotary import write_for_transformers_4
from ..errors import PipelineError, UnsupportedModelError
from ..fieldmap.field_map import map_of
from ..fieldmap.layer_map import by_layers
from ..forward.run_recipe import RunRecipe
from ..hook.drop_layers import drop_layers
from ..hook.dropped_layers import DroppedLayers
from ..model.build import Refusal
from ..planning.allocate import Allocation
from ..planning.plan import Plan
from .card import card
from .checks import check_device, dtype_of
from .choice import Choice, choose
from .companions import Copied, copy_companions, notes_on_uncopied
from .job import Job, Pruned, changed, check_job
from .layerwise import layerwise_of
from .material import Material, gather
from .output import new_folder, save_model
from .progress import Progress, Silent
from .roundtrip import Proof, prove_roundtrip
from .source import (
    check_not_quantised,
    check_rotary,
    class_for,
    config_of,
    load,
    load_lazily,
)
from .steps import check_ranking, run_steps
from .streaming import streams
from .widths import decided, planned

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
        plan = planned(job, config, model_class)
        choice = choose(job, text, config, model_class)
        if plan is not None:
            _show(plan, job, progress)
        with _seeded(job.seed):
            result = _prune_and_write(job, config, model_class, plan, choice, work, progress)
    return replace(result, seconds=time.perf_counter() - started)


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
    if streams(job, choice):
        progress.say(f"{job.source.name}: tensors are read when they are needed")
        model, load_notes = load_lazily(job.source, config, model_class, dtype=dtype)
    else:
        progress.say(f"loading {job.source.name}")
        model, load_notes = load(job.source, config, model_class, dtype=dtype, device=job.device)
    if plan is not None and job.ranking != "local":
        check_ranking(job, plan, model)
    choice, material = _material(job, choice, model, progress)
    parameters, before = model.num_parameters(), _perplexities(model, material)
    dropped = _drop(job, model, material, progress)
    widths: Plan | Allocation | None = plan
    if job.widths and plan is None:
        if dropped is not None and choice.measures and material is not None:
            material.measure(progress)
        widths = decided(job, model, choice, material, parameters, progress)
        _show(widths, job, progress)
    recipe = map_of(model, how=by_layers).recipe
    reports = run_steps(job, widths, model, choice, material, progress)
    held_out, second = map(_pair, before, _perplexities(model, material))
    del material  # free the unpruned model: the process that loads the pruned one needs room
    proof, copied, rotary_notes = _write(job, model, recipe, work, progress)
    layerwise = layerwise_of(model)
    notes = [*load_notes, *(widths.notes if isinstance(widths, Plan) else ()), *choice.notes]
    notes += dropped.notes if dropped else ()
    notes += [note for report in reports for note in report.notes]
    notes += rotary_notes
    notes += notes_on_uncopied(job.source, copied, changed(reports))
    if job.layers == "differ" and layerwise is None:
        notes.append("all layers have the same widths in the end: the class is the stock one")
    result = Pruned(
        type(model).__name__,
        job.out,
        widths if isinstance(widths, Plan) else None,
        reports,
        (parameters, model.num_parameters()),
        proof,
        copied,
        held_out,
        second,
        tuple(dict.fromkeys(notes)),
        settings=choice.settings(job),
        dropped=dropped,
        allocation=widths if isinstance(widths, Allocation) else None,
        layerwise=layerwise,
    )
    (work / "README.md").write_text(card(job.source, result), encoding="utf-8")
    return result


def _show(widths: Plan | Allocation, job: Job, progress: Progress) -> None:
    """Show the widths before anything is cut, as far as they are known by then."""
    progress.say(widths)
    if job.ranking != "local":
        progress.say(
            f"the plan is of one ratio for all layers: --ranking {job.ranking} decides how much of "
            "each goes"
        )


def _write(
    job: Job, model: PreTrainedModel, recipe: RunRecipe, work: Path, progress: Progress
) -> tuple[Proof, Copied, tuple[str, ...]]:
    """Write the model and what belongs to it into ``work``, and prove that it loads from there.

    Returns:
        The proof, the files that were copied, and notes.
    """
    save_model(model, work, job.max_shard_size)
    notes = write_for_transformers_4(work, Classes(type(model.config), type(model), 0))
    copied = copy_companions(job.source, model.config, work)
    progress.say("a fresh process loads what was written")
    return prove_roundtrip(model, work, recipe), copied, notes


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
            f"{material.reason}: leave --calibration, --recover, --allocate and --drop-layers out, "
            "and use --importance magnitude or random"
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
