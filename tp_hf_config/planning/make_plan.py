"""Compute what pruning settings give before any weight is touched: ``tp_hf_config.plan``."""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from torch import nn
from torch_pruning.pruner.algorithms.scheduler import linear_scheduler

from ..arguments import Count, Positive, Share, check_arguments
from ..fieldmap.field_map import FieldMap
from ..fieldmap.model_view import ModelView, view_of
from ..forward.run_recipe import MakeInputs
from ..graph.layer_fields import fields_named, layers_listed
from ..graph.prunable import Width, widths_of
from ..graph.rebuild import meta_copy_of
from ..graph.unit_count import largest_multiple
from ..model.build import Refusal, module_of
from ..model.config_json import FieldPath
from .plan import (
    ParameterCount,
    Plan,
    PlannedWidth,
    size_of,
    working_time,
)
from .quantised import QuantisedSize, sizes_compared, sizes_now
from .selection import Chosen, Wanted, check_apart, check_ratios, choose, unmet
from .settings import Gqa, PruneSettings, Scheduler, Target
from .trajectory import MovingWidth, Trajectory, by_name, common_count

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ASKED = 64  # the most head counts to try with the class


@check_arguments
def plan(
    model_or_config: nn.Module | PreTrainedConfig,
    *,
    pruning_ratio: Share | None = None,
    ratios: Mapping[str, Share] | None = None,
    prune: str | Iterable[str] | None = None,
    head_pruning_ratio: Share = 0.0,
    prune_num_heads: bool | None = None,
    gqa: Gqa | None = None,
    iterative_steps: Count = 1,
    round_to: Count | None = None,
    target: str | None = None,
    max_pruning_ratio: Share = 1.0,
    iterative_pruning_ratio_scheduler: Scheduler | None = None,
    target_params: Positive | None = None,
    per_layer: bool = False,
    model_class: type[PreTrainedModel] | None = None,
    make_inputs: MakeInputs | None = None,
) -> Plan:
    """Compute what pruning with these settings gives, without pruning and without weights.

    Arguments that a pruner has too mean the same as there. ``prune`` and ``ratios`` are those of
    ``HFConfigSyncHook``.

    Args:
        model_or_config: a model, which may be on the meta device, or a config.
        pruning_ratio: the ratio of every pruned width that ``ratios`` does not name; default: 0.5.
        ratios: config field -> ratio.
        prune: config fields to prune. Default: the fields that ``ratios`` names; without
            ``ratios``, the inner widths of feed-forward layers and experts. In a class without
            inner widths: every width inside the model except attention heads, head dims and numbers
            of experts, and, if the model is inside another module, the width of its output. Of
            widths that share a dimension, only the one with most parameters is pruned.
        head_pruning_ratio: the share of the attention heads to prune as well.
        prune_num_heads: whether heads are pruned; default: if ``gqa`` is given or
            ``head_pruning_ratio`` is not 0.
        gqa: ``"query"``: the same number of query heads from every key/value group; ``"group"``:
            whole key/value groups; default: query heads if a group has several.
        iterative_steps: the number of steps.
        round_to: a multiple that widths keep, besides what the class requires; 1: exactly the
            ratios. Default: the nearest multiple of 64, else of 32, 16 or 8 channels, that moves a
            width by less than 2 % of the original.
        target: tools that run or quantise the model, instead of ``round_to``: ``"gguf-k"``,
            ``"w4a16,tp=2"``, ... (see the page "Targets"). Widths then go to the nearest numbers
            that all of them take.
        max_pruning_ratio: the largest share of a layer's channels that may be removed.
        iterative_pruning_ratio_scheduler: (final ratio, number of steps) -> the ratios of the
            steps; default: linear.
        target_params: how many parameters may be left: a share of them (up to 1), or a number. One
            ratio is then found for all widths that ``ratios`` does not name, and for heads if
            ``head_pruning_ratio`` is 0.
        per_layer: True: each layer may get widths of its own; ``ratios`` may also name those of
            single layers (``"per_layer_config.3.intermediate_size"``).
        model_class: the class of a config. Default: the one that the config names, else the first
            that exists of: causal language model, other language model, classifier, base model.
        make_inputs: a function of a config that returns a forward pass's keyword arguments, for a
            class that the library cannot feed by itself: see :func:`~tp_hf_config.prunable`. A hook
            with ``plan=`` uses it too.

    Returns:
        The plan; ``print`` it.

    Raises:
        UnsupportedModelError: there is not exactly one Hugging Face model, a field cannot be
            pruned, or ``make_inputs`` raises or returns inputs with which the class does not run.
        ValueError: a ratio is outside 0 to 1 or no width follows it, ``gqa`` is unknown, heads are
            both asked for and excluded, or the target cannot be reached.
        TypeError: neither a model nor a config.
    """
    settings = PruneSettings.of(
        prune,
        ratios or None,
        prune_num_heads,
        gqa,
        head_pruning_ratio,
        pruning_ratio=0.5 if pruning_ratio is None else pruning_ratio,
        iterative_steps=iterative_steps,
        round_to=round_to,
        target=target,
        max_pruning_ratio=max_pruning_ratio,
        iterative_pruning_ratio_scheduler=iterative_pruning_ratio_scheduler,
        per_layer=per_layer,
    )
    model = meta_copy_of(module_of(model_or_config, model_class))
    with layers_listed(model, per_layer):
        view = view_of(model, make_inputs, weights=False)
        settings = settings.in_every_layer(fields_named(view.field_map))
        of = Target.of(target)
        wanted = Wanted(settings.prune, settings.prune_num_heads, gqa, target=of)
        chosen = choose(view, wanted)
        check_apart(view, chosen)
        trajectory = _trajectory(view, chosen, settings)
        if pruning_ratio:
            _check_followed(trajectory, settings, target_params, listed=prune is not None)
        return _plan(view, chosen, trajectory, settings, target_params)


