"""Which units to lose first if the others are refitted after each: greedy optimal brain surgeon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 1e-2  # of channels that others can replace, the cost must not depend on rounding
_AT_ONCE = 16  # channels that go between two updates; fewer gain nothing (design notes)


@dataclass(frozen=True)
class Part:
    """What one consumer reads of the units, and with which weight.

    Attributes:
        gram: the products of its channels, shape ``(channels, channels)``.
        weight: shape ``(outputs, channels)``.
        table: each unit's channels, shape ``(units, channels of a unit)``.
    """

    gram: Tensor
    weight: Tensor
    table: Tensor


class _Remaining:
    """A part while units leave it: its inverse Gram matrix and its weight, refitted so far."""

    def __init__(self, part: Part, ridge: float):
        gram = part.gram.double()
        mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.inverse = torch.linalg.inv(gram + max(ridge, 1e-8) * mean * eye)
        self.weight = part.weight.to(gram)
        self.table = part.table.to(gram.device)

    def costs(self, units: Tensor) -> Tensor:
        """Return what losing each of some units costs in squared error, shape ``(units,)``."""
        table = self.table[units]
        if table.shape[1] == 1:
            channels = table[:, 0]
            squares: Tensor = self.weight[:, channels].square().sum(0)
            cost: Tensor = squares / self.inverse.diagonal()[channels]
            return cost
        blocks = self.inverse[table[:, :, None], table[:, None, :]]
        weights = self.weight[:, table].permute(1, 0, 2)
        solved: Tensor = torch.linalg.solve(blocks, weights.mT)
        return (weights.mT * solved).sum((1, 2))

    def remove(self, units: Tensor) -> None:
        """Let units go: refit the weight, and update the inverse."""
        gone = self.table[units].flatten()
        block = self.inverse[gone][:, gone]
        rows = torch.linalg.solve(block, self.inverse[gone])
        self.weight = self.weight - self.weight[:, gone] @ rows
        self.inverse = self.inverse - self.inverse[:, gone] @ rows


def elimination_order(parts: Sequence[Part], ridge: float = _RIDGE) -> Tensor:
    """Return the order in which units go, shape ``(units,)``: those first that cost least.

    The cost of a unit is the squared error of all parts' outputs on the calibration data, once the
    weights of those that stay are refitted. Some units go at a time, then costs are computed anew.

    Args:
        parts: the consumers of the units, all with the same units.
        ridge: added to the diagonal, relative to its mean.
    """
    remaining = [_Remaining(part, ridge) for part in parts]
    width = max(part.table.shape[1] for part in parts)
    at_once = max(1, _AT_ONCE // width)
    units = torch.arange(len(parts[0].table))
    order: list[Tensor] = []
    while len(units):
        costs = torch.stack([part.costs(units).cpu() for part in remaining]).sum(0)
        leaving = costs.argsort()[: min(at_once, len(units))]
        order.append(units[leaving])
        for part in remaining:
            part.remove(units[leaving])
        stays = torch.ones(len(units), dtype=torch.bool)
        stays[leaving] = False
        units = units[stays]
    return torch.cat(order)
