"""Decide what a job cuts, and cut it; or do again what an interrupted run has decided."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PipelineError, UnsupportedModelError
from ..fieldmap.layer_map import by_layers
from ..fieldmap.learn_field_map import map_of
from ..forward.run_recipe import RunRecipe
from ..graph.cut_list import CutList
from ..graph.rebuild import rebuilt
from ..hook.drop_layers import drop_layers
from ..hook.dropped_layers import DroppedLayers
from ..model.build import Refusal
from ..planning.allocate import Allocation
from ..planning.plan import Plan
from .decided import Decided
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
        decided: what was decided.
    """

    recipe: RunRecipe
    widths: Plan | Allocation | None
    decided: Decided


def decide(run: Run, plan: Plan | None) -> Cut:
    """Decide what goes, by the model's weights and a text, and prune the model in place.

    ``plan``: the plan; ``None``: widths are decided on the way, or none are pruned.
    """
    job, model = run.job, run.model
    if plan is not None and job.ranking != "local":
        check_ranking(run, plan)
    without_text = _gather(run)
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
    reports, cuts = run_steps(run, widths)
    allocation = widths if isinstance(widths, Allocation) else None
    made = Decided(without_text, parameters, before, dropped, allocation, reports, cuts=cuts)
    return Cut(recipe, widths, made)


def cut_again(run: Run, plan: Plan | None, kept: tuple[Decided, CutList | None]) -> Cut:
    """Carry out what an interrupted run of the same job has decided; the model is replaced.

    ``kept``: what was decided, and the cut list of all steps.
    """
    made, cuts = kept
    run.progress.say("going on: what goes is decided, and not measured again")
    if made.without_text:
        run.choice = run.choice.without_text(made.without_text)
    elif made.after is None:
        _gather(run, calibrates=False)
    if made.dropped is not None:
        drop_layers(run.model, made.dropped.dropped, which=made.dropped.layers)
    widths: Plan | Allocation | None = plan or made.allocation
    if run.job.widths and widths is None:
        widths = decided(run, made.parameters)
    recipe = map_of(run.model, how=by_layers).recipe
    if cuts is not None:
        run.model = rebuilt(run.model, cuts)
    return Cut(recipe, widths, made)


def show(widths: Plan | Allocation, job: Job, progress: Progress) -> None:
    """Show the widths before anything is cut, as far as they are known by then."""
    progress.say(widths)
    if job.ranking != "local":
        progress.say(
            f"the plan is of one ratio for all layers: --ranking {job.ranking} decides how much of "
            "each goes"
        )


def _gather(run: Run, calibrates: bool = True) -> str:
    """Gather what the model is run on; return why it is run on nothing after all, or ``""``.

    Raises:
        UnsupportedModelError: the model does not run on text alone, and the user asked for that.
    """
    choice = run.choice
    if choice.origin is None:
        return ""
    material = gather(run.job, choice, run.model, run.progress, calibrates)
    if not isinstance(material, Refusal):
        run.material = material
        return ""
    if choice.asked:
        raise UnsupportedModelError(
            f"{material.reason}: leave --calibration, --recover, --allocate and --drop-layers out, "
            "and use --importance magnitude or random"
        )
    run.choice = choice.without_text(material.reason)
    return material.reason


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
