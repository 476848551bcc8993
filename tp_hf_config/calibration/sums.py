"""Sums of products over the batches of a pass, in temporary files where memory is short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoint.scratch import on_disk
from ..model.lazy_tensor import LazyTensor, values_of
from .linear_ops import Consumer
from .over_ranks import Ranks


class Sums:
    """Adds up matrices by consumer.

    ``limit``: how many bytes of memory they may take; ``None``: all of them have room.
    """

    def __init__(self, limit: int | None):
        self._limit = limit
        self._matrices: dict[Consumer, list[Tensor]] = {}

    def add(self, consumer: Consumer, products: Sequence[Tensor]) -> None:
        """Add a consumer's products of one batch."""
        self._make_room(consumer, sum(each.nbytes for each in products))
        before = self._matrices.get(consumer)
        pairs = zip(products, before or products, strict=True)
        self._matrices[consumer] = [a if before is None else b + a for a, b in pairs]

    def of(self, consumer: Consumer) -> list[Tensor] | None:
        """Return a consumer's sums, in memory; ``None``: there was nothing to add."""
        found = self._matrices.get(consumer)
        return None if found is None else [*map(values_of, found)]

    def to_disk(self) -> None:
        """Put the sums into temporary files, once a layer is done or where others need memory."""
        for consumer, matrices in self._matrices.items():
            if not isinstance(matrices[0], LazyTensor):
                self._matrices[consumer] = [*map(on_disk, matrices)]

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

    def _make_room(self, consumer: Consumer, size: int) -> None:
        """Put what is in memory into temporary files if a consumer's sums have no room beside it.

        One layer may have hundreds of experts.
        """
        own = self._matrices.get(consumer)
        if self._limit is None or (own is not None and not isinstance(own[0], LazyTensor)):
            return
        matrices = (each for sums in self._matrices.values() for each in sums)
        if sum(m.nbytes for m in matrices if not isinstance(m, LazyTensor)) + size > self._limit:
            self.to_disk()
