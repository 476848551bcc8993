"""Find legal widths for a model of a given size.

All widths get one ratio, with only as many exceptions as the class forces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from ..model.build import Refusal
from ..model.config_json import field_name
from .model_size import ParameterCount
from .trajectory import MovingWidth, Trajectory

# bisection steps; ratios to try with the class; digits of a short ratio
_HALVINGS, _TRIES, _DIGITS = 40, 32, (2, 3, 4, 5, 6)


def trajectory_to(
    trajectory: Trajectory, moving_widths: Sequence[MovingWidth], count: ParameterCount, target: int
) -> Trajectory:
    """Return the trajectory of the smallest ratio that leaves ``target`` parameters at most.

    If the class refuses the widths of that ratio, the nearest that it accepts are taken; if those
    do not fit either, the next larger ratios are tried.

    Args:
        trajectory: all widths that are pruned, with their ratios so far.
        moving_widths: those of them that get the common ratio.
        count: counts the model's parameters.
        target: how many parameters may be left.

    Raises:
        ValueError: no ratio leaves so few parameters, or the class accepts nothing near it.
    """

    def at(ratio: float) -> Trajectory:
        return trajectory.at({moving.fields: ratio for moving in moving_widths})

    def parameters(trajectory: Trajectory) -> int:
        return count.at(trajectory.steps()[-1])

    # above this ratio, some width would lose all units, and the pruner passes over it instead
    highest = min((_highest(trajectory, moving) for moving in moving_widths), default=0.0)
    if parameters(at(highest)) > target:
        names = ", ".join(moving.name for moving in moving_widths) or "no width"
        raise ValueError(
            f"target_params={target:,}: one ratio for {names} leaves at least "
            f"{parameters(at(highest)):,} of {count.at({}):,} parameters. Prune more widths "
            "(prune=), or set ratios= for each."
        )
    low, high = (0.0, highest) if parameters(at(0.0)) > target else (0.0, 0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if parameters(at(middle)) <= target else (middle, high)
    ratio = _short(at(high), moving_widths, high)
    for larger in _ratios(at(ratio), moving_widths, ratio, highest):
        common = at(larger)
        fitting = [
            option
            for option in ([common] if common.accepted() else common.nearest())
            if parameters(option) <= target and _one_head_ratio(option, moving_widths)
        ]
        if fitting:
            return max(fitting, key=parameters)
    raise ValueError(
        f"target_params={target:,}: the class takes no widths near one ratio of {high:.3f}. Set "
        "ratios= for each, or leave one out (prune=)."
    )


def target_missed(
    trajectory: Trajectory, moving_widths: Sequence[MovingWidth], count: ParameterCount, target: int
) -> Refusal | None:
    """Return why a trajectory leaves fewer parameters than the target; ``None``: it does not.

    If some width could keep more units without passing the target, the text names it with the
    ratio that does so. Otherwise it names the one that would come nearest above the target.
    """
    reached = count.at(trajectory.steps()[-1])
    if reached == target:
        return None
    wider = []
    for moving in moving_widths:
        reachable = trajectory.reachable(moving)
        more = trajectory.units(moving)[0][-1] + reachable.step
        if moving.clamped or more > reachable[-1]:  # heads have one ratio
            continue
        ratio = moving.unit_counts[0].ratio_for(more, moving.counts_heads)
        other = trajectory.at({moving.fields: ratio})
        values = other.steps()[-1]
        if other.accepted() and count.at(values) > reached:
            text = ", ".join(f"{field_name(field)} {values[field]:,}" for field in moving.fields)
            wider.append((count.at(values), text, f"{field_name(moving.fields[0])}={ratio:g}"))
    fewer = f"{target - reached:,} fewer, as units are whole"
    within = max((candidate for candidate in wider if candidate[0] <= target), default=None)
    if within is not None:
        return Refusal(
            f"{fewer} and one ratio holds for all: {within[1]} alone would leave {within[0]:,} "
            f"(a ratio of its own: {within[2]})"
        )
    above = min(wider, default=None)
    if above is None:
        return Refusal(fewer)
    return Refusal(f"{fewer}: {above[1]} would already leave {above[0]:,}")


def _one_head_ratio(trajectory: Trajectory, moving_widths: Sequence[MovingWidth]) -> bool:
    """True if all heads that the target decides have the same ratio: a pruner has only one."""
    heads = {moving.fields for moving in moving_widths if moving.clamped}
    return len({moving.ratio for moving in trajectory.moving_widths if moving.fields in heads}) < 2


def _highest(trajectory: Trajectory, moving: MovingWidth) -> float:
    """Return the largest ratio that a width can follow."""
    fewest = trajectory.reachable(moving)[0]
    if moving.counts_heads or fewest == moving.unit_counts[0].units:
        return 1.0
    return moving.unit_counts[0].ratio_for(fewest)


def _ratios(
    trajectory: Trajectory, moving_widths: Sequence[MovingWidth], ratio: float, highest: float
) -> Iterator[float]:
    """Yield the common ratio, then the next larger ones at which some width changes."""
    for _ in range(_TRIES):
        yield ratio
        following: list[float] = []
        for moving in moving_widths:
            end = trajectory.at({moving.fields: ratio}).units(moving)[0][-1]
            reachable = trajectory.reachable(moving)
            if end > reachable[0]:
                count, fewer = moving.unit_counts[0], end - reachable.step
                following.append(count.ratio_for(fewer, moving.counts_heads))
        larger = [other for other in following if ratio < other <= highest]
        if not larger:
            return
        ratio = min(larger)


def _short(trajectory: Trajectory, moving_widths: Sequence[MovingWidth], ratio: float) -> float:
    """Return a ratio of few digits that leads to the same widths; ``ratio`` if there is none."""
    for digits in _DIGITS:
        rounded: float = ceil(ratio * 10**digits) / 10**digits
        other = trajectory.at({moving.fields: rounded for moving in moving_widths})
        if rounded <= 1 and other.steps() == trajectory.steps():
            return rounded
    return ratio
