"""Decide what a job cuts, and cut it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PipelineError, UnsupportedModelError
from ..fieldmap.layer_map import by_layers
from ..fieldmap.learn_field_map import map_of
from ..forward.run_recipe import RunRecipe
from ..hook.drop_layers import drop_layers
from ..hook.dropped_layers import DroppedLayers
from ..hook.report import SyncReport
from ..model.build import Refusal
from ..planning.allocate import Allocation
from ..planning.plan import Plan
from .job import Job
from .material import Run, gather, measure
from .progress import Progress
from .steps import check_ranking, run_steps
from .widths import decided


@dataclass(frozen=True)
class Cut:
    """What became of a model in its steps.

    Attributes:
        recipe: how its class was run before it was pruned.
        widths: the widths that it was pruned to; ``None``: only layers were dropped.
        parameters: how many parameters it had.
        perplexities: the perplexities that it had.
        dropped: the layers that were dropped.
        reports: one for each step.
    """

    recipe: RunRecipe
    widths: Plan | Allocation | None
    parameters: int
    perplexities: tuple[float | None, float | None]
    dropped: DroppedLayers | None
    reports: tuple[SyncReport, ...]


def decide(run: Run, plan: Plan | None) -> Cut:
    """Decide what goes, by the model's weights and a text, and prune the model in place.

    ``plan``: the plan; ``None``: widths are decided on the way, or none are pruned.
    """
    job, model = run.job, run.model
    if plan is not None and job.ranking != "local":
        check_ranking(run, plan)
    _gather(run)
    parameters, before = model.num_parameters(), run.perplexities()
    dropped = _drop(run)
    widths: Plan | Allocation | None = plan
    if job.widths and plan is None:
        calibration = None if run.material is None else run.material.calibration
        if dropped is not None and run.choice.measures and calibration is not None:
            measure(calibration, run.progress)
        widths = decided(run, parameters)
        show(widths, job, run.progress)
    recipe = map_of(model, how=by_layers).recipe
    return Cut(recipe, widths, parameters, before, dropped, run_steps(run, widths))


def show(widths: Plan | Allocation, job: Job, progress: Progress) -> None:
    """Show the widths before anything is cut, as far as they are known by then."""
    progress.say(widths)
    if job.ranking != "local":
        progress.say(
            f"the plan is of one ratio for all layers: --ranking {job.ranking} decides how much of "
            "each goes"
        )


def _gather(run: Run) -> None:
    """Gather what the model is run on, if anything.

    Raises:
        UnsupportedModelError: the model does not run on text alone, and the user asked for that.
    """
    choice = run.choice
    if choice.origin is None:
        return
    material = gather(run.job, choice, run.model, run.progress)
    if not isinstance(material, Refusal):
        run.material = material
        return
    if choice.asked:
        raise UnsupportedModelError(
            f"{material.reason}: leave --calibration, --recover, --allocate and --drop-layers out, "
            "and use --importance magnitude or random"
        )
    run.choice = choice.without_text(material.reason)


def _drop(run: Run) -> DroppedLayers | None:
    """Drop the layers that change least on the text; return the report, ``None`` if none go.

    Raises:
        PipelineError: there are not so many layers.
    """
    count, which = run.job.drop_layers, run.job.drop_from
    if not count or run.material is None:
        return None
    calibration = run.material.calibration
    try:
        dropped = drop_layers(run.model, count=count, calibration=calibration, which=which)
    except ValueError as error:
        raise PipelineError(f"--drop-layers {count}: {error}") from error
    run.progress.say(str(dropped))
    return dropped
