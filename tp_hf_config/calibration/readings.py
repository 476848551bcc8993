"""What was measured of a model: what the channels that its weights read carry, over all tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .linear_ops import Consumer
from .passes import Ranks
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


def added_up(own: Readings, apart: Set[Consumer], ranks: Ranks, limit: int) -> Readings:
    """Return the readings of all ranks' data, in their order; all ranks have to call this.

    Gram matrices that do not fit into ``limit`` bytes together, or that a rank had no memory for,
    are left to another pass. ``apart``: consumers that read now with one leader, now with another.
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
    """Return one input's sums over all ranks, with a Gram matrix if a dtype is given."""
    size = len(own.total)
    tokens = torch.tensor([own.tokens], dtype=torch.float64)
    sums = ranks.summed(torch.cat([own.total, own.squares, tokens]))
    gram = None
    if dtype is not None:
        gram = torch.zeros(size, size, dtype=dtype, device=ranks.device)
        gram = ranks.summed(gram if own.gram is None else own.gram)
    return InputStatistics(int(sums[-1]), sums[:size].clone(), sums[size:-1].clone(), gram)
