"""The positions of a group's units along a dimension of a tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class UnitLayout:
    """Where the units of a width are along one tensor dim.

    The dimension consists of ``blocks`` equal blocks, and the units are divided among them. A block
    holds all of its units ``parts`` times, one part after the other. "Gate, then up" is one block
    of two parts. "Query, key and value of head 0, of head 1, ..." is one block per head, of three
    parts. "Value dims of head 0, its key dims, value dims of head 1, ..." has a gap behind every
    part.
    """

    parts: int = 1
    run: int = 1  # neighbouring positions that a unit takes in each part
    blocks: int = 1
    offset: int = 0  # positions before the first unit, which belong to something else
    gap: int = 0  # positions behind every part, which belong to something else

    def positions(self, unit: int, units: int) -> list[int]:
        block, place = divmod(unit, units // self.blocks)
        per_part = units // self.blocks * self.run + self.gap
        start = self.offset + block * self.parts * per_part + place * self.run
        return [start + part * per_part + i for part in range(self.parts) for i in range(self.run)]

    def table(self, units: int) -> Tensor:
        """Return the positions of every unit, shape ``(units, parts * run)``."""
        per_block = units // self.blocks
        per_part = per_block * self.run + self.gap
        unit = torch.arange(units)
        start = unit // per_block * self.parts * per_part + unit % per_block * self.run
        return start[:, None] + torch.tensor(self.positions(0, units))

    def permuted(self, units: int, order: Sequence[int]) -> Tensor:
        """Return the old position of every position's value; ``order``: the unit at each place."""
        table = self.table(units)
        return table[list(order)].flatten()[table.flatten().argsort()]

    @property
    def is_plain(self) -> bool:
        return self == UnitLayout(self.parts, self.run)


@cache
def positions_of(layout: UnitLayout, unit: int, units: int, device: torch.device) -> Tensor:
    return torch.tensor(layout.positions(unit, units), device=device)


def share_positions(layouts: Iterable[tuple[UnitLayout, int]]) -> bool:
    """True if two units take the same position; each layout is given with its number of units."""
    positions = torch.cat([layout.table(units).flatten() for layout, units in layouts])
    return bool(positions.bincount().max() > 1)


@dataclass(frozen=True)
class TensorDim:
    name: str
    dim: int
    layout: UnitLayout = UnitLayout()

    @property
    def layer(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def place(self) -> tuple[str, int]:
        return self.name, self.dim


Places = frozenset[tuple[str, int]]  # parameters and dimensions, without layouts


def places_of(dims: Collection[TensorDim]) -> Places:
    return frozenset(dim.place for dim in dims)


# tensor dims with the same units, the number of units, and the units that are removed
Removed = tuple[Sequence[TensorDim], int, Tensor]


def positions_left(
    shapes: Mapping[str, Sequence[int]], removed: Iterable[Removed]
) -> dict[str, dict[int, Tensor]]:
    """Return name -> dimension -> the positions that remain when units are removed."""
    stays: dict[str, dict[int, Tensor]] = {}
    for dims, units, lost in removed:
        for dim in (dim for dim in dims if dim.name in shapes):  # not encoder states
            every = torch.ones(shapes[dim.name][dim.dim], dtype=torch.bool)
            stay = stays.setdefault(dim.name, {}).setdefault(dim.dim, every)
            stay[dim.layout.table(units)[lost].flatten()] = False
    return {
        name: {axis: stay.nonzero().flatten() for axis, stay in by_axis.items()}
        for name, by_axis in stays.items()
    }