def _check_followed(
    trajectory: Trajectory, settings: PruneSettings, target_params: float | None, listed: bool
) -> None:
    """Raise if ``pruning_ratio`` decides nothing, because the user must mean something else."""
    ratio = settings.pruning_ratio
    if target_params is not None:
        raise ValueError(
            f"pruning_ratio={ratio}: target_params= finds the ratio by itself. Leave one of them "
            "out"
        )
    if (
        not listed
        and trajectory.moving_widths
        and all(moving.clamped for moving in trajectory.moving_widths)
    ):
        raise ValueError(
            f"pruning_ratio={ratio}: every pruned width has its own ratio (ratios=, "
            "head_pruning_ratio=), so pruning_ratio has no effect. Name the fields that it is "
            "meant for in prune=, or leave it out"
        )


def _trajectory(view: ModelView, chosen: Chosen, settings: PruneSettings) -> Trajectory:
    check_ratios(chosen, settings.ratios)
    moving_widths = []
    for width in chosen.widths:
        named = [settings.ratios[name] for name in width.names if name in settings.ratios]
        ratio = named[-1] if named else settings.pruning_ratio
        if width in chosen.heads:
            ratio = settings.head_pruning_ratio
        moving = MovingWidth(
            width.fields,
            common_count(group.count for group in width.groups),
            clamped=bool(named) or width in chosen.heads,
            counts_heads=bool(set(width.fields) & view.field_map.count_fields()),
        )
        moving_widths.append(_at(ratio, moving, settings))
    return Trajectory(
        view.field_map, tuple(moving_widths), settings.round_to, settings.max_pruning_ratio
    )


def _at(ratio: float, moving: MovingWidth, settings: PruneSettings) -> MovingWidth:
    schedule = settings.iterative_pruning_ratio_scheduler or linear_scheduler
    most = settings.max_pruning_ratio if moving.clamped else 1.0
    by_step = list(schedule(ratio, settings.iterative_steps))[1:]
    return replace(moving, ratio=ratio, ratios=tuple(min(each, most) for each in by_step))


def _plan(
    view: ModelView,
    chosen: Chosen,
    trajectory: Trajectory,
    settings: PruneSettings,
    target_params: float | None,
) -> Plan:
    field_map = view.field_map
    full = _full_model(field_map, {})
    assert not isinstance(full, Refusal)  # map_of built it
    before, notes = size_of(field_map, full)
    target, missed = None, 0
    if target_params is not None:
        target = int(target_params * (before.parameters if target_params <= 1 else 1))
        count = ParameterCount(field_map, full)
        # a head ratio of 0 means that the target decides it too
        heads = {width.fields for width in chosen.heads if not settings.head_pruning_ratio}
        free = [m for m in trajectory.moving_widths if not m.clamped or m.fields in heads]
        trajectory, ratio = _trajectory_to(trajectory, free, settings, count, target)
        if any(not moving.clamped for moving in free):
            settings = replace(settings, pruning_ratio=ratio)
        if heads:
            settings = replace(settings, head_pruning_ratio=ratio)
        missed = target - count.at(trajectory.steps()[-1])
    values = trajectory.steps()[-1]
    # what the last step that moved a width to its grid says
    grid = next(
        filter(None, map(trajectory.grid_note, range(settings.iterative_steps, 0, -1))), None
    )
    why = "only whole units are removed" if grid is None else "widths are rounded"
    full_after, after = _full_model(field_map, values), None
    names = {width.name for width in chosen.widths}
    every_width = widths_of(view.model, field_map)
    not_chosen = "not chosen" if settings.prune else "pruned only if it is named"
    tokens = "input_ids" in inspect.signature(view.model.forward).parameters
    time, of = None, Target.of(settings.target)
    quantised: tuple[QuantisedSize, ...] = ()
    if not isinstance(full_after, Refusal):
        after, _ = size_of(field_map, full_after)
        if tokens:
            time = working_time(field_map, full, full_after, settings.iterative_steps, before.flops)
        if tokens or of.formats:
            quantised = sizes_compared(sizes_now(full, of), sizes_now(full_after, of), of)
    return Plan(
        model=type(view.model).__name__,
        settings=settings,
        widths=tuple(
            _width(width, moving, trajectory)
            for width, moving in zip(chosen.widths, trajectory.moving_widths, strict=True)
        ),
        kept={
            w.name: w.reason or chosen.left_out.get(w.name, not_chosen)
            for w in every_width
            if w.name not in names
        },
        before=before,
        after=after,
        refusal=trajectory.refusal(),
        adjusted=(*(line for _, line in trajectory.adjusted), *trajectory.shortfalls),
        grid=grid,
        unmet=tuple(unmet(view, every_width, values, of)),
        quantised=quantised,
        target=target,
        why_not_exactly=f"{missed:,} fewer, because {why}" if missed else None,
        time=time,
        tokens=tokens,
        notes=(*notes, *_notes(chosen, settings)),
        _fields=dict(field_map.values),
        _make_inputs=field_map.recipe.make_inputs,
    )


