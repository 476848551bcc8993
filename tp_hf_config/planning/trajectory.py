"""Compute the widths after every step of a pruner, and what the class refuses of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice, product
from math import gcd, lcm

from torch import nn

from ..fieldmap.field_map import (
    STOPS,
    FieldMap,
    build_mismatch,
    count_at_zero,
    multiple_of,
    run_failure,
)
from ..fieldmap.model_view import ModelView
from ..graph.full_size import UnitCount, multiple_below
from ..graph.prunable import Width
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name
from ..model.tensors import is_matrix_stack, tensor

Values = dict[FieldPath, int]
UnitsLeft = dict[tuple[FieldPath, ...], tuple[int, ...]]
"""Fields of each width -> remaining units in each kind of its groups (one per unit count)."""
# limits: ratios of one width, of several, steps down, states of head counts, values to ask about
_TRIES, _FEW, _DOWN, _HEADS, _PATIENT = 24, 6, 65, 96, 40


@dataclass(frozen=True)
class MovingWidth:
    """One width that is going to be pruned.

    Attributes:
        fields: the fields that count its units.
        unit_counts: the unit counts of its groups, each different one once.
        ratio: the share of its units that is to be gone in the end.
        clamped: ``max_pruning_ratio`` limits the ratio itself (ratios of single layers).
        ratios: the ratios of the steps, if no scheduler is to make them.
        counts_heads: it counts heads; the nearest number that the class accepts is kept.
    """

    fields: tuple[FieldPath, ...]
    unit_counts: tuple[UnitCount, ...]
    ratio: float
    clamped: bool = False
    ratios: tuple[float, ...] | None = None
    counts_heads: bool = False

    @property
    def units(self) -> int:
        """Return how many units of its fields there are at the start."""
        return self.unit_counts[0].units // self.unit_counts[0].per_field_unit

    @property
    def name(self) -> str:
        """Return the names of the fields, joined by ``+``."""
        return " + ".join(field_name(field) for field in self.fields)


@dataclass(frozen=True)
class RefusedStep:
    """Widths that the class does not accept.

    Attributes:
        step: the step that leads there, counted from 1.
        values: field -> value, for the fields that differ from the start.
        reason: the class's own words, or ours.
    """

    step: int
    values: Values
    reason: str


@dataclass(frozen=True)
class Adjusted:
    """A step at which the class refuses what the ratios ask for, and gets something near it.

    Attributes:
        step: the step, counted from 1.
        requested: field -> the value that the ratios ask for, if it gets another one.
        accepted: field -> the value that it gets instead.
        reason: the class's own words, or which numbers are possible at all.
    """

    step: int
    requested: dict[FieldPath, float]
    accepted: Values
    reason: str


@dataclass(frozen=True)
class Trajectory:
    """The widths after each step of a pruner.

    Attributes:
        field_map: the field map of the class.
        moving_widths: the widths that are pruned.
        schedule: final ratio -> ratios from step 0 on: Torch-Pruning's scheduler.
        round_to: the pruner's ``round_to``.
        max_ratio: the pruner's ``max_pruning_ratio``.
        patience: limits the search for what the class accepts. Once it was asked about
            ``patience * (_PATIENT + steps)`` sets of values, no step searches on. With 0, each
            step takes its first candidate unasked.
    """

    field_map: FieldMap
    moving_widths: tuple[MovingWidth, ...]
    schedule: Callable[[float], Sequence[float]]
    round_to: int = 1
    max_ratio: float = 1.0
    patience: int = 4
    _refusals: dict[object, Refusal | None] = field(default_factory=dict, compare=False, repr=False)
    # counts questions with a known answer too: a search must not depend on what was asked before
    _asked: set[object] = field(default_factory=set, init=False, compare=False, repr=False)

    @cached_property
    def ratios(self) -> dict[tuple[FieldPath, ...], tuple[float, ...]]:
        """Return, for the fields of each width, the share that is to be gone after each step."""
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
        """Return, for each step, the remaining units in each kind of group of each width."""
        return [state for _, state in self._steps]

    @cached_property
    def start(self) -> UnitsLeft:
        """Return the units before the first step."""
        return {w.fields: tuple(count.units for count in w.unit_counts) for w in self.moving_widths}

    @cached_property
    def _steps(self) -> list[tuple[UnitsLeft, UnitsLeft]]:
        """Return, for each step, what the rounded ratios alone leave, and what the step leaves."""
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
            heads = {w.fields: now[w.fields] for w in self.moving_widths if w.counts_heads}
            shrinking = [
                w
                for w in self.moving_widths
                if not w.counts_heads and rounded[w.fields] != now[w.fields]
            ]
            now = {**rounded, **heads}
            for state in self._candidates(now, rounded, shrinking, step):
                if self.patience and len(self._asked) >= self.patience * (_PATIENT + steps):
                    break
                if not self.patience or self.refusal_of(self.values_of(state)) is None:
                    now = state
                    break
            result.append((rounded, now))
        return result

    def _candidates(
        self, with_heads: UnitsLeft, rounded: UnitsLeft, shrinking: Sequence[MovingWidth], step: int
    ) -> Iterator[UnitsLeft]:
        """Yield what a step can leave: what the rounded ratios leave first, then what is near it.

        Args:
            with_heads: what the rounded ratios leave, but with every head count as it was.
            rounded: what the rounded ratios leave.
            shrinking: the widths that lose units in ``rounded`` and are no head counts.
                Torch-Pruning rounds nothing of the others, so they stay.
            step: the step, counted from 0.
        """
        heads = [
            [*self._head_counts(width, with_heads[width.fields], self.ratios[width.fields][step])]
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
        """Return the numbers of field units that rounding alone can leave."""
        grid = lcm(*(c.step(self.round_to) // c.per_field_unit or 1 for c in moving.unit_counts))
        fewest = max(-(-c.minimum // c.per_field_unit) for c in moving.unit_counts)
        return range(-(-fewest // grid) * grid, moving.units + 1, grid)

    def _divisible(self, state: UnitsLeft, shrinking: Sequence[MovingWidth]) -> Iterator[UnitsLeft]:
        """Yield the state with one width lowered to a multiple of a head count that moves."""
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
        """Yield the state with each width as the class accepts it alone, if several have to change.

        Changing one width at a time does not do then (MobileViT rounds five of its widths).
        """
        changes: UnitsLeft = {}
        for width in shrinking:
            rounded = state[width.fields]
            for units in chain([rounded], islice(self._downwards(width, rounded), _TRIES)):
                if self.refusal_of(self.values_of({**self.start, width.fields: units})) is None:
                    if units != rounded:
                        changes[width.fields] = units
                    break
        if len(changes) > 1:
            yield {**state, **changes}

    def _smaller(self, state: UnitsLeft, shrinking: Sequence[MovingWidth]) -> Iterator[UnitsLeft]:
        """Yield the state, then states in which one width is a little smaller."""
        yield state
        for moving in shrinking:
            for units in self._downwards(moving, state[moving.fields]):
                yield {**state, moving.fields: units}

    def _downwards(self, moving: MovingWidth, now: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Yield fewer and fewer units of a width."""
        for down in range(1, _DOWN):
            units = tuple(
                n - down * count.step(self.round_to)
                for n, count in zip(now, moving.unit_counts, strict=True)
            )
            if min(units) >= 1:
                yield units

    @cached_property
    def adjusted(self) -> list[Adjusted]:
        """Return the steps that leave other widths than the rounded ratios ask for."""
        result: list[Adjusted] = []
        for step, (rounded, state) in enumerate(self._steps):
            values, by_rounding = self.values_of(state), self.values_of(rounded)
            if self.refusal_of(values) is not None:
                break  # later steps do not happen
            requested: dict[FieldPath, float] = {}
            grids: list[str] = []
            for width in self.moving_widths:
                share = max(0.0, 1 - self.ratios[width.fields][step])
                units = state[width.fields][0] / width.unit_counts[0].per_field_unit
                off = abs(width.units * share - units)
                if width.counts_heads and off > 0.5 + 1e-9:  # not the nearest whole number
                    requested |= {f: self.field_map.values[f] * share for f in width.fields}
                    if (grid := self._numbers(width).step) > 1:
                        grids.append(f"{width.name} stays a multiple of {grid}")
                elif not width.counts_heads and rounded[width.fields] != state[width.fields]:
                    requested |= {field: by_rounding[field] for field in width.fields}
            if requested:
                whole = {field: max(1, round(value)) for field, value in requested.items()}
                refusal = self.refusal_of({**values, **whole})
                reason = "" if refusal is None else refusal.reason
                if grids and (not reason or reason.startswith(STOPS)):
                    reason = "; ".join(grids)  # no other number is possible at all
                accepted = {field: values[field] for field in requested}
                result.append(Adjusted(step + 1, requested, accepted, reason))
        return result

    def units(self, moving: MovingWidth) -> list[list[int]]:
        """Return, for each kind of group of a width, its units after each step."""
        kinds = range(len(moving.unit_counts))
        return [[left[moving.fields][kind] for left in self.units_by_step] for kind in kinds]

    def steps(self) -> list[Values]:
        """Return the values of the fields after each step."""
        return [self.values_of(state) for state in self.units_by_step]

    def values_of(self, state: UnitsLeft) -> Values:
        """Return the value of each field when so many units remain."""
        return {
            field: self.field_map.values[field] * state[w.fields][0] // w.unit_counts[0].units
            for w in self.moving_widths
            for field in w.fields
        }

    def first_refused(self) -> RefusedStep | None:
        """Return the first step that the class refuses or no config can say, or ``None``."""
        steps = self.steps()
        for moving in self.moving_widths:
            ends = {
                tuple(n // count.per_field_unit for n in units)
                for count, units in zip(moving.unit_counts, self.units(moving), strict=True)
            }
            if len(ends) > 1:
                apart = " and ".join(map(str, sorted(ends)))
                words = f"groups of {moving.name} would have {apart} units"
                return RefusedStep(len(steps), self._changed(steps[-1]), words)
        for number, values in enumerate(steps, 1):
            if (refusal := self.refusal_of(values)) is not None:
                return RefusedStep(number, self._changed(values), refusal.reason)
        return None

    def accepted(self) -> bool:
        """True if the class accepts every step; the last is asked about first."""
        return not any(map(self.refusal_of, reversed(self.steps()))) and not self.first_refused()

    def refusal_of(self, values: Mapping[FieldPath, int]) -> Refusal | None:
        """Return the refusal of these values, or ``None``; each set of values is tried once."""
        changed = self._changed(values)
        self._asked.add(key := frozenset(changed.items()))
        if key not in self._refusals:
            self._refusals[key] = self._ask(changed) if changed else None
        return self._refusals[key]

    def _changed(self, values: Mapping[FieldPath, int]) -> Values:
        """Return the values that differ from the start."""
        return {field: v for field, v in values.items() if v != self.field_map.values[field]}

    def _ask(self, values: Values) -> Refusal | None:
        """Return the class's refusal of these values, or ours, or ``None``.

        Ours: a count would vanish, it builds other tensors than pruning leaves, or it does not run.
        """
        model = self.field_map.build_at(values)
        if isinstance(model, Refusal):
            return model
        return (
            count_at_zero(self.field_map, model)
            or build_mismatch(self.field_map, model, values)
            or run_failure(self.field_map, model)
        )

    def at(
        self, ratios: Mapping[tuple[FieldPath, ...], float], patience: int | None = None
    ) -> Trajectory:
        """Return the same trajectory with other ratios for some widths, and other patience."""
        moving_widths = [
            replace(w, ratio=ratios[w.fields], ratios=None) if w.fields in ratios else w
            for w in self.moving_widths
        ]
        patience = self.patience if patience is None else patience
        return replace(self, moving_widths=tuple(moving_widths), patience=patience)

    def reachable(self, moving: MovingWidth) -> range:
        """Return the numbers of units that rounding can leave of a width; if none, all units."""
        count = moving.unit_counts[0]
        grid = count.step(self.round_to)
        rounded = range(-(-count.minimum // grid) * grid, count.units + 1, grid)
        return rounded or range(count.units, count.units + 1)

    def nearest(self) -> list[Trajectory]:
        """Return accepted trajectories near this one: one ratio changed, or else several."""
        if not self.steps():
            return []
        near = {moving.fields: self._near(moving) for moving in self.moving_widths}
        accepted: list[Trajectory] = []
        for fields, ratios in near.items():
            candidates = (self.at({fields: ratio}, patience=0) for ratio in ratios)
            accepted += islice(filter(Trajectory.accepted, candidates), 1)
        if accepted:
            return accepted
        every = islice(product(*(ratios[:_FEW] for ratios in near.values())), 4 * _TRIES)
        candidates = (self.at(dict(zip(near, ratios, strict=True)), patience=0) for ratios in every)
        return list(islice(filter(Trajectory.accepted, candidates), 1))

    def _near(self, moving: MovingWidth) -> list[float]:
        """Return ratios that end a width elsewhere, the nearest ends first."""
        end, count, sizes = self.units(moving)[0][-1], moving.unit_counts[0], self.reachable(moving)
        middle = (end - sizes.start) // sizes.step  # index of the end among them
        window = sizes[max(0, middle - _TRIES) : max(0, middle + _TRIES + 1)]
        others = sorted(window, key=lambda n: (abs(n - end), n))
        return [count.ratio_for(n, moving.counts_heads) for n in others if n != end][:_TRIES]


def multiples_of(view: ModelView, widths: Iterable[Width]) -> dict[tuple[FieldPath, ...], int]:
    """Return what each of these widths has to stay a multiple of, counted in units of its fields.

    The class, the kernels or the channel groups require it.
    """
    counts = view.field_map.count_fields()
    multiples: dict[tuple[FieldPath, ...], int] = {}
    for width in widths:
        multiple = _multiple_in(view, width)
        if len(width.fields) == 1 and not set(width.fields) & counts:
            own = multiple_of(view.field_map, width.fields[0])
            multiple = lcm(
                multiple, own // gcd(own, view.field_map.values[width.fields[0]] // width.units)
            )
        multiples[width.fields] = multiple
    return multiples


def unit_counts_of(width: Width, multiple: int, model: nn.Module) -> tuple[UnitCount, ...]:
    """Return the unit counts of a width's groups, each different one once.

    ``multiple`` is what the width has to stay a multiple of, in units of its fields.
    """
    channels: dict[tuple[str, int], int] = {}
    for dim in (dim for group in width.groups for dim in group.dims):
        channels[dim.place] = channels.get(dim.place, 0) + dim.layout.parts * dim.layout.run
    unit_counts: dict[UnitCount, None] = {}
    for group in width.groups:
        layers = {(tensor(model, m.name).shape[m.dim], channels[m.place]) for m in group.dims}
        unit_count = group.count.in_multiples_of(multiple)
        unit_counts[replace(unit_count, layers=tuple(sorted(layers)))] = None
    return tuple(unit_counts)


def _multiple_in(view: ModelView, width: Width) -> int:
    """Return what a width has to stay a multiple of for its kernels and channel groups.

    Stacked experts run in a grouped matrix product that takes only rows of whole 16 bytes. Channel
    groups have to lose the same number each.
    """
    multiple = 1
    for group in width.groups:
        own = group.count.channel_groups  # all groups of a width lose the same number
        for dim in group.dims:
            if dim.dim > 0 and is_matrix_stack(view.model, dim.name):
                own = lcm(own, 16 // tensor(view.model, dim.name).element_size())
        multiple = lcm(multiple, own // gcd(own, group.count.per_field_unit))
    return multiple
