"""Decide what a job cuts, and cut it; or do again what an interrupted run has decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import PipelineError, UnsupportedModelError
from ..fieldmap.field_map import map_of
from ..fieldmap.layer_map import by_layers
from ..forward.run_recipe import RunRecipe
from ..graph.cut_list import CutList
from ..graph.rebuild import rebuilt
from ..hook.drop_layers import drop_layers
from ..hook.dropped_layers import DroppedLayers
from ..model.build import Refusal
from ..planning.allocate import Allocation
from ..planning.plan import Plan
from .choice import Choice
from .decided import Decided, Perplexities
from .job import Job
from .material import Material, gather
from .progress import Progress
from .steps import check_ranking, run_steps
from .widths import decided

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cut:
    """A model after its steps.

    Attributes:
        model: the pruned model.
        recipe: how its class was run before it was pruned.
        choice: what the job does with it.
        widths: the widths that it was pruned to; ``None``: only layers were dropped.
        material: what it is run on; ``None``: nothing.
        decided: what was decided.
    """

    model: PreTrainedModel
    recipe: RunRecipe
    choice: Choice
    widths: Plan | Allocation | None
    material: Material | None
    decided: Decided


def decide(
    job: Job, model: PreTrainedModel, plan: Plan | None, choice: Choice, progress: Progress
) -> Cut:
    """Decide what goes, by the model's weights and a text, and prune the model in place.

    ``plan``: the plan; ``None``: widths are decided on the way, or none are pruned.
    ``choice``: what the job does with a model of this class.
    """
    if plan is not None and job.ranking != "local":
        check_ranking(job, plan, model)
    choice, material, without_text = _material(job, choice, model, progress)
    parameters, before = model.num_parameters(), perplexities(model, material)
    dropped = _drop(job, model, material, progress)
    widths: Plan | Allocation | None = plan
    if job.widths and plan is None:
        if dropped is not None and choice.measures and material is not None:
            material.measure(progress)
        widths = decided(job, model, choice, material, parameters, progress)
        show(widths, job, progress)
    recipe = map_of(model, how=by_layers).recipe
    reports = run_steps(job, widths, model, choice, material, progress)
    allocation = widths if isinstance(widths, Allocation) else None
    made = Decided(without_text, parameters, before, dropped, allocation, reports)
    return Cut(model, recipe, choice, widths, material, made)


def cut_again(
    job: Job,
    model: PreTrainedModel,
    plan: Plan | None,
    choice: Choice,
    kept: tuple[Decided, CutList | None],
    progress: Progress,
) -> Cut:
    """Carry out what an interrupted run of the same job has decided.

    Args:
        job: the job.
        model: the model, whole.
        plan: the plan, as for :func:`decide`.
        choice: what the job does with a model of this class.
        kept: what was decided, and the cut list of all steps.
        progress: where to show how far this is.
    """
    made, cuts = kept
    progress.say("going on: what goes is decided, and not measured again")
    material = None
    if made.without_text:
        choice = choice.without_text(made.without_text)
    elif made.after is None:
        choice, material, _ = _material(job, choice, model, progress, calibrates=False)
    if made.dropped is not None:
        drop_layers(model, made.dropped.dropped, which=made.dropped.layers)
    widths: Plan | Allocation | None = plan or made.allocation
    if job.widths and widths is None:
        widths = decided(job, model, choice, material, made.parameters, progress)
    recipe = map_of(model, how=by_layers).recipe
    pruned = model if cuts is None else rebuilt(model, cuts)
    return Cut(pruned, recipe, choice, widths, material, made)


def show(widths: Plan | Allocation, job: Job, progress: Progress) -> None:
    """Show the widths before anything is cut, as far as they are known by then."""
    progress.say(widths)
    if job.ranking != "local":
        progress.say(
            f"the plan is of one ratio for all layers: --ranking {job.ranking} decides how much of "
            "each goes"
        )


def _material(
    job: Job, choice: Choice, model: PreTrainedModel, progress: Progress, calibrates: bool = True
) -> tuple[Choice, Material | None, str]:
    """Return what the job does with this model, and what it runs it on; ``None``: nothing.

    The last value is why it runs it on nothing after all; empty if it does.

    Raises:
        UnsupportedModelError: the model does not run on text alone, and the user asked for that.
    """
    if choice.origin is None:
        return choice, None, ""
    material = gather(job, choice, model, progress, calibrates)
    if not isinstance(material, Refusal):
        return choice, material, ""
    if choice.asked:
        raise UnsupportedModelError(
            f"{material.reason}: leave --calibration, --recover, --allocate and --drop-layers out, "
            "and use --importance magnitude or random"
        )
    return choice.without_text(material.reason), None, material.reason


def perplexities(model: PreTrainedModel, material: Material | None) -> Perplexities:
    """Return a model's perplexity on the held-out windows, and that on the second text."""
    return (None, None) if material is None else material.perplexities(model)


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
