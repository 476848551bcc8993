"""Name the widths that lose less than their ratio asks for."""

from __future__ import annotations

from ..model.config_json import field_name
from .trajectory import MovingWidth, Trajectory


def shortfalls(trajectory: Trajectory) -> list[str]:
    """Return one line for each width that ends wider than its ratio asks, and why.

    Head counts are left out: ``trajectory.adjusted`` has them.
    """
    result: list[str] = []
    for moving in trajectory.moving_widths if trajectory.units_by_step else ():
        units = moving.unit_counts[0].units
        remaining = trajectory.units_by_step[-1][moving.fields][0]
        ratio = moving.ratio if moving.ratios is None else moving.ratios[-1]
        if not moving.counts_heads and remaining > units * (1 - ratio) + 1e-6:
            field = moving.fields[0]
            value = trajectory.field_map.values[field] * remaining // units
            why = _reason(trajectory, moving, remaining, ratio)
            result.append(f"{field_name(field)} ends at {value}, not at {ratio:g} less: {why}")
    return result


def _reason(trajectory: Trajectory, moving: MovingWidth, remaining: int, ratio: float) -> str:
    """Return why ``remaining`` units of a width stay although its ``ratio`` asks for fewer."""
    unit_count, fewest = moving.unit_counts[0], trajectory.reachable(moving)[0]
    if trajectory.max_ratio < ratio:
        return f"max_pruning_ratio is {trajectory.max_ratio:g}"
    if remaining < unit_count.units:
        return "no less can be left of it"
    if fewest == unit_count.units:
        return f"no smaller multiple of {unit_count.step(trajectory.round_to)} can be left of it"
    most = unit_count.ratio_for(fewest)
    return f"it would leave nothing, and then nothing is pruned; {most:g} leaves the least"
