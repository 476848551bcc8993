"""Prune a model folder into a new folder: the steps, in order."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.building import Classes
from ..checkpoint.rotary import write_for_transformers_4
from ..errors import PipelineError, UnsupportedModelError
from ..fieldmap.field_map import map_of
from ..hook.hook import HFConfigSyncHook
from ..hook.report import SyncReport
from ..planning.plan import Plan
from .calibration import Objective, Text, objective_of, shuffled, takes_text, windows_of
from .card import card
from .checks import check_device, check_plan, dtype_of, plan_for
from .companions import copy_companions, notes_on_uncopied
from .job import Importance, Job, Pruned, changed, check_job
from .output import new_folder
from .progress import Progress, Silent
from .recovery import accumulate_gradients, recover
from .roundtrip import prove_roundtrip
from .source import check_not_quantised, check_rotary, class_for, config_of, load, tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

_IMPORTANCES: dict[Importance, str] = {
    "magnitude": "GroupMagnitudeImportance",
    "taylor": "GroupTaylorImportance",
    "random": "RandomImportance",
}


@dataclass(frozen=True)
class _Calibration:
    """A calibration text, and what is needed to use it.

    Attributes:
        text: the windows of the text.
        objective: what the model is asked about them.
        batches: training windows ``(1, tokens)``, without end.
        teacher: a copy of the unpruned model; ``None`` without recovery.
    """

    text: Text
    objective: Objective
    batches: Iterator[Tensor]
    teacher: PreTrainedModel | None


def prune_checkpoint(job: Job, progress: Progress | None = None) -> Pruned:
    """Prune a model and write it with its tokenizer and other files, once it is proved to reload.

    Args:
        job: what to prune, how, and where to write the result.
        progress: where to show how far the job is; default: nowhere.

    Raises:
        PipelineError: something cannot be read or written, or the round trip is not proved.
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
        plan = plan_for(job.source, config, model_class, job.widths)
        check_plan(plan, job)
        if text is not None and not takes_text(model_class):
            raise UnsupportedModelError(
                f"{model_class.__name__} takes no text, so --calibration is of no use to it. Leave "
                "it out (and --recover), and use --importance magnitude or random"
            )
        progress.say(plan)
        with _seeded(job.seed):
            result = _prune_and_write(job, config, model_class, plan, text, work, progress)
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
    plan: Plan,
    text: str | None,
    work: Path,
    progress: Progress,
) -> Pruned:
    """Load, prune and prove the model, and write everything into the unfinished folder ``work``."""
    dtype = dtype_of(job.dtype)
    progress.say(f"loading {job.source.name}")
    model, load_notes = load(job.source, config, model_class, dtype=dtype, device=job.device)
    calibration = None if text is None else _calibration(job, model, text)
    parameters, perplexity = model.num_parameters(), _perplexity(model, calibration)
    recipe = map_of(model).recipe
    reports = _prune(job, plan, model, calibration, progress)
    after = _perplexity(model, calibration)
    del calibration  # free the unpruned model: the process that loads the pruned one needs room
    _save(model, work, job.max_shard_size)
    rotary_notes = write_for_transformers_4(work, Classes(type(model.config), type(model), 0))
    copied = copy_companions(job.source, model.config, work)
    progress.say("a fresh process loads what was written")
    proof = prove_roundtrip(model, work, recipe)
    notes = [*load_notes, *plan.notes, *(note for report in reports for note in report.notes)]
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
        None if perplexity is None or after is None else (perplexity, after),
        tuple(dict.fromkeys(notes)),
        settings=job.settings,
    )
    (work / "README.md").write_text(card(job.source, result), encoding="utf-8")
    return result


def _calibration(job: Job, model: PreTrainedModel, text: str) -> _Calibration:
    tokenizer = tokenizer_of(job.source)
    windows = windows_of(text, tokenizer, model)
    return _Calibration(
        windows,
        objective_of(model, tokenizer, windows.train[:1]),
        shuffled(windows.train, job.seed),
        copy.deepcopy(model) if job.recover else None,
    )


def _perplexity(model: PreTrainedModel, calibration: _Calibration | None) -> float | None:
    if calibration is None:
        return None
    return calibration.objective.perplexity(model, calibration.text.held_out)


def _prune(
    job: Job,
    plan: Plan,
    model: PreTrainedModel,
    calibration: _Calibration | None,
    progress: Progress,
) -> tuple[SyncReport, ...]:
    """Run all steps, with gradients before and recovery after each; return one report per step."""
    import torch_pruning as tp

    hook = HFConfigSyncHook(strict=True)
    pruner = tp.pruner.MetaPruner(
        model,
        **plan.pruner_kwargs(model),
        importance=getattr(tp.importance, _IMPORTANCES[job.importance])(),
        hooks=[hook],
    )
    steps = plan.settings.iterative_steps
    for step in range(1, steps + 1):
        name = f"step {step}/{steps}"
        if calibration is not None and job.importance == "taylor":
            what = f"{name}: gradients"
            accumulate_gradients(model, calibration.objective, calibration.batches, progress, what)
        pruner.step()
        progress.say(str(hook.last_report))
        updates = job.recover * step // steps - job.recover * (step - 1) // steps
        if calibration is not None and calibration.teacher is not None and updates:
            what = f"{name}: recovery"
            objective, batches = calibration.objective, calibration.batches
            recover(model, calibration.teacher, objective, batches, updates, progress, what)
    model.zero_grad()
    return tuple(hook.reports)


def _save(model: PreTrainedModel, folder: Path, max_shard_size: str | None) -> None:
    from safetensors import SafetensorError

    shards: Any = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    try:
        model.save_pretrained(folder, **shards)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise PipelineError(f"the weights cannot be written: {error}") from error
