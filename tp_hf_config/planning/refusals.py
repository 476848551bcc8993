"""Say in words what a plan cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model.config_json import FieldPath, field_name
from .trajectory import Adjusted, Trajectory


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

    def to_dict(self) -> dict[str, Any]:
        """Return the refusal as a dict for ``json.dumps``."""
        return {
            **vars(self),
            "nearest": [{"ratios": ratios, "values": values} for ratios, values in self.nearest],
        }


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
