"""Legal widths for a model of a given size: one ratio, and as few exceptions as the class asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from .course import Course, Move
from .reference import field_name
from .sizes import ParameterCount

_HALVINGS, _TRIES, _DIGITS = 40, 32, (2, 3, 4, 5, 6)


def course_to(course: Course, moves: Sequence[Move], count: ParameterCount, target: int) -> Course:
    """The smallest ratio for these widths that leaves ``target`` parameters at most.

    Where the class does not take the widths that it leads to, one of them goes to the nearest that
    it takes; else the ratio goes up.

    Raises:
        ValueError: no ratio leaves so few parameters.
    """

    def at(ratio: float) -> Course:
        return course.at({move.fields: ratio for move in moves})

    def parameters(course: Course) -> int:
        return count.at(course.steps()[-1])

    # above the highest, some width would vanish, and is passed over instead
    highest = min((_highest(course, move) for move in moves), default=0.0)
    if parameters(at(highest)) > target:
        names = ", ".join(move.name for move in moves) or "no width"
        raise ValueError(
            f"target_params={target:,}: one ratio for {names} leaves at least "
            f"{parameters(at(highest)):,} of {count.at({}):,} parameters. Prune more widths "
            "(prune=), or set ratios= for each."
        )
    low, high = (0.0, highest) if parameters(at(0.0)) > target else (0.0, 0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if parameters(at(middle)) <= target else (middle, high)
    for ratio in _ratios(at(_short(at(high), moves, high)), moves, highest):
        here = at(ratio)
        near = [here] if here.taken() else here.nearest()
        fitting = [one for one in near if parameters(one) <= target and _one_head_ratio(one, moves)]
        if fitting:
            return max(fitting, key=parameters)
    raise ValueError(
        f"target_params={target:,}: the class takes no widths near one ratio of {high:.3f}. Set "
        "ratios= for each, or leave one out (prune=)."
    )


def why_not_exactly(
    course: Course, moves: Sequence[Move], count: ParameterCount, target: int
) -> str | None:
    """Why a course to a target leaves fewer parameters than that; ``None``: it does not.

    A width that could keep one unit more and stay within the target is named with the ratio that
    keeps it; else the one that comes nearest above.
    """
    reached = count.at(course.steps()[-1])
    if reached == target:
        return None
    wider = []
    for move in moves:
        now = next(one for one in course.moves if one.fields == move.fields)
        kept, reachable = course.units(now)[0][-1], course.reachable(move)
        if move.clamped or kept + reachable.step > reachable[-1]:  # heads have one ratio
            continue
        ratio = move.amounts[0].ratio_for(kept + reachable.step, move.counts)
        other = course.at({move.fields: ratio})
        if other.taken() and count.at(other.steps()[-1]) > reached:
            values = other.steps()[-1]
            said = ", ".join(f"{field_name(path)} {values[path]:,}" for path in move.fields)
            wider.append((count.at(values), said, f"{field_name(move.fields[0])}={ratio:g}"))
    fewer = f"{target - reached:,} fewer, as units are whole"
    within = max((one for one in wider if one[0] <= target), default=None)
    if within is not None:
        return (
            f"{fewer} and one ratio holds for all: {within[1]} alone would leave {within[0]:,} "
            f"(a ratio of its own: {within[2]})"
        )
    above = min(wider, default=None)
    return fewer if above is None else f"{fewer}: {above[1]} would already leave {above[0]:,}"


def _one_head_ratio(course: Course, moves: Sequence[Move]) -> bool:
    """Heads that the target decides have one ratio: a pruner has no other for them."""
    heads = {move.fields for move in moves if move.clamped}
    return len({move.ratio for move in course.moves if move.fields in heads}) < 2


def _highest(course: Course, move: Move) -> float:
    least = course.reachable(move)[0]
    if move.counts or least == move.amounts[0].units:
        return 1.0
    return move.amounts[0].ratio_for(least)


def _ratios(course: Course, moves: Sequence[Move], highest: float) -> Iterator[float]:
    """The common ratio, and the next larger ones at which some width is another."""
    ratio = next((m.ratio for m in course.moves for move in moves if m.fields == move.fields), 0.0)
    for _ in range(_TRIES):
        yield ratio
        following: list[float] = []
        for move in moves:
            moved = course.at({move.fields: ratio})
            end = moved.units(next(m for m in moved.moves if m.fields == move.fields))[0][-1]
            reachable = course.reachable(move)
            if end > reachable[0]:
                fewer = end - reachable.step
                following.append(move.amounts[0].ratio_for(fewer, move.counts))
        larger = [other for other in following if ratio < other <= highest]
        if not larger:
            return
        ratio = min(larger)


def _short(course: Course, moves: Sequence[Move], ratio: float) -> float:
    """A ratio of few digits that leads to the same widths."""
    for digits in _DIGITS:
        rounded: float = ceil(ratio * 10**digits) / 10**digits
        other = course.at({move.fields: rounded for move in moves})
        if rounded <= 1 and other.steps() == course.steps():
            return rounded
    return ratio
