"""How many units each step of a pruner leaves. Whole numbers; no torch, no models.

Planning and pruning share this rule: Torch-Pruning's own amounts (``BasePruner._prune``,
base_pruner.py, 1.6.1), rounded to what the class takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm


@dataclass(frozen=True)
class UnitCount:
    """The unit count of one group, and what restricts it.

    Attributes:
        units: units before pruning.
        channel_groups: the units are in so many equal runs, each of which loses the same number.
        multiple: the class takes only multiples of so many units.
        layers: for every side of a layer that loses units, the number of its channels, and channels
            per unit. ``max_pruning_ratio`` counts these.
        per_field_unit: units per unit of the group's fields.
        minimum: the fewest units with which the class runs.
        run: neighbouring channels per unit (those of a head): rounding counts channels.
    """

    units: int
    channel_groups: int = 1
    multiple: int = 1
    layers: tuple[tuple[int, int], ...] = ()
    per_field_unit: int = 1
    minimum: int = 1
    run: int = 1

    def in_multiples_of(self, multiple: int) -> UnitCount:
        """Return the same count, for fields that have to be a multiple of ``multiple``."""
        return replace(self, multiple=multiple * self.per_field_unit)

    def step(self, round_to: int | None) -> int:
        """Return the number that every later unit count is a multiple of.

        ``round_to`` is the pruner's, in channels; without one, nothing is rounded.
        """
        if not round_to:
            return self.channel_groups
        return lcm(self.channel_groups, self.multiple, multiple_for_round_to(round_to, self.run))

    def after(
        self, ratios: Sequence[float], round_to: int | None = 1, max_ratio: float = 1.0
    ) -> list[int]:
        """Return the unit count after each step.

        ``ratios`` are the shares of the units before pruning that have to be gone; ``round_to``, in
        channels, and ``max_ratio`` (``max_pruning_ratio``) are the pruner's.
        """
        now, result = self.units, []
        for ratio in ratios:
            now = self.next(now, ratio, round_to, max_ratio)
            result.append(now)
        return result

    def next(self, now: int, ratio: float, round_to: int | None, max_ratio: float) -> int:
        """Return the units that one step leaves of ``now`` units; arguments as in :meth:`after`."""
        wanted = int(self.units // self.channel_groups * (1 - ratio)) * self.channel_groups
        if wanted >= now or self.exhausted(now, max_ratio):
            return now
        return self.rounded(wanted, now, round_to) or now  # what would be emptied is skipped

    def rounded(self, wanted: int, now: int, round_to: int | None) -> int:
        """Return the most units up to ``wanted`` that may be left, at least the minimum.

        ``now``: the units that there are; ``round_to`` as in :meth:`after`.
        """
        if round_to:
            multiple = per_channel_group(
                self.multiple, multiple_for_round_to(round_to, self.run), self.channel_groups
            )
            wanted = multiple_below(wanted // self.channel_groups, multiple) * self.channel_groups
        if self.minimum > 1 and wanted < self.minimum:
            grid = self.step(round_to)
            wanted = min(now, -(-self.minimum // grid) * grid)
        return wanted

    def exhausted(self, now: int, max_ratio: float) -> bool:
        """True if a layer has already lost as much as it may; the pruner then skips the group."""
        gone = self.units - now
        sizes = [(size, size - gone * channels) for size, channels in self.layers]
        return any(size < start * (1 - max_ratio) for start, size in sizes)

    def ratio_for(self, kept: int, nearest: bool = False) -> float:
        """Return a ratio that leaves ``kept`` units in one step, with few digits if possible.

        With ``nearest``, the pruner leaves the nearest whole number (heads), not the one below.
        """
        start, wanted = self.units // self.channel_groups, kept // self.channel_groups
        for digits in (2, 3, 4, 5):
            ratio = round(1 - wanted / start, digits)
            remaining = start * (1 - ratio)
            if (round(remaining) if nearest else int(remaining)) == wanted:
                return ratio
        return 1 - wanted / start if nearest else 1 - (wanted + 0.5) / start


def multiple_for_round_to(round_to: int, run: int) -> int:
    """Return what a unit count has to be a multiple of, so that ``round_to`` divides the channels.

    Args:
        round_to: what the number of channels has to be a multiple of.
        run: channels per unit.
    """
    return round_to // gcd(round_to, run)


def per_channel_group(multiple: int, round_to: int, channel_groups: int) -> int:
    """Return what the units of each channel group have to be a multiple of.

    All channel groups together are then a multiple of both ``multiple`` and ``round_to``.
    """
    together = lcm(multiple, round_to)
    return together // gcd(together, channel_groups)


def multiple_below(kept: int, multiple: int) -> int:
    """Return the largest multiple of ``multiple`` that is at most ``kept``."""
    return kept // multiple * multiple
