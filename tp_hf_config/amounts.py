"""How many units each step of a pruner leaves.  Whole numbers; no torch, no models.

One rule for planning and for pruning: Torch-Pruning's own amounts (``BasePruner._prune``,
base_pruner.py, 1.6.1), rounded to what the class takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, lcm


@dataclass(frozen=True)
class Amount:
    """The units of one group, as far as their number goes.

    Attributes:
        units: how many there are at the start.
        classes: units go in so many equal runs, each of which loses the same number.
        multiple: the class takes only multiples of it.
        layers: for every side of a layer that loses units: its channels, and how many of them one
            unit is. ``max_pruning_ratio`` counts these.
        grain: how many of the units go with one unit of the config's fields.
        least: fewer units, and the class does not run.
        run: how many neighbouring channels a unit is (those of a head): channels are rounded.
    """

    units: int
    classes: int = 1
    multiple: int = 1
    layers: tuple[tuple[int, int], ...] = ()
    grain: int = 1
    least: int = 1
    run: int = 1

    def step(self, round_to: int | None) -> int:
        """What the units that are left are a whole number of times; 1 where nothing rounds."""
        if not round_to:
            return self.classes
        return lcm(self.classes, self.multiple, in_runs(round_to, self.run))

    def after(
        self, ratios: Sequence[float], round_to: int | None = 1, max_ratio: float = 1.0
    ) -> list[int]:
        """The units that are left after each step.

        Args:
            ratios: for each step, the share of the units at the start that shall be gone.
            round_to: the pruner's; without one, nothing is rounded.
            max_ratio: the pruner's ``max_pruning_ratio``.
        """
        now, result = self.units, []
        for ratio in ratios:
            now = self.next(now, ratio, round_to, max_ratio)
            result.append(now)
        return result

    def next(self, now: int, ratio: float, round_to: int | None, max_ratio: float) -> int:
        """The units that are left of ``now`` after a step."""
        wanted = int(self.units // self.classes * (1 - ratio)) * self.classes
        if wanted >= now or self.exhausted(now, max_ratio):
            return now
        if round_to:
            multiple = per_class(self.multiple, in_runs(round_to, self.run), self.classes)
            wanted = multiple_below(wanted // self.classes, multiple) * self.classes
        if self.least > 1 and wanted < self.least:
            grid = self.step(round_to)
            wanted = min(now, -(-self.least // grid) * grid)
        return wanted or now  # no group is emptied: it is passed over

    def exhausted(self, now: int, max_ratio: float) -> bool:
        """Whether a layer has lost as much as it may; the group is passed over then."""
        gone = self.units - now
        left = [(size, size - gone * channels) for size, channels in self.layers]
        return any(size < start * (1 - max_ratio) for start, size in left)

    def ratio_for(self, kept: int, nearest: bool = False) -> float:
        """A ratio, of few digits where one will do, that leaves ``kept`` units in one step.

        ``nearest``: the number that is nearest to what is asked for is kept (heads).
        """
        start, wanted = self.units // self.classes, kept // self.classes
        for digits in (2, 3, 4, 5):
            ratio = round(1 - wanted / start, digits)
            left = start * (1 - ratio)
            if (round(left) if nearest else int(left)) == wanted:
                return ratio
        return 1 - wanted / start if nearest else 1 - (wanted + 0.5) / start


def in_runs(round_to: int, run: int) -> int:
    """What units of so many channels have to be a multiple of, for the channels to be."""
    return round_to // gcd(round_to, run)


def per_class(multiple: int, round_to: int, classes: int) -> int:
    """What the units of each class have to be a multiple of, so that all of them together are."""
    together = lcm(multiple, round_to)
    return together // gcd(together, classes)


def multiple_below(kept: int, multiple: int) -> int:
    """The next multiple at or below."""
    return kept // multiple * multiple
