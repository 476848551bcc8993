"""Compute the widths after every step of a pruner, and check that a model with them loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, product
from math import gcd, lcm
from typing import Any

from ..errors import ConfigSyncError, listed
from ..fieldmap.field_map import (
    FieldMap,
    build_mismatch,
    count_at_zero,
    run_failure,
)
from ..fieldmap.model_view import ModelView
from ..graph.config_graph import ConfigGraph
from ..graph.prunable import widths_of
from ..graph.pruner_access import scope_of
from ..graph.sides import GraphGroup
from ..graph.unit_count import MULTIPLES, UnitCount
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.layer_entries import may_differ, name_in_all_layers, shared_field
from .quantised import sizes_compared, sizes_now
from .selection import unmet
from .settings import Target

Values = dict[FieldPath, int]
# fields of a width -> how many of its units are left
UnitsLeft = dict[tuple[FieldPath, ...], int]
_ALONE = 24  # numbers that are tried of one width alone
_DISTANCE = 64  # steps that a width is moved away from what its ratio leaves
_HEADS = 96  # states that differ in head counts
_PATIENT = 40  # sets of values that a step may try, in units of Trajectory.patience


@dataclass(frozen=True)
class MovingWidth:
    fields: tuple[FieldPath, ...]  # that count its units
    count: UnitCount  # in units of the fields: see ``common_count``
    ratio: float = 0.0  # share of its units to remove in the end
    ratios: tuple[float, ...] = ()  # the share that is removed after each step
    clamped: bool = False  # max_pruning_ratio limits the ratio itself (ratios of single layers)
    counts_heads: bool = False  # ends at the nearest number of heads that the class accepts

    @property
    def name(self) -> str:
        return " + ".join(field_name(field) for field in self.fields)


def common_count(counts: Iterable[UnitCount]) -> UnitCount:
    """Return what limits all groups of a width, which lose the same number of its fields' units."""
    every = list(dict.fromkeys(counts))
    return UnitCount(
        every[0].units // every[0].per_field_unit,
        multiple=lcm(*(count.step(1) // count.per_field_unit or 1 for count in every)),
        layers=tuple(
            (size, channels * count.per_field_unit)
            for count in every
            for size, channels in count.layers
        ),
        minimum=max(-(-count.minimum // count.per_field_unit) for count in every),
        run=gcd(*(count.run * count.per_field_unit for count in every)),
        grid=every[0].grid,
    )


@dataclass(frozen=True)
class PlannedRefusal:
    """Field values that the class refuses, as it does all values near them.

    Attributes:
        step: the step that leads to them, counted from 1.
        values: field -> value after that step, for the fields that differ from now.
        reason: the message of the class, or of this package.
    """

    step: int
    values: dict[str, int]
    reason: str

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.values.items())
        return (
            f"refused at step {self.step} ({values}): {self.reason.rstrip('.')}. No settings near "
            "these are accepted: change one ratio at a time."
        )


def by_name(values: Mapping[FieldPath, int]) -> dict[str, int]:
    return {field_name(field): value for field, value in values.items()}


@dataclass(frozen=True)
class _Step:
    before: UnitsLeft
    rounded: UnitsLeft  # what the rounded ratios leave, with as many heads as before
    left: UnitsLeft  # what the class accepts near the ratios; ``rounded`` if it accepts nothing


@dataclass(frozen=True)
class Trajectory:
    """The widths after each step of a pruner, and what the class accepts of them."""

    field_map: FieldMap
    moving_widths: tuple[MovingWidth, ...]  # those that are pruned
    round_to: int | None = 1  # the pruner's round_to; None: the widths' grids
    max_ratio: float = 1.0  # the pruner's max_pruning_ratio
    # Limits the search for widths that the class accepts: no step searches on after ``patience *
    # (_PATIENT + steps)`` sets of values.
    patience: int = 4
    of_target: tuple[str, ...] = ()  # quantised sizes, and widths that its tools do not take
    _refusals: dict[object, Refusal | None] = field(default_factory=dict, compare=False, repr=False)
    # includes sets with a known answer: the limit must not depend on earlier searches
    _asked: set[object] = field(default_factory=set, init=False, compare=False, repr=False)

    @cached_property
    def _steps(self) -> list[_Step]:
        now = {moving.fields: moving.count.units for moving in self.moving_widths}
        result: list[_Step] = []
        number_of_steps = max((len(moving.ratios) for moving in self.moving_widths), default=0)
        most = self.patience * (_PATIENT + number_of_steps)
        self._asked.clear()
        for number in range(number_of_steps):
            rounded = self._rounded(now, number)
            step = _Step(now, rounded, rounded)
            for state in self._candidates(now, rounded, number):
                if len(self._asked) >= most:
                    break
                if self.refusal_of(self.values_of(state)) is None:
                    step = replace(step, left=state)
                    break
            result.append(step)
            now = step.left
        return result

    def _rounded(self, now: UnitsLeft, step: int) -> UnitsLeft:
        return {
            moving.fields: now[moving.fields]
            if moving.counts_heads
            else moving.count.next(
                now[moving.fields], moving.ratios[step], self.round_to, self.max_ratio
            )
            for moving in self.moving_widths
        }

    def _candidates(self, before: UnitsLeft, rounded: UnitsLeft, step: int) -> Iterator[UnitsLeft]:
        """Yield what a step can leave: what the rounded ratios leave, then states near it."""
        heads = [moving for moving in self.moving_widths if moving.counts_heads]
        # Torch-Pruning rounds none of the others
        shrinking = [m for m in self.moving_widths if rounded[m.fields] != before[m.fields]]
        counts = (self._head_counts(moving, before[moving.fields], step) for moving in heads)
        states: list[UnitsLeft] = [
            {**rounded, **{m.fields: number for m, number in zip(heads, numbers, strict=True)}}
            for numbers in islice(product(*counts), _HEADS)
        ]
        divisible = (each for state in states for each in self._divisible(state, shrinking, heads))
        yield from islice(divisible, _HEADS)
        alone = self._alone(states[0], shrinking)
        if len(alone) > 1:  # one change at a time is not enough (MobileViT rounds five widths)
            yield {**states[0], **alone}
        for state in (states[0], rounded):
            yield state
            for moving in shrinking:
                for number in self._below(moving, state[moving.fields]):
                    yield {**state, moving.fields: number}
        for moving in shrinking:
            grid, most = moving.count.step(self.round_to), before[moving.fields]
            larger = range(states[0][moving.fields] + grid, most, grid)
            for number in (*larger[:_DISTANCE], most):
                yield {**states[0], moving.fields: number}

    def _head_counts(self, moving: MovingWidth, now: int, step: int) -> list[int]:
        """Return the head counts that a step can leave, those nearest to the ratio first."""
        wanted = moving.count.units * (1 - moving.ratios[step])
        numbers = [now]
        if wanted < now and not moving.count.exhausted(now, self.max_ratio):
            numbers += [number for number in self.reachable(moving) if number < now]
        return sorted(numbers, key=lambda number: (abs(number - wanted), -number))

    def _divisible(
        self, state: UnitsLeft, shrinking: Sequence[MovingWidth], heads: Sequence[MovingWidth]
    ) -> Iterator[UnitsLeft]:
        """Yield a state, then with one width lowered to a multiple of a head count."""
        yield state
        for moving, of_heads in product(shrinking, heads):
            multiple = lcm(moving.count.step(self.round_to), state[of_heads.fields])
            units = state[moving.fields]
            yield {**state, moving.fields: units // multiple * multiple or units}

    def _alone(self, state: UnitsLeft, shrinking: Sequence[MovingWidth]) -> UnitsLeft:
        """Return the smaller numbers of widths of which the class refuses the state's, alone."""
        result: UnitsLeft = {}
        for moving in shrinking:
            units = state[moving.fields]
            for number in (units, *self._below(moving, units)[:_ALONE]):
                values, most = self.field_map.values, moving.count.units
                alone = {field: values[field] * number // most for field in moving.fields}
                if self.refusal_of(alone) is None:
                    result |= {moving.fields: number} if number != units else {}
                    break
        return result

    def _below(self, moving: MovingWidth, units: int) -> range:
        grid = moving.count.step(self.round_to)
        return range(units - grid, 0, -grid)[:_DISTANCE]

    @cached_property
    def adjusted(self) -> list[tuple[int, str]]:
        """The steps, from 1, with other widths than the ratios ask for, and what is done."""
        result: list[tuple[int, str]] = []
        for number, step in enumerate(self._steps, 1):
            values, by_rounding = self.values_of(step.left), self.values_of(step.rounded)
            if self.refusal_of(values) is not None:
                break  # later steps do not happen
            requested: dict[FieldPath, float] = {}
            reasons: dict[FieldPath, str] = {}  # of fields that can have no other number at all
            for moving in self.moving_widths:
                fields, share = moving.fields, max(0.0, 1 - moving.ratios[number - 1])
                off = abs(moving.count.units * share - step.left[fields])
                if not moving.counts_heads and step.rounded[fields] != step.left[fields]:
                    requested |= {field: by_rounding[field] for field in fields}
                elif moving.counts_heads and off > 0.5 + 1e-9:  # not the nearest whole number
                    requested |= {f: self.field_map.values[f] * share for f in fields}
                    if (grid := moving.count.step(self.round_to)) > 1:
                        reason = f"{moving.name} has to be a multiple of {grid}"
                        reasons |= dict.fromkeys(fields, reason)
            if not requested:
                continue
            why = [*dict.fromkeys(reasons.values())]
            whole = {field: max(1, round(value)) for field, value in requested.items()}
            refusal = self.refusal_of({**values, **whole})
            if refusal is not None and requested.keys() - reasons.keys():
                why.append(refusal.reason.rstrip("."))
            asked = ", ".join(f"{field_name(f)} {value:.4g}" for f, value in requested.items())
            done = ", ".join(f"{field_name(field)} {values[field]}" for field in requested)
            because = f" ({'; '.join(why)})" if why else ""
            line = f"step {number}: the ratios ask for {asked}{because}; nearest valid: {done}"
            result.append((number, line))
        return result

    @cached_property
    def shortfalls(self) -> list[str]:
        """A line for each width that ends wider than its ratio asks for, with the reason."""
        result: list[str] = []
        for moving in self.moving_widths if self._steps else ():
            step, units, ratio = self._steps[-1], moving.count.units, moving.ratio
            left = step.left[moving.fields]
            # ``adjusted`` has the head counts, and what the class refuses
            told = moving.counts_heads or step.rounded[moving.fields] != left
            if told or self._on_grid(moving, -1) or left <= units * (1 - ratio) + 1e-6:
                continue
            field = moving.fields[0]
            value = self.field_map.values[field]
            result.append(
                f"{field_name(field)} ends at {value * left // units}; the ratio {ratio:g} asks "
                f"for {value * (1 - ratio):g}: {self._why_wider(moving, left)}"
            )
        return result

    def grid_note(self, step: int) -> str | None:
        """Say which widths a step, from 1, leaves on their grids instead of what is asked for."""
        moved: dict[str, list[tuple[int, int, int]]] = {}
        for moving in self.moving_widths:
            if (found := self._on_grid(moving, step - 1)) is not None:
                moved.setdefault(name_in_all_layers(moving.name), []).append(found)
        if not moved:
            return None
        parts = []
        for name, layers in moved.items():
            number, exact, _ = layers[0]
            of = f" of {len(layers)} layers" if len(layers) > 1 else ""
            alike = f" {number:,} for {exact:,}" if len({*layers}) == 1 else ""
            parts.append(f"{name}{of}{alike}")
        multiples = sorted({multiple for layers in moved.values() for *_, multiple in layers})
        of = " or ".join(map(str, multiples))
        targets = {moving.count.grid.target for moving in self.moving_widths} - {""}
        why = f"for {targets.pop()}" if targets else "round_to=1: exactly the ratios"
        return f"to multiples of {of} ({why}): {', '.join(parts)}"

    def _on_grid(self, moving: MovingWidth, step: int) -> tuple[int, int, int] | None:
        """Return the first field's value on the grid, the exact value and the multiple, if any."""
        count, grid = moving.count, moving.count.grid
        states = self._steps[step]
        left, rounded = states.left[moving.fields], states.rounded[moving.fields]
        exact = count.next(states.before[moving.fields], moving.ratios[step], 1, self.max_ratio)
        # ``adjusted`` has what the class refuses
        refused = moving.counts_heads or left != rounded
        if self.round_to is not None or refused or left == exact:
            return None
        value = self.field_map.values[moving.fields[0]]
        channels = grid.multiple_of(left) * count.run
        if not grid.target:  # without the class's own multiple
            channels = next(n for n in MULTIPLES if channels % n == 0)
        return value * left // count.units, value * exact // count.units, channels

    def _why_wider(self, moving: MovingWidth, left: int) -> str:
        count, fewest = moving.count, self.reachable(moving)[0]
        if self.max_ratio < moving.ratio:
            return f"max_pruning_ratio is {self.max_ratio:g}"
        if left < count.units:
            return "it cannot be smaller"
        if fewest == count.units:
            return f"no smaller multiple of {count.step(self.round_to)} is possible"
        return (
            "this ratio would remove all of it, so nothing is pruned; "
            f"{count.ratio_for(fewest):g} removes the most that is possible"
        )

    def notes(self, step: int) -> list[str]:
        """Return what a step, from 1, does differently from the ratios."""
        lines = [line for at, line in self.adjusted if at == step]
        if step <= len(self._steps) and (note := self.grid_note(step)):
            lines.append(note)
        last = step == len(self._steps)
        return lines + ([*self.shortfalls, *self.of_target] if last else [])

    def changes(self, step: int) -> bool:
        return any(one.left != one.before for one in self._steps[step - 1 : step])

    def units_left(self, graph_group: GraphGroup, step: int) -> int | None:
        """Return how many units a step leaves of a group; ``None``: unknown."""
        each, fields = graph_group.count.per_field_unit, graph_group.fields
        for one in self._steps[step - 1 : step]:
            if one.before.get(fields, 0) * each == graph_group.units.count:
                return one.left[fields] * each
        return None  # something else pruned the group

    @property
    def left(self) -> UnitsLeft:
        return self._steps[-1].left

    def steps(self) -> list[Values]:
        return [self.values_of(step.left) for step in self._steps]

    def values_of(self, state: UnitsLeft) -> Values:
        return {
            field: self.field_map.values[field] * state[moving.fields] // moving.count.units
            for moving in self.moving_widths
            for field in moving.fields
        }

    def refusal(self) -> PlannedRefusal | None:
        """Return the first step that the class refuses or no config can describe, if any."""
        for number, values in enumerate(self.steps(), 1):
            if (refusal := self.refusal_of(values)) is not None:
                return PlannedRefusal(number, by_name(self._changed(values)), refusal.reason)
        return None

    def accepted(self) -> bool:
        return not any(map(self.refusal_of, reversed(self.steps())))

    def refusal_of(self, values: Mapping[FieldPath, int]) -> Refusal | None:
        changed = self._changed(values)
        self._asked.add(key := frozenset(changed.items()))
        if key not in self._refusals:  # each set of values is tried once
            self._refusals[key] = self._ask(changed) if changed else None
        return self._refusals[key]

    def _changed(self, values: Mapping[FieldPath, int]) -> Values:
        return {field: v for field, v in values.items() if v != self.field_map.values[field]}

    def _ask(self, values: Values) -> Refusal | None:
        """Return why the class, or this package, refuses these values; ``None``: accepted."""
        model = self.field_map.build_at(values)
        if isinstance(model, Refusal):
            return model
        return (
            count_at_zero(self.field_map, model)
            or build_mismatch(self.field_map, model, values)
            or run_failure(self.field_map, model)
        )

    def reachable(self, moving: MovingWidth) -> range:
        """Return the numbers of units that rounding can leave of a width; if none, all of them."""
        count, grid = moving.count, moving.count.step(self.round_to)
        rounded = range(-(-count.minimum // grid) * grid, count.units + 1, grid)
        return rounded or range(count.units, count.units + 1)


def preflight(pruner: Any, view: ModelView, strict: bool, target: Target) -> Trajectory | None:
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
    told = [*unmet(view, widths, left, target)]
    after = view.field_map.builder.build(view.field_map.config_at(left, shallow=False))
    if not isinstance(after, Refusal):
        now, then = (sizes_now(model, target) for model in (view.model, after))
        told = [*map(str, sizes_compared(now, then, target)), *told]
    return replace(trajectory, of_target=tuple(told))


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
