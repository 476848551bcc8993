"""What was measured of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from .linear_ops import Consumer
from .sources import Chain
from .statistics import InputStatistics


@dataclass
class Readings:
    """What was measured.

    Attributes:
        statistics: by leader: the first of the consumers that read the same values.
        leaders: consumer -> its leader.
        chains: leader -> the layers from a norm to what it reads; leaders behind none are not here.
        tables: parameters that are tables of embeddings too (tied heads).
        in_lockstep: False if batches that go through the model layer by layer would be added up in
            another order than one after the other.
    """

    statistics: dict[Consumer, InputStatistics] = field(default_factory=dict)
    leaders: dict[Consumer, Consumer] = field(default_factory=dict)
    chains: dict[Consumer, Chain] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    in_lockstep: bool = True

    def of(self, consumer: Consumer) -> InputStatistics | None:
        """Return what a consumer reads; ``None`` if it read nothing."""
        leader = self.leaders.get(consumer)
        return None if leader is None else self.statistics.get(leader)

    def by_place(self) -> dict[tuple[str, int], list[Consumer]]:
        """Return (parameter, dimension) -> its consumers: one, or one for each expert."""
        places: dict[tuple[str, int], list[Consumer]] = {}
        for consumer in self.leaders:
            places.setdefault((consumer.parameter, consumer.dim), []).append(consumer)
        return places

    def needs_gram(self, leader: Consumer) -> bool:
        """True if a refit needs the Gram matrix of what a leader reads.

        Behind a norm it needs another pass instead, and a table of embeddings stays as it is.
        """
        return leader not in self.chains and leader.parameter not in self.tables
