"""How much a model's answers change as one layer's width goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import lcm

from ..graph.unit_count import multiple_for_round_to


@dataclass(frozen=True)
class LayerCurve:
    """How much the model's answers change as one layer's width goes.

    Attributes:
        field: the layer's own field.
        units: how many units it has now.
        parameters: how many parameters one of them holds.
        changes: the share of the units that goes -> the change of the model's output.
        multiple: the class takes only multiples of so many units.
        minimum: the fewest units with which the class runs.
        run: neighbouring channels per unit (those of a head).
    """

    field: str
    units: int
    parameters: int
    changes: Mapping[float, float]
    multiple: int = 1
    minimum: int = 1
    run: int = 1

    def sizes(self, round_to: int) -> list[int]:
        """Return the numbers of units that may be left, from all on down, 64 of them or so.

        Multiples of ``round_to`` channels that the class takes; no more goes than was tried.
        """
        grid = lcm(self.multiple, multiple_for_round_to(round_to, self.run))
        step = max(grid, self.units // 64 // grid * grid)
        least = max(int(self.units * (1 - max(self.changes))), self.minimum)
        return [self.units, *range((self.units - 1) // step * step, least - 1, -step)]

    def change_at(self, share: float) -> float:
        """Return the change at any share: its square root is interpolated, from 0 at share 0."""
        points = [(0.0, 0.0), *((s, max(0.0, c) ** 0.5) for s, c in sorted(self.changes.items()))]
        for (low, first), (high, last) in pairwise(points):
            if share <= high or high == points[-1][0]:
                return float((first + (last - first) * (share - low) / (high - low)) ** 2)
        return 0.0
