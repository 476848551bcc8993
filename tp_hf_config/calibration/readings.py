"""What was measured of a model: what the channels that its weights read carry, over all tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .linear_ops import Consumer
from .sources import Chain

TOKENS_PER_CHANNEL = 8  # fewer tell too little for a refit (12,288 tokens for 1,536 channels do)
_TOGETHER = 512  # tokens: a product of fewer costs as much, for the whole Gram matrix is touched
_BLOCKS = 4  # so much of the Gram matrix's lower triangle is left out: it is the upper one's mirror


@dataclass
class InputStatistics:
    """Sums over the tokens that a consumer read.

    Attributes:
        tokens: how many there were.
        total: the sum of each channel, float64, shape ``(channels,)``.
        squares: the sum of each channel's squares, likewise.
        gram: the sum of products of two channels, shape ``(channels, channels)``, in float32 (in
            float64 for a model in float64); ``None`` if it was not asked for.
    """

    tokens: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    gram: Tensor | None = None
    _waiting: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def none_of(cls, channels: int) -> InputStatistics:
        """Return the sums over no token."""
        zeros = torch.zeros(2, channels, dtype=torch.float64)
        return cls(0, zeros[0], zeros[1])

    def add(self, rows: Tensor, with_gram: bool) -> None:
        """Add the tokens in ``rows``, shape ``(tokens, channels)``."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total, squares = rows.sum(0).double().cpu(), rows.square().sum(0).double().cpu()
        if self.tokens:
            total, squares = self.total + total, self.squares + squares
        self.total, self.squares = total, squares
        self.tokens += len(rows)
        if with_gram:
            if self.gram is None:
                self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            # a copy, for what is read may be changed in place
            self._waiting.append(rows.clone())
            if sum(map(len, self._waiting)) >= _TOGETHER:
                self._add_waiting(self.gram)

    def complete(self) -> None:
        """Fill in the lower triangle of the Gram matrix; nothing can be added afterwards."""
        if self.gram is None:
            return
        self._add_waiting(self.gram)
        lower = self.gram.triu_().T.tril(-1)
        self.gram.add_(lower)

    def _add_waiting(self, gram: Tensor) -> None:
        """Add tokens that waited to the upper triangle of the Gram matrix."""
        if self._waiting:
            _add_upper(gram, torch.cat(self._waiting))
            self._waiting = []

    @property
    def is_enough(self) -> bool:
        """True if there are eight tokens for each channel."""
        return self.tokens >= TOKENS_PER_CHANNEL * len(self.total)

    @property
    def norms(self) -> Tensor:
        """The root of each channel's mean square, shape ``(channels,)``."""
        return (self.squares / max(1, self.tokens)).sqrt()

    @property
    def variances(self) -> Tensor:
        """Each channel's variance over the tokens (its fluctuation, FLAP), ``(channels,)``."""
        mean = self.total / max(1, self.tokens)
        return (self.squares / max(1, self.tokens) - mean.square()).clamp_min(0)


def _add_upper(gram: Tensor, rows: Tensor) -> None:
    """Add the products of channels to a Gram matrix, without most of its lower triangle."""
    channels = rows.shape[1]
    step = max(64, -(-channels // _BLOCKS))
    for start in range(0, channels, step):
        block = slice(start, start + step)
        gram[block, start:].addmm_(rows[:, block].T, rows[:, start:])


@dataclass
class Readings:
    """What was measured.

    Attributes:
        statistics: by leader: the first of the consumers that read the same values.
        leaders: consumer -> its leader.
        chains: leader -> the layers from a norm to what it reads; leaders behind none are not here.
        tables: parameters that are tables of embeddings too (tied heads).
    """

    statistics: dict[Consumer, InputStatistics] = field(default_factory=dict)
    leaders: dict[Consumer, Consumer] = field(default_factory=dict)
    chains: dict[Consumer, Chain] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)

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
