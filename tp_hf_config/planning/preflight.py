"""Check before a pruner prunes whether its settings can end in a loadable model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigSyncError, listed
from ..fieldmap.model_view import ModelView
from ..graph.config_graph import ConfigGraph
from ..graph.prunable import widths_of
from ..graph.pruner_access import scope_of
from ..graph.sides import GraphGroup
from ..graph.unit_count import UnitCount
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.layer_entries import may_differ, shared_field
from .quantised import QuantisedSize, sizes_compared, sizes_now
from .selection import ANY, unmet
from .settings import Target
from .trajectory import MovingWidth, Trajectory, Values, common_count


@dataclass(frozen=True)
class Preflight:
    """The widths after each step of a pruner, computed before it starts."""

    trajectory: Trajectory
    units: dict[int, list[int]]  # id of a group -> its units now and after each step
    of_target: tuple[str, ...] = ()  # quantised sizes, and widths that its tools do not take

    def notes(self, step: int) -> list[str]:
        lines = [line for at, line in self.trajectory.adjusted if at == step]
        last = step == len(self.trajectory.units_by_step)
        if step <= len(self.trajectory.units_by_step) and (note := self.trajectory.grid_note(step)):
            lines.append(note)
        return lines + ([*self.trajectory.shortfalls, *self.of_target] if last else [])

    def changes(self, step: int) -> bool:
        return any(len(n) > step >= 1 and n[step - 1] != n[step] for n in self.units.values())

    def units_left(self, graph_group: GraphGroup, step: int) -> int | None:
        """Return how many units a step leaves of a group; ``None``: unknown."""
        units = self.units.get(id(graph_group), [])
        if not len(units) > step >= 1 or units[step - 1] != graph_group.units.count:
            return None  # something else pruned the group
        return units[step]


def preflight(pruner: Any, view: ModelView, strict: bool, target: Target = ANY) -> Preflight | None:
    """Return the widths after each step of a pruner; raise if no config describes them.

    ``strict``: also raise if the class accepts only something near what is asked for. ``None``:
    importances decide how much of a field is removed, or the pruner has already begun.
    """
    if pruner.current_step:
        return None
    outcome, problem = _preflight(pruner, view)
    if problem is None and strict and outcome is not None and outcome.trajectory.adjusted:
        lines = "; ".join(line for _, line in outcome.trajectory.adjusted)
        problem = f"{lines}. HFConfigSyncHook() uses the nearest; strict=True refuses them."
    if problem is None:
        if outcome is not None and target.name:
            widths = widths_of(view.model, view.field_map)
            left = outcome.trajectory.steps()[-1]
            told = [*map(str, _sizes(view, left, target)), *unmet(view, widths, left, target)]
            return replace(outcome, of_target=tuple(told))
        return outcome
    raise ConfigSyncError(
        f"{type(pruner).__name__} of {type(view.model).__name__}: {problem} Nothing is pruned yet. "
        "tp_hf_config.plan(model, ...) shows what settings lead to."
    )


def _sizes(view: ModelView, left: Values, target: Target) -> tuple[QuantisedSize, ...]:
    after = view.field_map.builder.build(view.field_map.config_at(left, shallow=False))
    if isinstance(after, Refusal):
        return ()
    return sizes_compared(sizes_now(view.model, target), sizes_now(after, target), target)


@dataclass(frozen=True)
class _PrunedGroup:
    graph_group: GraphGroup
    layer: str  # name of one of its layers, for messages
    scope: str  # in which the pruner ranks its units
    ratios: tuple[float, ...]  # share of its units removed after each step
    count: UnitCount


_Groups = dict[tuple[FieldPath, ...], list[_PrunedGroup]]


def _preflight(pruner: Any, view: ModelView) -> tuple[Preflight | None, str | None]:
    """Return what a pruner leaves (``None``: importances decide), and why that cannot end well."""
    by_fields: _Groups = {}
    scopes: Counter[str] = Counter()
    for group in _pruned_groups(pruner):
        by_fields.setdefault(group.graph_group.fields, []).append(group)
        scopes[group.scope] += max(group.ratios, default=0) > 0
    ranked = {
        fields: groups
        for fields, groups in by_fields.items()
        if any(scopes[group.scope] > 1 for group in groups)
    }
    alone = (groups for fields, groups in by_fields.items() if fields not in ranked)
    different = (_different_ends(pruner, groups) for groups in alone)
    problem = _ranked_together(ranked) or next(filter(None, different), None)
    if problem is not None and may_differ(view.model):
        problem += " Or let each layer have its own widths: per_layer=True."
    if ranked or problem is not None:
        return None, problem
    moving_widths = [
        MovingWidth(
            fields,
            common_count(group.count for group in groups),
            groups[0].ratios[-1] if groups[0].ratios else 0.0,
            groups[0].ratios,
            counts_heads=bool(set(fields) & view.field_map.count_fields()),
        )
        for fields, groups in by_fields.items()
    ]
    trajectory = Trajectory(
        view.field_map, tuple(moving_widths), pruner.round_to, pruner.max_pruning_ratio
    )
    refusal = trajectory.refusal()
    problem = None if refusal is None else f"the class refuses the widths. {refusal}"
    units: dict[int, list[int]] = {}
    for fields, groups in by_fields.items():
        for group in groups:
            left = (
                state[fields] * group.count.per_field_unit for state in trajectory.units_by_step
            )
            units[id(group.graph_group)] = [group.count.units, *left]
    return Preflight(trajectory, units), problem


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


def _different_ends(pruner: Any, groups: Sequence[_PrunedGroup]) -> str | None:
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
    name = _names(groups[0].graph_group.fields)
    return (
        f"the groups of {name} will have different numbers of units: {parts}. One config field "
        "cannot describe that: give all of them one ratio (ratios= of HFConfigSyncHook)."
    )


def _pruned_groups(pruner: Any) -> Iterator[_PrunedGroup]:
    graph: ConfigGraph = pruner.DG
    for graph_group in graph.groups_to_prune(pruner.ignored_layers, pruner.root_module_types):
        group = graph.group_at(graph_group, [0])  # its layers in the order that the pruner sees
        layer = graph._module2name.get(group[-1].dep.target.module, "")
        scope, ratios = scope_of(pruner, group)
        count = replace(graph_group.count, units=graph_group.units.count)
        yield _PrunedGroup(graph_group, layer, scope, ratios[1:], count)
