"""Where a pruner's settings lead: widths after every step, and what the class says to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice, product
from math import lcm

from .amounts import Amount, multiple_below
from .learn import ConfigMap
from .limits import STOPS, other_tensors, stopping, vanishing
from .reference import FieldPath, Refusal, field_name

Values = dict[FieldPath, int]
State = dict[tuple[FieldPath, ...], tuple[int, ...]]
"""Fields of each width -> units left of each kind of its groups."""

_TRIES, _FEW, _DOWN, _HEADS, _PATIENT = 24, 6, 65, 96, 40


@dataclass(frozen=True)
class Move:
    """One width that is going to be pruned.

    Attributes:
        fields: the fields that count its units.
        amounts: the numbers of its groups, those that are alike once.
        ratio: the share of its units that shall be gone in the end.
        clamped: ``max_pruning_ratio`` holds for the ratio itself (ratios of single layers).
        ratios: the ratios of the steps, where a scheduler is not to be asked for them.
        counts: it counts heads: of the numbers that the class takes, the nearest is kept.
    """

    fields: tuple[FieldPath, ...]
    amounts: tuple[Amount, ...]
    ratio: float
    clamped: bool = False
    ratios: tuple[float, ...] | None = None
    counts: bool = False

    @property
    def units(self) -> int:
        """How many units of its fields there are at the start."""
        return self.amounts[0].units // self.amounts[0].grain

    @property
    def name(self) -> str:
        """The fields as people write them."""
        return " + ".join(field_name(path) for path in self.fields)


@dataclass(frozen=True)
class Refused:
    """Widths that the class does not take.

    Attributes:
        step: the step that leads there.
        values: field -> value, where it is another than before.
        reason: the class's own words.
    """

    step: int
    values: Values
    reason: str


@dataclass(frozen=True)
class Adjusted:
    """A step at which the class does not take what is asked for, and something near is done.

    Attributes:
        step: the step.
        asked: field -> the value that the ratios ask for, where another is taken.
        taken: field -> that one.
        reason: the class's own words, or which numbers can be left at all.
    """

    step: int
    asked: dict[FieldPath, float]
    taken: Values
    reason: str


@dataclass(frozen=True)
class Course:
    """The way of all widths through all steps.

    Attributes:
        known: the map of the class.
        moves: the widths.
        schedule: the ratios of the steps, of a ratio in the end: Torch-Pruning's scheduler.
        round_to: the pruner's.
        max_ratio: the pruner's ``max_pruning_ratio``.
        patience: how long to look for what the class takes: as soon as it was asked of so many
            times ``_PATIENT`` widths, and so many for each step, no step looks for others. With
            none, the nearest is done unasked.
    """

    known: ConfigMap
    moves: tuple[Move, ...]
    schedule: Callable[[float], Sequence[float]]
    round_to: int | None = 1
    max_ratio: float = 1.0
    patience: int = 4
    _asked: dict[frozenset[tuple[FieldPath, int]], str | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    def ratios(self, move: Move) -> tuple[float, ...]:
        """The share of a width that shall be gone after each step."""
        return self._ratios[move.fields]

    @cached_property
    def _ratios(self) -> dict[tuple[FieldPath, ...], tuple[float, ...]]:
        found: dict[tuple[FieldPath, ...], tuple[float, ...]] = {}
        for move in self.moves:
            most = self.max_ratio if move.clamped else 1.0
            ratios = move.ratios
            if ratios is None:
                ratios = tuple(min(ratio, most) for ratio in list(self.schedule(move.ratio))[1:])
            found[move.fields] = ratios
        return found

    @cached_property
    def walk(self) -> list[State]:
        """For each step, what is left of each kind of group of each width."""
        return [left for _, left in self._walk]

    @cached_property
    def _walk(self) -> list[tuple[State, State]]:
        """For each step, what Torch-Pruning's amounts alone leave, and what is left."""
        now: State = {move.fields: tuple(a.units for a in move.amounts) for move in self.moves}
        steps = max((len(self.ratios(move)) for move in self.moves), default=0)
        before = len(self._asked)
        result: list[tuple[State, State]] = []
        for step in range(steps):
            plain = {
                move.fields: tuple(
                    amount.next(units, self.ratios(move)[step], self.round_to, self.max_ratio)
                    for amount, units in zip(move.amounts, now[move.fields], strict=True)
                )
                for move in self.moves
            }
            if self.round_to:  # without it, Torch-Pruning asks nobody
                stay = {move.fields: now[move.fields] for move in self.moves if move.counts}
                going = [m for m in self.moves if not m.counts and plain[m.fields] != now[m.fields]]
                now = {**plain, **stay}
                for state in self._candidates(now, plain, going, step):
                    asked = len(self._asked) - before
                    if self.patience and asked >= self.patience * (_PATIENT + steps):
                        break
                    values = self.values_of(state)
                    if not self.patience or self.refuses(values) is None:
                        now = state
                        break
            else:
                now = plain
            result.append((plain, now))
        return result

    def _candidates(
        self, stay: State, plain: State, going: Sequence[Move], step: int
    ) -> Iterator[State]:
        """What a step can leave: Torch-Pruning's amounts first, then what is near them.

        Args:
            stay: Torch-Pruning's amounts, and every number of heads as it was.
            plain: Torch-Pruning's amounts.
            going: the widths, not numbers of heads, that lose something by them; of others it
                rounds nothing, so that they stay.
            step: which step.
        """
        heads = [
            [*self._counts(move, stay[move.fields], self.ratios(move)[step])]
            for move in self.moves
            if move.counts
        ]
        states: list[State] = [
            {**plain, **{path: units for one in chosen for path, units in one.items()}}
            for chosen in islice(product(*heads), _HEADS)
        ]
        divisible = (other for state in states for other in (state, *self._divisible(state, going)))
        return chain(
            islice(divisible, _HEADS),
            self._each_alone(states[0], going),
            self._smaller(states[0], going),
            self._smaller(stay, going),
        )

    def _counts(self, move: Move, now: tuple[int, ...], ratio: float) -> Iterator[State]:
        """Numbers of heads that can be left, nearest to what is asked for first."""
        wanted = move.units * (1 - ratio)
        left, numbers = now[0] // move.amounts[0].grain, self._numbers(move)
        stuck = any(a.exhausted(n, self.max_ratio) for a, n in zip(move.amounts, now, strict=True))
        fewer = [] if stuck or wanted >= left else [number for number in numbers if number < left]
        for number in sorted([*fewer, left], key=lambda n: (abs(n - wanted), -n)):
            yield {move.fields: tuple(number * amount.grain for amount in move.amounts)}

    def _numbers(self, move: Move) -> range:
        """How many units of a width's fields rounding can leave, as far as it alone goes."""
        grid = lcm(*(amount.step(self.round_to) // amount.grain or 1 for amount in move.amounts))
        least = max(-(-amount.least // amount.grain) for amount in move.amounts)
        return range(-(-least // grid) * grid, move.units + 1, grid)

    def _divisible(self, state: State, going: Sequence[Move]) -> Iterator[State]:
        """The state with one width lowered to a multiple of a number of heads that moves."""
        counts = [move for move in self.moves if move.counts]
        for move, heads in product(going, counts):
            left = state[heads.fields][0] // heads.amounts[0].grain
            yield {
                **state,
                move.fields: tuple(
                    multiple_below(units, lcm(amount.step(self.round_to), left)) or units
                    for amount, units in zip(move.amounts, state[move.fields], strict=True)
                ),
            }

    def _each_alone(self, state: State, going: Sequence[Move]) -> Iterator[State]:
        """The state with every width as the class takes it alone, where several are not that.

        One width after another would not do then (MobileViT, which rounds five of its widths).
        """
        before = {move.fields: tuple(a.units for a in move.amounts) for move in self.moves}
        others: State = {}
        for move in going:
            asked = state[move.fields]
            for units in chain([asked], islice(self._downwards(move, asked), _TRIES)):
                if self.refuses(self.values_of({**before, move.fields: units})) is None:
                    if units != asked:
                        others[move.fields] = units
                    break
        if len(others) > 1:
            yield {**state, **others}

    def _smaller(self, state: State, going: Sequence[Move]) -> Iterator[State]:
        """The state, and others in which one width is a little smaller."""
        yield state
        for move in going:
            for units in self._downwards(move, state[move.fields]):
                yield {**state, move.fields: units}

    def _downwards(self, move: Move, now: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Fewer units of a width, the most first."""
        for down in range(1, _DOWN):
            units = tuple(
                n - down * amount.step(self.round_to)
                for n, amount in zip(now, move.amounts, strict=True)
            )
            if min(units) >= 1:
                yield units

    @cached_property
    def adjusted(self) -> list[Adjusted]:
        """The steps at which something else is left than what is asked for, and rounded."""
        result: list[Adjusted] = []
        for number, (plain, left) in enumerate(self._walk if self.round_to else ()):
            values, alone = self.values_of(left), self.values_of(plain)
            if self.refuses(values) is not None:
                break  # nothing goes beyond it
            asked: dict[FieldPath, float] = {}
            grids: list[str] = []
            for move in self.moves:
                share = max(0.0, 1 - self.ratios(move)[number])
                off = move.units * share - left[move.fields][0] / move.amounts[0].grain
                if move.counts and abs(off) > 0.5 + 1e-9:  # not the nearest whole number
                    asked |= {path: self.known.values[path] * share for path in move.fields}
                    if (grid := self._numbers(move).step) > 1:
                        grids.append(f"{move.name} stays a multiple of {grid}")
                elif not move.counts and plain[move.fields] != left[move.fields]:
                    asked |= {path: alone[path] for path in move.fields}
            if asked:
                whole = {path: max(1, round(value)) for path, value in asked.items()}
                reason = self.refuses({**values, **whole}) or ""
                if grids and (not reason or reason.startswith(STOPS)):
                    reason = "; ".join(grids)  # others cannot be left at all
                taken = {path: values[path] for path in asked}
                result.append(Adjusted(number + 1, asked, taken, reason))
        return result

    def units(self, move: Move) -> list[list[int]]:
        """For each kind of group of a width, its units after each step."""
        return [[state[move.fields][i] for state in self.walk] for i in range(len(move.amounts))]

    def steps(self) -> list[Values]:
        """The fields' values after each step."""
        return [self.values_of(state) for state in self.walk]

    def values_of(self, state: State) -> Values:
        """The values of all fields where so many units are left."""
        return {
            path: self.known.values[path] * state[move.fields][0] // move.amounts[0].units
            for move in self.moves
            for path in move.fields
        }

    def refusal(self) -> Refused | None:
        """The first step whose widths the class does not take, or that no config can say."""
        steps = self.steps()
        for move in self.moves:
            ends = {
                tuple(n // amount.grain for n in units)
                for amount, units in zip(move.amounts, self.units(move), strict=True)
            }
            if len(ends) > 1:
                apart = " and ".join(map(str, sorted(ends)))
                words = f"groups of {move.name} would have {apart} units"
                return Refused(len(steps), self._changed(steps[-1]), words)
        for number, values in enumerate(steps, 1):
            reason = self.refuses(values)
            if reason is not None:
                return Refused(number, self._changed(values), reason)
        return None

    def taken(self) -> bool:
        """Whether the class takes all of it; the end is asked first."""
        return not any(self.refuses(values) for values in reversed(self.steps())) and (
            self.refusal() is None
        )

    def refuses(self, values: Mapping[FieldPath, int]) -> str | None:
        """The class's own words, or which count of it would vanish; None: it takes the values."""
        changed = self._changed(values)
        key = frozenset(changed.items())
        if key not in self._asked:
            self._asked[key] = self._ask(changed) if changed else None
        return self._asked[key]

    def _changed(self, values: Mapping[FieldPath, int]) -> Values:
        return {path: v for path, v in values.items() if v != self.known.values[path]}

    def _ask(self, values: Values) -> str | None:
        new = self.known.build_at(values)
        if isinstance(new, Refusal):
            return new.reason
        return (
            vanishing(self.known, new)
            or other_tensors(self.known, new, values)
            or stopping(self.known, new)
        )

    def at(
        self, ratios: Mapping[tuple[FieldPath, ...], float], patience: int | None = None
    ) -> Course:
        """The same with other ratios for some widths, and less patience."""
        moves = [
            replace(move, ratio=ratios[move.fields], ratios=None) if move.fields in ratios else move
            for move in self.moves
        ]
        patience = self.patience if patience is None else patience
        return replace(self, moves=tuple(moves), patience=patience)

    def reachable(self, move: Move) -> range:
        """The numbers of units that rounding can leave of a width; at least what there is."""
        amount = move.amounts[0]
        grid = amount.step(self.round_to)
        rounded = range(-(-amount.least // grid) * grid, amount.units + 1, grid)
        return rounded or range(amount.units, amount.units + 1)

    def nearest(self) -> list[Course]:
        """Courses near this one that the class takes: one ratio changed, or else several."""
        if not self.steps():
            return []
        near = {move.fields: self._near(move) for move in self.moves}
        found: list[Course] = []
        for fields, ratios in near.items():
            tried = (self.at({fields: ratio}, patience=0) for ratio in ratios)
            found += islice((course for course in tried if course.taken()), 1)
        if found:
            return found
        every = islice(product(*(ratios[:_FEW] for ratios in near.values())), 4 * _TRIES)
        tried = (self.at(dict(zip(near, ratios, strict=True)), patience=0) for ratios in every)
        return list(islice((course for course in tried if course.taken()), 1))

    def _near(self, move: Move) -> list[float]:
        """Ratios that lead a width elsewhere, near ends first."""
        end, amount, all_units = self.units(move)[0][-1], move.amounts[0], self.reachable(move)
        middle = (end - all_units.start) // all_units.step  # where the end stands among them
        window = all_units[max(0, middle - _TRIES) : max(0, middle + _TRIES + 1)]
        others = sorted(window, key=lambda units: (abs(units - end), units))
        return [amount.ratio_for(units, move.counts) for units in others if units != end][:_TRIES]
