"""Sums over all tokens of what the channels carry that a model's weights read."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .linear_ops import Consumer, Contribution
from .passes import Ranks
from .sources import Chain

TOKENS_PER_CHANNEL = 8  # refits need as many (12,288 tokens for 1,536 channels are enough)
_TOGETHER = 512  # tokens in a product; fewer cost as much: the whole Gram matrix is touched
_BLOCKS = 4  # block rows of a Gram matrix; blocks below the diagonal are mirrored


@dataclass
class InputStatistics:
    """Sums over the tokens that a consumer read."""

    tokens: int = 0  # how many
    total: Tensor = field(default_factory=lambda: torch.zeros(0))  # sum of each channel, float64
    # sum of each channel's squares, float64
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    # Sums of products of two channels, ``(channels, channels)``, in float32 (float64 for a float64
    # model); None: not measured.
    gram: Tensor | None = None
    _waiting: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def none_of(cls, channels: int) -> InputStatistics:
        zeros = torch.zeros(2, channels, dtype=torch.float64)
        return cls(0, zeros[0], zeros[1])

    def add(self, rows: Tensor, with_gram: bool) -> None:
        """Add tokens, shape ``(tokens, channels)``."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total, squares = rows.sum(0).double().cpu(), rows.square().sum(0).double().cpu()
        if self.tokens:
            total, squares = self.total + total, self.squares + squares
        self.total, self.squares = total, squares
        self.tokens += len(rows)
        if with_gram:
            if self.gram is None:
                self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
            # a copy, because the model may change its activations in place
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
        if self._waiting:
            _add_upper(gram, torch.cat(self._waiting))
            self._waiting = []

    @property
    def is_enough(self) -> bool:
        return self.tokens >= TOKENS_PER_CHANNEL * len(self.total)

    @property
    def norms(self) -> Tensor:
        """Each channel's root mean square."""
        return (self.squares / max(1, self.tokens)).sqrt()

    @property
    def variances(self) -> Tensor:
        """Each channel's variance over the tokens (FLAP's fluctuation)."""
        mean = self.total / max(1, self.tokens)
        return (self.squares / max(1, self.tokens) - mean.square()).clamp_min(0)


def _add_upper(gram: Tensor, rows: Tensor) -> None:
    """Add ``rowsᵀ rows`` to a Gram matrix, except for the blocks below the diagonal."""
    channels = rows.shape[1]
    step = max(64, -(-channels // _BLOCKS))
    for start in range(0, channels, step):
        block = slice(start, start + step)
        gram[block, start:].addmm_(rows[:, block].T, rows[:, start:])


@dataclass
class Readings:
    """What was measured. A leader is the first of the consumers that read the same values."""

    statistics: dict[Consumer, InputStatistics] = field(default_factory=dict)  # by leader
    leaders: dict[Consumer, Consumer] = field(default_factory=dict)  # consumer -> its leader
    # Leader -> the layers from a norm to what it reads; only leaders behind a norm.
    chains: dict[Consumer, Chain] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)  # weights that embed tokens too (tied heads)
    # Of consumers whose outputs are added up row by row, as experts' are; the last layer's last.
    experts: dict[Consumer, Contribution] = field(default_factory=dict)

    def of(self, consumer: Consumer) -> InputStatistics | None:
        leader = self.leaders.get(consumer)
        return None if leader is None else self.statistics.get(leader)

    def by_place(self) -> dict[tuple[str, int], list[Consumer]]:
        """Return (parameter, dimension) -> its consumers: one, or one for each expert."""
        places: dict[tuple[str, int], list[Consumer]] = {}
        for consumer in self.leaders:
            places.setdefault((consumer.parameter, consumer.dim), []).append(consumer)
        return places

    def needs_gram(self, leader: Consumer) -> bool:
        """True if a refit needs the Gram matrix; behind a norm, other products are needed."""
        return leader not in self.chains and leader.parameter not in self.tables


def added_up(own: Readings, apart: Set[Consumer], ranks: Ranks, limit: int) -> Readings:
    """Return the readings over all ranks' data; all ranks have to call this.

    A Gram matrix that exceeds ``limit`` bytes with the others, or that a rank did not measure, is
    left to another pass. ``apart``: consumers that shared their inputs with different leaders.
    """
    seen = {
        leader: (len(each.total), None if each.gram is None else each.gram.dtype)
        for leader, each in own.statistics.items()
    }
    everyone = ranks.gathered((replace(own, statistics={}), apart, seen))
    merged, sizes = Readings(), dict[Consumer, int]()
    unsure = {consumer for _, some, _ in everyone for consumer in some}
    for readings, _, theirs in everyone:
        merged.tables |= readings.tables
        for consumer, contribution in readings.experts.items():
            merged.experts.setdefault(consumer, Contribution()).add(contribution)
        for consumer, leader in readings.leaders.items():
            if merged.leaders.setdefault(consumer, leader) != leader:
                unsure.add(consumer)
        for leader, (size, _) in theirs.items():
            if leader not in sizes and leader in readings.chains:
                merged.chains[leader] = readings.chains[leader]
            sizes.setdefault(leader, size)
    for consumer in unsure:
        merged.leaders.pop(consumer, None)
    measured = 0
    for leader, size in sizes.items():
        dtypes = [theirs[leader][1] for *_, theirs in everyone if leader in theirs]
        fits = None not in dtypes and (not measured or measured + 4 * size**2 <= limit)
        measured += 4 * size**2 if fits else 0
        statistics = own.statistics.pop(leader, None) or InputStatistics.none_of(size)
        merged.statistics[leader] = _summed(statistics, dtypes[0] if fits else None, ranks)
    return merged


def _summed(own: InputStatistics, dtype: torch.dtype | None, ranks: Ranks) -> InputStatistics:
    """Return one input's sums over all ranks; a dtype asks for a Gram matrix."""
    size = len(own.total)
    tokens = torch.tensor([own.tokens], dtype=torch.float64)
    sums = ranks.summed(torch.cat([own.total, own.squares, tokens]))
    gram = None
    if dtype is not None:
        gram = torch.zeros(size, size, dtype=dtype, device=ranks.device)
        gram = ranks.summed(gram if own.gram is None else own.gram)
    return InputStatistics(int(sums[-1]), sums[:size].clone(), sums[size:-1].clone(), gram)
