"""Widths of which less goes in the end than their ratio says."""

from __future__ import annotations

from .course import Course, Move
from .reference import field_name


def shortfalls(course: Course) -> list[str]:
    """What is left of each such width, and why; numbers of heads are ``course.adjusted``."""
    result: list[str] = []
    for move in course.moves if course.walk else ():
        units, left = move.amounts[0].units, course.walk[-1][move.fields][0]
        ratio = move.ratio if move.ratios is None else move.ratios[-1]
        if not move.counts and left > units * (1 - ratio) + 1e-6:
            path = move.fields[0]
            value = course.known.values[path] * left // units
            why = _held(course, move, left, ratio)
            result.append(f"{field_name(path)} ends at {value}, not at {ratio:g} less: {why}")
    return result


def _held(course: Course, move: Move, left: int, ratio: float) -> str:
    """Why no less than so many units are left of a width."""
    amount, least = move.amounts[0], course.reachable(move)[0]
    if course.max_ratio < ratio:
        return f"max_pruning_ratio is {course.max_ratio:g}"
    if left < amount.units:
        return "no less can be left of it"
    if least == amount.units:
        return f"no smaller multiple of {amount.step(course.round_to)} can be left of it"
    most = amount.ratio_for(least)
    return f"it would leave nothing, and then nothing is pruned; {most:g} leaves the least"
