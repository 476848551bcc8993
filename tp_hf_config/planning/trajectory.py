"""Compute the widths after every step of a pruner, and which of them the class refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice, product
from math import lcm

from ..fieldmap.field_map import (
    FieldMap,
    build_mismatch,
    count_at_zero,
    run_failure,
)
from ..graph.unit_count import MULTIPLES, UnitCount, multiple_below
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.layer_entries import name_in_all_layers

Values = dict[FieldPath, int]
# fields of a width -> units left in each kind of its groups (one per unit count)
UnitsLeft = dict[tuple[FieldPath, ...], tuple[int, ...]]
_ALONE = 24  # numbers that are tried of one width alone
_DISTANCE = 64  # steps that a width is moved away from what its ratio leaves
_HEADS = 96  # states that differ in head counts
_PATIENT = 40  # sets of values that a step may try, in units of Trajectory.patience


@dataclass(frozen=True)
class MovingWidth:
    fields: tuple[FieldPath, ...]  # that count its units
    unit_counts: tuple[UnitCount, ...]  # of its groups, each different one once
    ratio: float  # share of its units to remove in the end
    clamped: bool = False  # max_pruning_ratio limits the ratio itself (ratios of single layers)
    ratios: tuple[float, ...] | None = None  # after each step; None: from the scheduler
    counts_heads: bool = False  # ends at the nearest number of heads that the class accepts

    @property
    def units(self) -> int:
        return self.unit_counts[0].units // self.unit_counts[0].per_field_unit

    @property
    def name(self) -> str:
        return " + ".join(field_name(field) for field in self.fields)


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
class Trajectory:
    """The widths after each step of a pruner, and what the class accepts of them."""

    field_map: FieldMap
    moving_widths: tuple[MovingWidth, ...]  # those that are pruned
    # final ratio -> ratios from step 0 on: Torch-Pruning's scheduler
    schedule: Callable[[float], Sequence[float]]
    round_to: int | None = 1  # the pruner's round_to; None: the widths' grids
    max_ratio: float = 1.0  # the pruner's max_pruning_ratio
    # Limits the search for widths that the class accepts: no step searches on after ``patience *
    # (_PATIENT + steps)`` sets of values.
    patience: int = 4
    _refusals: dict[object, Refusal | None] = field(default_factory=dict, compare=False, repr=False)
    # includes sets with a known answer: the limit must not depend on earlier searches
    _asked: set[object] = field(default_factory=set, init=False, compare=False, repr=False)

    @cached_property
    def ratios(self) -> dict[tuple[FieldPath, ...], tuple[float, ...]]:
        """Fields of each width -> the share of its units removed after each step."""
        result: dict[tuple[FieldPath, ...], tuple[float, ...]] = {}
        for moving in self.moving_widths:
            most = self.max_ratio if moving.clamped else 1.0
            ratios = moving.ratios
            if ratios is None:
                ratios = tuple(min(ratio, most) for ratio in list(self.schedule(moving.ratio))[1:])
            result[moving.fields] = ratios
        return result

    @cached_property
    def units_by_step(self) -> list[UnitsLeft]:
        return [state for _, state in self._steps]

    @cached_property
    def start(self) -> UnitsLeft:
        return {w.fields: tuple(count.units for count in w.unit_counts) for w in self.moving_widths}

    @cached_property
    def _steps(self) -> list[tuple[UnitsLeft, UnitsLeft]]:
        """For each step, the units that the rounded ratios leave, and those that it leaves."""
        now = self.start
        steps = max(map(len, self.ratios.values()), default=0)
        self._asked.clear()
        result: list[tuple[UnitsLeft, UnitsLeft]] = []
        for step in range(steps):
            rounded = {
                w.fields: tuple(
                    count.next(units, self.ratios[w.fields][step], self.round_to, self.max_ratio)
                    for count, units in zip(w.unit_counts, now[w.fields], strict=True)
                )
                for w in self.moving_widths
            }
            before = now
            heads = {w.fields: before[w.fields] for w in self.moving_widths if w.counts_heads}
            now = {**rounded, **heads}
            for state in self._candidates(before, rounded, now, step):
                if len(self._asked) >= self.patience * (_PATIENT + steps):
                    break
                if self.refusal_of(self.values_of(state)) is None:
                    now = state
                    break
            result.append((rounded, now))
        return result

    def _candidates(
        self, before: UnitsLeft, rounded: UnitsLeft, with_heads: UnitsLeft, step: int
    ) -> Iterator[UnitsLeft]:
        """Yield what a step can leave: what the rounded ratios leave, then states near it.

        ``with_heads``: ``rounded`` with every head count as ``before``.
        """
        # widths that lose units and count no heads; Torch-Pruning rounds none of the others
        shrinking = [
            w
            for w in self.moving_widths
            if not w.counts_heads and rounded[w.fields] != before[w.fields]
        ]
        heads = [
            [*self._head_counts(width, before[width.fields], self.ratios[width.fields][step])]
            for width in self.moving_widths
            if width.counts_heads
        ]
        states: list[UnitsLeft] = [
            {**rounded, **{fields: units for part in parts for fields, units in part.items()}}
            for parts in islice(product(*heads), _HEADS)
        ]
        divisible = (
            other for state in states for other in (state, *self._divisible(state, shrinking))
        )
        return chain(
            islice(divisible, _HEADS),
            self._alone(states[0], shrinking),
            self._smaller(states[0], shrinking),
            self._smaller(with_heads, shrinking),
            self._larger(states[0], before, shrinking),
        )

    def _head_counts(
        self, moving: MovingWidth, now: tuple[int, ...], ratio: float
    ) -> Iterator[UnitsLeft]:
        """Yield the head counts that a step can leave, those nearest to the ratio first."""
        wanted = moving.units * (1 - ratio)
        heads, numbers = now[0] // moving.unit_counts[0].per_field_unit, self._numbers(moving)
        stuck = any(
            a.exhausted(n, self.max_ratio) for a, n in zip(moving.unit_counts, now, strict=True)
        )
        fewer = [] if stuck or wanted >= heads else [number for number in numbers if number < heads]
        for number in sorted([*fewer, heads], key=lambda n: (abs(n - wanted), -n)):
            yield {moving.fields: tuple(number * c.per_field_unit for c in moving.unit_counts)}

    def _numbers(self, moving: MovingWidth) -> range:
        """Return the numbers of field units that rounding can leave."""
        grid = lcm(*(c.step(self.round_to) // c.per_field_unit or 1 for c in moving.unit_counts))
        fewest = max(-(-c.minimum // c.per_field_unit) for c in moving.unit_counts)
        return range(-(-fewest // grid) * grid, moving.units + 1, grid)

    def _divisible(self, state: UnitsLeft, shrinking: Sequence[MovingWidth]) -> Iterator[UnitsLeft]:
        """Yield the state with one width lowered to a multiple of a head count that is pruned."""
        counts = [moving for moving in self.moving_widths if moving.counts_heads]
        for moving, heads in product(shrinking, counts):
            number = state[heads.fields][0] // heads.unit_counts[0].per_field_unit
            yield {
                **state,
                moving.fields: tuple(
                    multiple_below(units, lcm(count.step(self.round_to), number)) or units
                    for count, units in zip(moving.unit_counts, state[moving.fields], strict=True)
                ),
            }

    def _alone(self, state: UnitsLeft, shrinking: Sequence[MovingWidth]) -> Iterator[UnitsLeft]:
        """Yield the state with each width as the class accepts it alone, if several must change."""
        changes: UnitsLeft = {}
        for width in shrinking:
            rounded = state[width.fields]
            for units in chain([rounded], islice(self._downwards(width, rounded), _ALONE)):
                if self.refusal_of(self.values_of({**self.start, width.fields: units})) is None:
                    if units != rounded:
                        changes[width.fields] = units
                    break
        # one change at a time is not enough (MobileViT rounds five of its widths)
        if len(changes) > 1:
            yield {**state, **changes}

    def _smaller(self, state: UnitsLeft, shrinking: Sequence[MovingWidth]) -> Iterator[UnitsLeft]:
        yield state
        for moving in shrinking:
            for units in self._downwards(moving, state[moving.fields]):
                yield {**state, moving.fields: units}

    def _larger(
        self, state: UnitsLeft, before: UnitsLeft, shrinking: Sequence[MovingWidth]
    ) -> Iterator[UnitsLeft]:
        """Yield the state with one width larger than its ratio asks, at last as ``before``."""
        for moving in shrinking:
            most = before[moving.fields]
            for up in range(1, _DISTANCE + 1):
                units = self._moved(moving, state[moving.fields], up)
                if any(n >= limit for n, limit in zip(units, most, strict=True)):
                    break
                yield {**state, moving.fields: units}
            yield {**state, moving.fields: most}

    def _downwards(self, moving: MovingWidth, now: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for down in range(1, _DISTANCE + 1):
            units = self._moved(moving, now, -down)
            if min(units) >= 1:
                yield units

    def _moved(self, moving: MovingWidth, now: tuple[int, ...], steps: int) -> tuple[int, ...]:
        return tuple(
            n + steps * count.step(self.round_to)
            for n, count in zip(now, moving.unit_counts, strict=True)
        )

    @cached_property
    def adjusted(self) -> list[tuple[int, str]]:
        """The steps, from 1, with other widths than the ratios ask for, and what is done."""
        result: list[tuple[int, str]] = []
        for step, (rounded, state) in enumerate(self._steps):
            values, by_rounding = self.values_of(state), self.values_of(rounded)
            if self.refusal_of(values) is not None:
                break  # later steps do not happen
            requested: dict[FieldPath, float] = {}
            reasons: dict[FieldPath, str] = {}  # of fields that can have no other number at all
            for width in self.moving_widths:
                share = max(0.0, 1 - self.ratios[width.fields][step])
                units = state[width.fields][0] / width.unit_counts[0].per_field_unit
                off = abs(width.units * share - units)
                if width.counts_heads and off > 0.5 + 1e-9:  # not the nearest whole number
                    requested |= {f: self.field_map.values[f] * share for f in width.fields}
                    if (grid := self._numbers(width).step) > 1:
                        reason = f"{width.name} has to be a multiple of {grid}"
                        reasons |= dict.fromkeys(width.fields, reason)
                elif not width.counts_heads and rounded[width.fields] != state[width.fields]:
                    requested |= {field: by_rounding[field] for field in width.fields}
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
            line = f"step {step + 1}: the ratios ask for {asked}{because}; nearest valid: {done}"
            result.append((step + 1, line))
        return result

    @cached_property
    def shortfalls(self) -> list[str]:
        """A line for each width that ends wider than its ratio asks for, with the reason."""
        result: list[str] = []
        rounded, left = self._steps[-1] if self._steps else ({}, {})
        for moving in self.moving_widths if self._steps else ():
            remaining, ratio = left[moving.fields][0], moving.ratio
            # ``adjusted`` has the head counts, and what the class refuses
            told = moving.counts_heads or rounded[moving.fields] != left[moving.fields]
            told |= self._to_grid(moving, len(self._steps) - 1) is not None
            if not told and remaining > moving.unit_counts[0].units * (1 - ratio) + 1e-6:
                field = moving.fields[0]
                value = self.field_map.values[field]
                ends = value * remaining // moving.unit_counts[0].units
                result.append(
                    f"{field_name(field)} ends at {ends}; the ratio {ratio:g} asks for "
                    f"{value * (1 - ratio):g}: {self._why_wider(moving, remaining)}"
                )
        return result

    def grid_note(self, step: int) -> str | None:
        """Say which widths a step, from 1, leaves on their grids instead of what is asked for."""
        moved: dict[str, list[tuple[int, int, int]]] = {}
        for moving in self.moving_widths:
            if (found := self._to_grid(moving, step - 1)) is not None:
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
        targets = {w.unit_counts[0].grid.target for w in self.moving_widths} - {""}
        why = f"for {targets.pop()}" if targets else "round_to=1: exactly the ratios"
        return f"to multiples of {of} ({why}): {', '.join(parts)}"

    def _to_grid(self, moving: MovingWidth, step: int) -> tuple[int, int, int] | None:
        """Return the first field's value on the grid, the exact value and the multiple, if any."""
        before = self.start if step == 0 else self._steps[step - 1][1]
        asked_for, left = (state[moving.fields][0] for state in self._steps[step])
        count, now = moving.unit_counts[0], before[moving.fields][0]
        multiple = count.grid.multiple_of(left // count.per_field_unit)
        # ``adjusted`` has what the class refuses
        if self.round_to is not None or moving.counts_heads or left != asked_for:
            return None
        exact = count.next(now, self.ratios[moving.fields][step], 1, self.max_ratio)
        if left == exact:
            return None
        value = self.field_map.values[moving.fields[0]]
        number, asked = (value * each // count.units for each in (left, exact))
        channels = multiple * count.per_field_unit * count.run
        if not count.grid.target:  # without the class's own multiple
            channels = next(n for n in MULTIPLES if channels % n == 0)
        return number, asked, channels

    def _why_wider(self, moving: MovingWidth, remaining: int) -> str:
        count, fewest = moving.unit_counts[0], self.reachable(moving)[0]
        if self.max_ratio < moving.ratio:
            return f"max_pruning_ratio is {self.max_ratio:g}"
        if remaining < count.units:
            return "it cannot be smaller"
        if fewest == count.units:
            return f"no smaller multiple of {count.step(self.round_to)} is possible"
        return (
            "this ratio would remove all of it, so nothing is pruned; "
            f"{count.ratio_for(fewest):g} removes the most that is possible"
        )

    def units(self, moving: MovingWidth) -> list[list[int]]:
        kinds = range(len(moving.unit_counts))
        return [[left[moving.fields][kind] for left in self.units_by_step] for kind in kinds]

    def steps(self) -> list[Values]:
        return [self.values_of(state) for state in self.units_by_step]

    def values_of(self, state: UnitsLeft) -> Values:
        return {
            field: self.field_map.values[field] * state[w.fields][0] // w.unit_counts[0].units
            for w in self.moving_widths
            for field in w.fields
        }

    def refusal(self) -> PlannedRefusal | None:
        """Return the first step that the class refuses or no config can describe, if any."""
        steps = self.steps()
        for moving in self.moving_widths:
            ends = {
                tuple(n // count.per_field_unit for n in units)
                for count, units in zip(moving.unit_counts, self.units(moving), strict=True)
            }
            if len(ends) > 1:
                apart = " and ".join(map(str, sorted(ends)))
                words = f"groups of {moving.name} would have {apart} units"
                return PlannedRefusal(len(steps), by_name(self._changed(steps[-1])), words)
        for number, values in enumerate(steps, 1):
            if (refusal := self.refusal_of(values)) is not None:
                return PlannedRefusal(number, by_name(self._changed(values)), refusal.reason)
        return None

    def accepted(self) -> bool:
        return not any(map(self.refusal_of, reversed(self.steps()))) and not self.refusal()

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

    def at(self, ratios: Mapping[tuple[FieldPath, ...], float]) -> Trajectory:
        moving_widths = [
            replace(w, ratio=ratios[w.fields], ratios=None) if w.fields in ratios else w
            for w in self.moving_widths
        ]
        return replace(self, moving_widths=tuple(moving_widths))

    def reachable(self, moving: MovingWidth) -> range:
        """Return the numbers of units that rounding can leave of a width; if none, all of them."""
        count = moving.unit_counts[0]
        grid = count.step(self.round_to)
        rounded = range(-(-count.minimum // grid) * grid, count.units + 1, grid)
        return rounded or range(count.units, count.units + 1)
