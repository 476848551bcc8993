"""Measure what every weight of a model reads: one pass for sums, and for products of channels."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..model.ranks import smallest
from ..model.surroundings import free_memory
from .add_up import added_up
from .batches import Batch
from .linear_ops import Consumer, LinearOp
from .over_ranks import ALONE, Ranks
from .passes import watched_pass
from .readings import Readings
from .sources import Sources
from .statistics import InputStatistics

_REMEMBERED = 4  # inputs: the weights that read the same values do so one right after the other


class Measuring:
    """Adds up what consumers read, in one pass over a model.

    Args:
        sources: finds the norms in front of weights.
        limit: how many bytes the Gram matrices may take together.
        only: the leaders whose Gram matrices are wanted; ``None``: of all that need one.
    """

    def __init__(self, sources: Sources, limit: int, only: Collection[Consumer] | None = None):
        self.readings, self._memory = Readings(), limit
        self._sources, self._limit, self._only = sources, limit, only
        self._grams: set[Consumer] = set()
        self._recent: deque[tuple[Tensor, tuple[Any, ...], Consumer]] = deque(maxlen=_REMEMBERED)
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
        return added_up(readings, self._apart, ranks, self._memory) if ranks.own_data else readings

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
        needed = readings.needs_gram(consumer) if self._only is None else consumer in self._only
        if needed and (size <= self._limit or not self._grams):
            self._grams.add(consumer)
            self._limit -= size

    def _leader(self, op: LinearOp) -> Consumer:
        """Return the consumer that has just read the same values, or the operation's own."""
        place = (*_place(op.inputs), op.inputs.shape[op.axis])
        for _, other, leader in self._recent:
            if other == place:
                return leader
        self._recent.append((op.inputs, place, op.consumer))  # held, so that no other is put there
        return op.consumer


def _place(values: Tensor) -> tuple[Any, ...]:
    """Return what is equal for two views of the same values."""
    pointer = values.untyped_storage().data_ptr()
    return pointer, values.storage_offset(), values.numel(), values._version


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    max_memory: int | None,
    what: str,
    ranks: Ranks = ALONE,
) -> Readings:
    """Return what every weight of a model reads, measured in one pass.

    Args:
        model: the model.
        batches: the data.
        max_memory: how many bytes Gram matrices may take together; ``None``: half of what is free.
            Those that do not fit are measured in further passes, once they are needed.
        what: the title of the progress bar.
        ranks: the ranks that measure, each on batches of its own.

    Raises:
        CalibrationError: the model does not run on the data, or gives numbers that are not finite.
    """
    sources = Sources(model)
    measuring = Measuring(sources, memory_limit(model, max_memory, ranks))
    watched_pass(model, batches, measuring.visit, sources, what=what, ranks=ranks)
    readings = measuring.complete(ranks)
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
    limit = memory_limit(model, max_memory, ranks)
    chosen, left = list[Consumer](), limit
    for leader in leaders:  # chosen now, for ranks meet experts in orders of their own
        size = 4 * len(readings.statistics[leader].total) ** 2
        if size <= left or not chosen:
            chosen.append(leader)
            left -= size
    sources = Sources(model)
    measuring = Measuring(sources, limit, chosen)
    what = "calibrate, another pass"
    watched_pass(model, batches, measuring.visit, sources, what=what, ranks=ranks)
    for leader, measured in measuring.complete(ranks).statistics.items():
        if leader in readings.statistics:
            readings.statistics[leader].gram = measured.gram


def memory_limit(model: nn.Module, max_memory: int | None, ranks: Ranks = ALONE) -> int:
    """Return ``max_memory``, or half of the bytes that are free where the model is.

    Of several ranks it is what each of them has: they have to measure alike.
    """
    if max_memory is not None:
        return max_memory
    free = _half_of_free(model)
    return smallest(free) if ranks.count > 1 else free


def _half_of_free(model: nn.Module) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return free_memory() // 2


def _check_finite(readings: Readings) -> None:
    for consumer, statistics in readings.statistics.items():
        if not torch.isfinite(statistics.squares).all():
            raise CalibrationError(
                f"{consumer.parameter} reads values that are not finite on the calibration data. "
                "Load the model in float32 or bfloat16, and check that it runs on this data"
            )
