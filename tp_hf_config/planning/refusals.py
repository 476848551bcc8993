"""Say in words what a plan cannot do, and where it does less than its ratios ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..model.config_json import FieldPath, field_name
from .trajectory import Adjusted, MovingWidth, Trajectory


@dataclass(frozen=True)
class PlannedRefusal:
    """Field values that the class refuses, and settings near them that it accepts.

    Attributes:
        step: the step that leads to them, counted from 1.
        values: field -> value after that step, for the fields that differ from now.
        reason: the class's own words, or ours.
        nearest: accepted settings, each as field -> ratio and field -> the value it leads to.
    """

    step: int
    values: dict[str, int]
    reason: str
    nearest: tuple[tuple[dict[str, float], dict[str, int]], ...]


def refusal_lines(refusal: PlannedRefusal) -> list[str]:
    """Return lines of text: what is refused and why, then what the class accepts instead."""
    values = ", ".join(f"{name} {value}" for name, value in refusal.values.items())
    lines = [f"refused at step {refusal.step} ({values}): {refusal.reason.rstrip('.')}."]
    for ratios, leads_to in refusal.nearest:
        settings = ", ".join(f'"{name}": {ratio:g}' for name, ratio in ratios.items())
        values = ", ".join(f"{name} {value}" for name, value in leads_to.items())
        lines.append(f"  taken: ratios={{{settings}}} ({values})")
    if not refusal.nearest:
        lines.append("  no settings near them are taken: change one ratio at a time")
    return lines


def adjusted_line(adjusted: Adjusted) -> str:
    """Return one line: what the ratios ask for, why it is refused, and what is done instead."""
    requested = ", ".join(f"{field_name(f)} {value:.4g}" for f, value in adjusted.requested.items())
    accepted = ", ".join(f"{field_name(f)} {value}" for f, value in adjusted.accepted.items())
    reason = f" ({adjusted.reason.rstrip('.')})" if adjusted.reason else ""
    return (
        f"step {adjusted.step}: the ratios ask for {requested}{reason}; nearest legal: {accepted}"
    )


def by_name(values: Mapping[FieldPath, int]) -> dict[str, int]:
    """Return the values by field name."""
    return {field_name(field): value for field, value in values.items()}


def planned_refusal(trajectory: Trajectory) -> PlannedRefusal | None:
    """Return the first step that the class refuses, with ratios that it accepts, or ``None``."""
    refused = trajectory.first_refused()
    if refused is None:
        return None
    nearest = [
        (
            {field_name(moving.fields[0]): moving.ratio for moving in other.moving_widths},
            by_name(other.steps()[-1]),
        )
        for other in trajectory.nearest()
    ]
    return PlannedRefusal(refused.step, by_name(refused.values), refused.reason, tuple(nearest))


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
            why = _why_wider(trajectory, moving, remaining, ratio)
            result.append(f"{field_name(field)} ends at {value}, not at {ratio:g} less: {why}")
    return result


def _why_wider(trajectory: Trajectory, moving: MovingWidth, remaining: int, ratio: float) -> str:
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
