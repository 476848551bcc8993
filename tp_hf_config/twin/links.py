"""What a twin test shows: which tensor dims are linked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .layout import TensorDim


@dataclass(frozen=True)
class Links:
    """What a twin test shows.

    Attributes:
        groups: tensor dims that belong together.
        unequal: tensor dims in which the two units are told apart.
        unobserved: tensor dims without a gradient, so that where they belong cannot be seen.
    """

    groups: tuple[tuple[TensorDim, ...], ...]
    unequal: tuple[TensorDim, ...]
    unobserved: tuple[TensorDim, ...]


def merged(groups: Sequence[set[TensorDim]], added: set[TensorDim]) -> list[set[TensorDim]]:
    """Return the groups with one more, which takes in all that share a tensor dim with it."""
    overlapping = [group for group in groups if group & added]
    return [*(group for group in groups if not group & added), added.union(*overlapping)]
