"""Prune a model folder into a new folder: the steps, in order."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..forward.run_recipe import RunRecipe
from ..model.paging import is_paged, paged
from ..model.surroundings import same_random_state
from ..planning.allocate import Allocation
from ..planning.plan import Plan
from .card import card
from .checks import check_device, dtype_of
from .choice import Choice, choose
from .companions import Copied, copy_companions, fetch_companions, notes_on_uncopied
from .deciding import decide, show
from .job import TEXTS, Job, Pruned, calibration_text, changed, check_job
from .layerwise import layerwise_of
from .material import Run
from .output import abandoned, check_savable, new_folder, save_model
from .progress import Progress, Silent
from .roundtrip import Proof, prove_roundtrip
from .source import class_for, config_of, load
from .source_checks import check_source
from .streaming import streams
from .widths import planned

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
    check_job(job)
    text = calibration_text(job)
    for line in abandoned(job.out):
        progress.say(line)
    check_device(job.device)
    config = config_of(job.source)
    check_source(job.source, config)
    fetch_companions(job.source)
    config.dtype = dtype_of(job.dtype) or config.dtype
    model_class = class_for(job.source, config)
    plan = planned(job, config, model_class)
    choice = choose(job, text, config, model_class)
    with new_folder(job.out, source=job.source.folder, overwrite=job.overwrite) as work:
        if plan is not None:
            show(plan, job, progress)
        with _seeded(job.seed), paged(work if streams(job) else None):
            result = _prune_and_write(job, config, model_class, plan, choice, work, progress)
    return replace(result, seconds=time.perf_counter() - started)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch and ``random`` for the block; restore the caller's random state afterwards."""
    state = random.getstate()
    try:
        with same_random_state(seed):
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
    """Load, prune and prove the model, and write everything into the unfinished folder."""
    dtype = dtype_of(job.dtype)
    progress.say(f"{'mapping' if is_paged() else 'loading'} {job.source.name}")
    model, load_notes = load(job.source, config, model_class, dtype=dtype, device=job.device)
    check_savable(model)
    run = Run(job, model, choice, progress)
    cut = decide(run, plan)
    after, choice, widths = run.perplexities(), run.choice, cut.widths
    del run  # free the unpruned model: the process that loads the pruned one needs room
    proof, copied, rotary_notes = _write(job, model, cut.recipe, work, progress)
    layerwise = layerwise_of(model)
    held_out, second = map(_pair, cut.perplexities, after)
    notes = [*load_notes, *(widths.notes if isinstance(widths, Plan) else ()), *choice.notes]
    notes += cut.dropped.notes if cut.dropped else ()
    notes += [note for report in cut.reports for note in report.notes]
    notes += _lost_perplexities(cut.perplexities, after)
    notes += [*rotary_notes, *copied.notes]
    notes += notes_on_uncopied(job.source, copied, changed(cut.reports))
    if job.layers == "differ" and layerwise is None:
        notes.append("all layers have the same widths in the end: the class is the stock one")
    result = Pruned(
        type(model).__name__,
        job.out,
        widths if isinstance(widths, Plan) else None,
        cut.reports,
        (cut.parameters, model.num_parameters()),
        proof,
        copied,
        held_out,
        second,
        tuple(dict.fromkeys(notes)),
        settings=choice.settings(job),
        dropped_layers=cut.dropped,
        allocation=widths if isinstance(widths, Allocation) else None,
        layers_differ=layerwise,
    )
    (work / "README.md").write_text(card(job.source, result), encoding="utf-8")
    return result


def _write(
    job: Job, model: PreTrainedModel, recipe: RunRecipe, work: Path, progress: Progress
) -> tuple[Proof, Copied, tuple[str, ...]]:
    """Write the model and what belongs to it into ``work``, and prove that it loads from there.

    Returns:
        The proof, the files that were copied, and notes.
    """
    notes = save_model(model, work, job.max_shard_size)
    copied = copy_companions(job.source, work)
    progress.say("a fresh process loads what was written")
    return prove_roundtrip(model, work, recipe), copied, notes


def _lost_perplexities(
    before: Sequence[float | None], after: Sequence[float | None]
) -> Iterator[str]:
    """Yield a note on each text of which the pruned model's perplexity is no finite number."""
    for text, old, new in zip(TEXTS, before, after, strict=True):
        if old is not None and new is None:
            yield f"perplexity on {text} was {old:.1f}, and is not finite now: prune less"


def _pair(before: float | None, after: float | None) -> tuple[float, float] | None:
    return None if before is None or after is None else (before, after)
