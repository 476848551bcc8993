"""How much a model's answers change as one layer's width goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class LayerCurve:
    """How much the model's answers change as one layer's width goes.

    Attributes:
        field: the layer's own field.
        units: how many units it has now.
        parameters: how many parameters one of them holds.
        changes: the share of the units that goes -> the change of the model's output.
    """

    field: str
    units: int
    parameters: int
    changes: Mapping[float, float]

    def change_at(self, share: float) -> float:
        """Return the change at any share: its square root is interpolated, from 0 at share 0."""
        points = [(0.0, 0.0), *((s, max(0.0, c) ** 0.5) for s, c in sorted(self.changes.items()))]
        for (low, first), (high, last) in pairwise(points):
            if share <= high or high == points[-1][0]:
                return float((first + (last - first) * (share - low) / (high - low)) ** 2)
        return 0.0
