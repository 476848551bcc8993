"""Sums of products over the batches of a pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .linear_ops import Consumer
from .over_ranks import Ranks


class Sums:
    """Adds up matrices by consumer."""

    def __init__(self) -> None:
        self._matrices: dict[Consumer, list[Tensor]] = {}

    def add(self, consumer: Consumer, products: Sequence[Tensor]) -> None:
        """Add a consumer's products of one batch."""
        before = self._matrices.get(consumer)
        pairs = zip(products, before or products, strict=True)
        self._matrices[consumer] = [a if before is None else b + a for a, b in pairs]

    def of(self, consumer: Consumer) -> list[Tensor] | None:
        """Return a consumer's sums; ``None``: there was nothing to add."""
        return self._matrices.get(consumer)

    def over_ranks(
        self, ranks: Ranks, shapes: Mapping[Consumer, Iterable[tuple[int, int]]]
    ) -> None:
        """Add up the sums of all ranks, in the order of ``shapes``."""
        seen = ranks.gathered({of: sums[0].dtype for of, sums in self._matrices.items()})
        for consumer, sizes in shapes.items():
            dtypes = [dtypes[consumer] for dtypes in seen if consumer in dtypes]
            if dtypes:
                zeros = (torch.zeros(size, dtype=dtypes[0], device=ranks.device) for size in sizes)
                own = self._matrices.get(consumer) or [*zeros]
                self._matrices[consumer] = [*map(ranks.summed, own)]