def _notes(chosen: Chosen, settings: PruneSettings) -> Iterator[str]:
    for width in chosen.widths:
        for name in width.encoder_states:
            yield (
                f"remove the channels that {width.name} loses from the input {name} too: "
                "report.inputs of a step lists the remaining ones"
            )
    if chosen.heads and not settings.head_pruning_ratio:
        names = ", ".join(width.name for width in chosen.heads)
        yield f"{names} is kept: head_pruning_ratio=, the share of heads to prune, is 0"


def _full_model(field_map: FieldMap, values: Mapping[FieldPath, int]) -> nn.Module | Refusal:
    full = field_map.builder.build(field_map.config_at(values, shallow=False))
    if not isinstance(full, Refusal):
        cast("PreTrainedModel", full).tie_weights()  # a build on the meta device does not tie them
    return full


def _width(width: Width, moving: MovingWidth, trajectory: Trajectory) -> PlannedWidth:
    field_map = trajectory.field_map
    units = trajectory.left[moving.fields]
    sizes = {
        units * group.count.per_field_unit * dim.layout.run
        for group in width.groups
        for dim in group.dims
    }
    return PlannedWidth(
        name=width.name,
        before=by_name({field: field_map.values[field] for field in moving.fields}),
        steps=tuple(
            by_name({field: step_values[field] for field in moving.fields})
            for step_values in trajectory.steps()
        ),
        asked=moving.ratio,
        reached=1 - units / moving.count.units,
        reachable=_reachable(trajectory, moving),
        multiple=largest_multiple(sizes),
        parameters=width.parameters,
    )


def _reachable(trajectory: Trajectory, moving: MovingWidth) -> Sequence[int]:
    """Return the values that a width's first field can reach while all others keep theirs."""
    field_map, units = trajectory.field_map, trajectory.reachable(moving)
    start = moving.count.units
    value = field_map.values[moving.fields[0]]
    if not moving.counts_heads or len(units) > _ASKED:  # not tried with the class
        first, last, grid = (n * value // start for n in (units[0], units[-1], units.step))
        return range(first, last + 1, grid)

    def refusal_of(n: int) -> Refusal | None:
        return trajectory.refusal_of({f: field_map.values[f] * n // start for f in moving.fields})

    return tuple(n * value // start for n in units if refusal_of(n) is None)


_DIGITS = 5  # of a ratio that is searched for


def _trajectory_to(
    trajectory: Trajectory,
    free: Sequence[MovingWidth],
    settings: PruneSettings,
    count: ParameterCount,
    target: int,
) -> tuple[Trajectory, float]:
    """Return the smallest accepted common ratio that leaves at most ``target`` parameters."""

    def at(ratio: float) -> Trajectory:
        fields = {moving.fields for moving in free}
        moved = (
            _at(ratio, moving, settings) if moving.fields in fields else moving
            for moving in trajectory.moving_widths
        )
        return replace(trajectory, moving_widths=tuple(moved))

    def parameters(trajectory: Trajectory) -> int:
        return count.at(trajectory.steps()[-1])

    def fits(trajectory: Trajectory) -> bool:
        return parameters(trajectory) <= target and trajectory.accepted()

    # above this ratio, some width would lose all units, and the pruner would skip it
    highest = min((_highest(trajectory, moving) for moving in free), default=0.0)
    if parameters(at(highest)) > target:
        names = ", ".join(moving.name for moving in free) or "no width"
        raise ValueError(
            f"target_params={target:,}: with one ratio for {names}, at least "
            f"{parameters(at(highest)):,} of {count.at({}):,} parameters remain. Prune more widths "
            "(prune=), or set a ratio for each (ratios=)."
        )
    scale = 10**_DIGITS
    numbers = range(int(highest * scale) + 1)
    found = bisect_left(numbers, True, key=lambda n: fits(at(n / scale)))
    ratio = min(found / scale, highest)
    if fits(at(ratio)):
        return at(ratio), ratio
    raise ValueError(
        f"target_params={target:,}: the class accepts no widths near one ratio of {ratio:.3f}. Set "
        "a ratio for each width (ratios=), or prune fewer widths (prune=)."
    )


def _highest(trajectory: Trajectory, moving: MovingWidth) -> float:
    fewest = trajectory.reachable(moving)[0]
    if moving.counts_heads or fewest == moving.count.units:
        return 1.0
    return moving.count.ratio_for(fewest)
