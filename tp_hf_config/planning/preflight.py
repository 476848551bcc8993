"""Check before a pruner prunes whether its settings can end in a loadable model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigSyncError, listed
from ..fieldmap.model_view import ModelView
from ..graph.config_graph import ConfigGraph
from ..graph.prunable import widths_of
from ..graph.pruner_access import scope_of
from ..graph.unit_count import UnitCount
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.layer_entries import may_differ, shared_field
from .quantised import QuantisedSize, sizes_compared, sizes_now
from .selection import ANY, unmet
from .settings import Target
from .trajectory import MovingWidth, Trajectory, Values, common_count


def preflight(
    pruner: Any, view: ModelView, strict: bool, target: Target = ANY
) -> Trajectory | None:
    """Return the widths after each step of a pruner; raise if no config describes them.

    ``strict``: also raise if the class accepts only something near what is asked for. ``None``:
    importances decide how much of a field is removed, or the pruner has already begun.
    """
    if pruner.current_step:
        return None
    by_fields = _pruned_groups(pruner)
    scopes = Counter(
        group.scope for groups in by_fields.values() for group in groups if any(group.ratios)
    )
    ranked = {
        fields: groups
        for fields, groups in by_fields.items()
        if any(scopes[group.scope] > 1 for group in groups)
    }
    alone = {fields: groups for fields, groups in by_fields.items() if fields not in ranked}
    different = (_different_ends(pruner, fields, groups) for fields, groups in alone.items())
    problem = _ranked_together(ranked) or next(filter(None, different), None)
    trajectory: Trajectory | None = None
    if problem is not None:
        more = " Or let each layer have its own widths: per_layer=True."
        problem += more if may_differ(view.model) else ""
    elif not ranked:
        counts = view.field_map.count_fields()
        moving_widths = (_moving(fields, groups, counts) for fields, groups in by_fields.items())
        trajectory = Trajectory(
            view.field_map, tuple(moving_widths), pruner.round_to, pruner.max_pruning_ratio
        )
        if (refusal := trajectory.refusal()) is not None:
            problem = f"the class refuses the widths. {refusal}"
        elif strict and trajectory.adjusted:
            lines = "; ".join(line for _, line in trajectory.adjusted)
            problem = f"{lines}. HFConfigSyncHook() uses the nearest; strict=True refuses them."
    if problem is not None:
        raise ConfigSyncError(
            f"{type(pruner).__name__} of {type(view.model).__name__}: {problem} Nothing is pruned "
            "yet. tp_hf_config.plan(model, ...) shows what settings lead to."
        )
    if trajectory is None or not target.name:
        return trajectory
    left, widths = trajectory.steps()[-1], widths_of(view.model, view.field_map)
    sizes = map(str, _sizes(view, left, target))
    return replace(trajectory, of_target=(*sizes, *unmet(view, widths, left, target)))


def _sizes(view: ModelView, left: Values, target: Target) -> tuple[QuantisedSize, ...]:
    after = view.field_map.builder.build(view.field_map.config_at(left, shallow=False))
    if isinstance(after, Refusal):
        return ()
    return sizes_compared(sizes_now(view.model, target), sizes_now(after, target), target)


@dataclass(frozen=True)
class _PrunedGroup:
    layer: str  # name of one of its layers, for messages
    scope: str  # in which the pruner ranks its units
    ratios: tuple[float, ...]  # share of its units removed after each step
    count: UnitCount


_Groups = dict[tuple[FieldPath, ...], list[_PrunedGroup]]


def _pruned_groups(pruner: Any) -> _Groups:
    graph: ConfigGraph = pruner.DG
    by_fields: _Groups = {}
    for graph_group in graph.groups_to_prune(pruner.ignored_layers, pruner.root_module_types):
        group = graph.group_at(graph_group, [0])  # its layers in the order that the pruner sees
        layer = graph._module2name.get(group[-1].dep.target.module, "")
        scope, ratios = scope_of(pruner, group)
        count = replace(graph_group.count, units=graph_group.units.count)
        pruned = _PrunedGroup(layer, scope, ratios[1:], count)
        by_fields.setdefault(graph_group.fields, []).append(pruned)
    return by_fields


def _moving(
    fields: tuple[FieldPath, ...], groups: Sequence[_PrunedGroup], counts: frozenset[FieldPath]
) -> MovingWidth:
    ratios = groups[0].ratios
    count = common_count(group.count for group in groups)
    last = ratios[-1] if ratios else 0.0
    return MovingWidth(fields, count, last, ratios, counts_heads=bool(counts & set(fields)))


def _ranked_together(ranked: _Groups) -> str | None:
    """Return the problem, if any: ranked together, groups of one field lose different numbers."""
    several = {_names(fields): len(groups) for fields, groups in ranked.items() if len(groups) > 1}
    if not several:
        return None
    alone = (fields for fields, groups in ranked.items() if len(groups) == 1)
    names = dict.fromkeys(field_name(shared_field(field)) for fields in alone for field in fields)
    groups = ", ".join(f"the {number} groups of {name}" for name, number in several.items())
    only = ", ".join(f'"{name}"' for name in names)
    other = f", or prune only what has one group: prune=({only},) of the hook" if only else ""
    return (
        f"{groups} are ranked together, so they lose different numbers of units, and one config "
        "field cannot describe that. Use global_pruning=False and isomorphic=False, and put no two "
        f"of them under one key of pruning_ratio_dict{other}."
    )


def _names(fields: tuple[FieldPath, ...]) -> str:
    return " + ".join(map(field_name, fields))


def _different_ends(
    pruner: Any, fields: tuple[FieldPath, ...], groups: Sequence[_PrunedGroup]
) -> str | None:
    """Return the problem, if any: groups of one field end with different numbers of units."""
    count, ends = common_count(group.count for group in groups), dict[tuple[int, ...], list[str]]()
    for group in groups:
        steps = count.after(group.ratios, pruner.round_to, pruner.max_pruning_ratio)
        ends.setdefault(tuple(steps), []).append(group.layer)
    if len(ends) < 2:
        return None
    parts = "; ".join(
        f"{' -> '.join(map(str, steps))} in {listed(layers)}"
        for steps, layers in sorted(ends.items())
    )
    return (
        f"the groups of {_names(fields)} will have different numbers of units: {parts}. One config "
        "field cannot describe that: give all of them one ratio (ratios= of HFConfigSyncHook)."
    )
