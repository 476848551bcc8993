"""Measure what every weight of a model reads: one pass for sums, and for products of channels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError
from .add_up import added_up
from .batches import Batch
from .linear_ops import Consumer, LinearOp
from .over_ranks import ALONE, Ranks
from .passes import memory_limit, watched_pass
from .readings import InputStatistics, Readings
from .sources import Sources, use_of

_REMEMBERED = 4  # inputs: the weights that read the same values do so one right after the other
_Read = tuple[tuple[Any, ...], Callable[[], bool], Consumer]
"""Where values lay that a weight read, whether they still do, and that weight's leader."""


class Measuring:
    """Adds up what consumers read, in one pass over a model.

    Args:
        sources: finds the norms in front of weights.
        limit: how many bytes the Gram matrices may take together.
        only: the leaders whose Gram matrices are wanted; ``None``: of all that need one.
    """

    def __init__(self, sources: Sources, limit: int, only: Collection[Consumer] | None = None):
        self.readings = Readings()
        self._sources, self._limit, self._only = sources, limit, only
        self._grams: dict[Consumer, int] = {}  # their bytes
        self._recent: deque[_Read] = deque(maxlen=_REMEMBERED)
        self._apart: set[Consumer] = set()

    def visit(self, op: LinearOp) -> Any:
        """Add what an operation reads."""
        leader = self._leader(op)
        readings = self.readings
        if readings.leaders.setdefault(op.consumer, leader) != leader:
            self._apart.add(op.consumer)  # it reads now with these, now with those
        if leader == op.consumer:
            if leader not in readings.statistics:
                self._begin(op)
            readings.statistics[leader].add(op.channels_last(), leader in self._grams)
        return op.run()

    def complete(self, ranks: Ranks) -> Readings:
        """Return what was measured, by all ranks."""
        readings = self.readings
        for consumer in self._apart:
            readings.leaders.pop(consumer, None)
        for statistics in readings.statistics.values():
            statistics.complete()
        return added_up(readings, self._apart, ranks, self._limit) if ranks.own_data else readings

    def _begin(self, op: LinearOp) -> None:
        """Look at what is in front of a consumer that is seen for the first time."""
        readings, consumer = self.readings, op.consumer
        readings.statistics[consumer] = InputStatistics()
        chain = self._sources.chain_of(op.inputs, op.axis)
        if chain:
            readings.chains[consumer] = chain
        if op.is_table:
            readings.tables.add(consumer.parameter)
        size = 4 * op.inputs.shape[op.axis] ** 2
        wanted = readings.needs_gram(consumer) if self._only is None else consumer in self._only
        if wanted and (not self._grams or sum(self._grams.values()) + size <= self._limit):
            self._grams[consumer] = size

    def _leader(self, op: LinearOp) -> Consumer:
        """Return the consumer that has just read the same values, or the operation's own."""
        inputs = op.inputs
        storage = inputs.untyped_storage().data_ptr(), inputs.storage_offset(), inputs._version
        place = (*storage, inputs.numel(), inputs.shape[op.axis])  # equal for views of one tensor
        for other, in_use, leader in self._recent:
            if other == place and in_use():  # else other values are there now
                return leader
        self._recent.append((place, use_of(inputs), op.consumer))
        return op.consumer


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    max_memory: int | None,
    what: str,
    ranks: Ranks = ALONE,
    grams: bool = True,
) -> Readings:
    """Return what every weight of a model reads, measured in one pass.

    Args:
        model: the model.
        batches: the data.
        max_memory: how many bytes Gram matrices may take together; ``None``: half of what is free.
            Those that do not fit are measured in further passes, once they are needed.
        what: the title of the progress bar.
        ranks: the ranks that measure, each on batches of its own.
        grams: False: no Gram matrix is measured; :func:`add_grams` does it later.

    Raises:
        CalibrationError: the model does not run on the data, or gives numbers that are not finite.
    """
    only = None if grams else ()
    readings = _measured(model, batches, max_memory, what, ranks, only)
    if not readings.statistics:
        raise CalibrationError(
            f"{type(model).__name__} has no layer whose inputs can be measured (linear layers, "
            "convolutions, experts)"
        )
    _check_finite(readings)
    return readings


def add_grams(
    model: nn.Module,
    batches: Sequence[Batch],
    readings: Readings,
    leaders: Collection[Consumer],
    max_memory: int | None,
    ranks: Ranks = ALONE,
) -> None:
    """Measure Gram matrices in another pass, in the place of those that there were.

    As many of the leaders get theirs as ``max_memory`` allows, at least the first.
    """
    for statistics in readings.statistics.values():
        statistics.gram = None
    if ranks.count > 1:  # chosen now, for ranks meet experts in orders of their own
        leaders = _that_fit(readings, leaders, memory_limit(model, max_memory, ranks))
    what = "calibrate, another pass"
    again = _measured(model, batches, max_memory, what, ranks, leaders)
    for leader, measured in again.statistics.items():
        if leader in readings.statistics:
            readings.statistics[leader].gram = measured.gram


def _that_fit(readings: Readings, leaders: Collection[Consumer], limit: int) -> list[Consumer]:
    """Return leaders whose Gram matrices memory has room for, one at least."""
    chosen: list[Consumer] = []
    for leader in leaders:
        size = 4 * len(readings.statistics[leader].total) ** 2
        if size <= limit or not chosen:
            chosen.append(leader)
            limit -= size
    return chosen


def _measured(
    model: nn.Module,
    batches: Sequence[Batch],
    max_memory: int | None,
    what: str,
    ranks: Ranks,
    only: Collection[Consumer] | None = None,
) -> Readings:
    """Return what is measured in one pass."""
    sources = Sources(model)
    measuring = Measuring(sources, memory_limit(model, max_memory, ranks), only)
    watched_pass(model, batches, measuring.visit, sources, what=what, ranks=ranks)
    return measuring.complete(ranks)


def _check_finite(readings: Readings) -> None:
    for consumer, statistics in readings.statistics.items():
        if not torch.isfinite(statistics.squares).all():
            raise CalibrationError(
                f"{consumer.parameter} reads values that are not finite on the calibration data. "
                "Load the model in float32 or bfloat16, and check that it runs on this data"
            )
