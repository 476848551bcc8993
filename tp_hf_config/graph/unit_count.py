"""How many units of a group may remain: the class's multiples, and a grid that hardware takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm

# a tensor core's kernel takes 8 channels, and runs best with 64 (NVIDIA's guide to matrix products)
MULTIPLES = (64, 32, 16, 8)  # of channels
NEAR = 0.02  # a width moves to one of them by less than this share of the original
NEAR_HEAD_DIM = 1 / 16  # a head dim, whose kernels take multiples of 8 only, by more


@dataclass(frozen=True)
class Grid:
    """Numbers that a width moves to if they are near, in units of its fields.

    Attributes:
        multiples: the largest first; the first that has a number near enough is used.
        near: the largest move, as a share of the original width; 1: only these numbers are left.
        target: the tools that need them, if the user named some.
    """

    multiples: tuple[int, ...] = ()
    near: float = NEAR
    target: str = ""

    @property
    def step(self) -> int:
        """The number that divides every width that is left."""
        return self.multiples[0] if self.near >= 1 and self.multiples else 1

    def nearest(self, wanted: float, fewest: int, units: int, below: int) -> int | None:
        """Return the number near ``wanted``, from ``fewest`` up to, but not, ``below``, if any."""
        for multiple in self.multiples:
            lower = int(wanted // multiple) * multiple
            numbers = [n for n in (lower, lower + multiple) if fewest <= n < below]
            found = min(numbers, key=lambda n: abs(n - wanted), default=None)
            if found is not None and (self.near >= 1 or abs(found - wanted) < self.near * units):
                return found
        return None

    def multiple_of(self, number: int) -> int:
        """Return the largest multiple that a number is of; 1 if of none."""
        return next((multiple for multiple in self.multiples if number % multiple == 0), 1)


EXACT = Grid()  # every number


@dataclass(frozen=True)
class UnitCount:
    """The unit count of one group, and its limits."""

    units: int  # before pruning
    channel_groups: int = 1  # equal runs of units, each of which loses the same number
    multiple: int = 1  # the class accepts only multiples of this
    # (channels, channels per unit) of each side that loses units; limited by ``max_pruning_ratio``
    layers: tuple[tuple[int, int], ...] = ()
    per_field_unit: int = 1  # units per unit of the group's fields
    minimum: int = 1  # fewest units with which the class runs
    run: int = 1  # adjacent channels per unit (a head's); rounding counts channels
    grid: Grid = EXACT  # where widths go without ``round_to``

    def in_multiples_of(self, multiple: int, grid: Grid) -> UnitCount:
        return replace(self, multiple=multiple * self.per_field_unit, grid=grid)

    def step(self, round_to: int | None) -> int:
        """Return the number that divides every later unit count; ``round_to`` counts channels."""
        own = self.grid.step * self.per_field_unit
        if round_to is not None:
            own = multiple_for_round_to(round_to, self.run)
        return lcm(self.channel_groups, self.multiple, own)

    def after(
        self,
        ratios: Sequence[float],  # cumulative shares of ``units``
        round_to: int | None = 1,  # the pruner's, in channels; None: the grid
        max_ratio: float = 1.0,  # the pruner's max_pruning_ratio
    ) -> list[int]:
        now, result = self.units, []
        for ratio in ratios:
            now = self.next(now, ratio, round_to, max_ratio)
            result.append(now)
        return result

    def next(self, now: int, ratio: float, round_to: int | None, max_ratio: float) -> int:
        """Return how many of ``now`` units remain after one step."""
        wanted = int(self.units // self.channel_groups * (1 - ratio)) * self.channel_groups
        if wanted >= now or self.exhausted(now, max_ratio):
            return now
        if round_to is None:
            # by fields, so that all groups of a field end with the same number
            left = self.near(self.units // self.per_field_unit * (1 - ratio), now)
            if left is not None and not self.exhausted(left, max_ratio):
                return left
        return self.rounded(wanted, now, round_to or 1) or now  # a group is never emptied

    def near(self, wanted: float, now: int) -> int | None:
        """Return the count on the grid nearest to ``wanted`` units of the fields, if any is near.

        It is less than ``now``.
        """
        each = self.per_field_unit
        fewest = max(1, -(-self.minimum // each))
        number = self.grid.nearest(wanted, fewest, self.units // each, now // each)
        return None if number is None else number * each

    def rounded(self, wanted: int, now: int, round_to: int) -> int:
        """Return the largest valid count up to ``wanted`` units, but at least the minimum."""
        grid = self.step(round_to)
        wanted = wanted // grid * grid
        if self.minimum > 1 and wanted < self.minimum:
            wanted = min(now, -(-self.minimum // grid) * grid)
        return wanted

    def exhausted(self, now: int, max_ratio: float) -> bool:
        """True if a layer has lost more than ``max_ratio``; the pruner then skips the group."""
        lost = self.units - now
        return any(size - lost * each < size * (1 - max_ratio) for size, each in self.layers)

    def ratio_for(self, kept: int) -> float:
        """Return a ratio that keeps ``kept`` units in one step, with few digits if possible."""
        start, wanted = self.units // self.channel_groups, kept // self.channel_groups
        for digits in (2, 3, 4, 5):
            ratio = round(1 - wanted / start, digits)
            if int(start * (1 - ratio)) == wanted:
                return ratio
        return 1 - (wanted + 0.5) / start


def multiple_for_round_to(round_to: int, run: int) -> int:
    """Return the divisor of a unit count so that ``round_to`` divides ``run`` times that count."""
    return round_to // gcd(round_to, run)


def largest_multiple(sizes: Collection[int]) -> int:
    """Return the largest of 256, 128, 64, 32, 16, 8 and 1 that divides all sizes."""
    return next(n for n in (256, 128, *MULTIPLES, 1) if all(size % n == 0 for size in sizes))
