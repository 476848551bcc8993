"""Add up what ranks have measured, each on data of its own: as if one had seen all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch

from .linear_ops import Consumer
from .over_ranks import Ranks
from .readings import InputStatistics, Readings


@dataclass(frozen=True)
class _Outline:
    """What a rank has measured, without its sums.

    Attributes:
        readings: what was measured, without sums.
        apart: consumers that read now with one leader, now with another.
        channels: leader -> how many channels it reads.
        grams: leader -> the dtype of its Gram matrix, where there is one.
    """

    readings: Readings
    apart: Set[Consumer]
    channels: Mapping[Consumer, int]
    grams: Mapping[Consumer, torch.dtype]


def added_up(own: Readings, apart: Set[Consumer], ranks: Ranks, limit: int) -> Readings:
    """Return the readings of all ranks' data, in the order of the ranks.

    Args:
        own: the readings of this rank; their sums are used up.
        apart: the consumers of this rank that read now with one leader, now with another.
        ranks: the ranks; all have to call this.
        limit: how many bytes the Gram matrices may take together. Those that do not fit, or that a
            rank had no memory for, are left to another pass.
    """
    outlines = ranks.gathered(_outline_of(own, apart))
    merged, channels = _merged(outlines)
    for leader, size in channels.items():
        seen_by = [outline for outline in outlines if leader in outline.channels]
        dtype = seen_by[0].grams.get(leader)
        has_any = any(statistics.gram is not None for statistics in merged.statistics.values())
        needed = 4 * size**2
        if any(leader not in o.grams for o in seen_by) or (needed > limit and has_any):
            dtype = None
        limit -= 0 if dtype is None else needed
        statistics = own.statistics.pop(leader, None) or InputStatistics.none_of(size)
        merged.statistics[leader] = _summed(statistics, dtype, ranks)
    return merged


def _outline_of(own: Readings, apart: Set[Consumer]) -> _Outline:
    channels = {leader: len(statistics.total) for leader, statistics in own.statistics.items()}
    grams = {
        leader: statistics.gram.dtype
        for leader, statistics in own.statistics.items()
        if statistics.gram is not None
    }
    return _Outline(replace(own, statistics={}), apart, channels, grams)


def _merged(outlines: Sequence[_Outline]) -> tuple[Readings, dict[Consumer, int]]:
    """Return readings without sums, and leader -> its channels; the first rank's word counts."""
    merged, channels = Readings(), dict[Consumer, int]()
    apart: set[Consumer] = set()
    for outline in outlines:
        apart |= outline.apart
        merged.tables |= outline.readings.tables
        for consumer, leader in outline.readings.leaders.items():
            if merged.leaders.setdefault(consumer, leader) != leader:
                apart.add(consumer)
        for leader, size in outline.channels.items():
            if leader not in channels and leader in outline.readings.chains:
                merged.chains[leader] = outline.readings.chains[leader]
            channels.setdefault(leader, size)
    for consumer in apart:
        merged.leaders.pop(consumer, None)
    return merged, channels


def _summed(own: InputStatistics, dtype: torch.dtype | None, ranks: Ranks) -> InputStatistics:
    """Return one input's sums over all ranks, with a Gram matrix if a dtype is given."""
    size = len(own.total)
    tokens = torch.tensor([own.tokens], dtype=torch.float64)
    sums = ranks.summed(torch.cat([own.total, own.squares, tokens]))
    gram = None
    if dtype is not None:
        gram = torch.zeros(size, size, dtype=dtype, device=ranks.device)
        gram = ranks.summed(gram if own.gram is None else own.gram)
    return InputStatistics(int(sums[-1]), sums[:size].clone(), sums[size:-1].clone(), gram)
