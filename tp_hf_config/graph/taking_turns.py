"""Let the ranks of a sharded model read different weights: whoever is behind goes first.

A weight is gathered by all ranks together. Ranks that run a model on different data do not read
the same weights (experts that no token reaches, more batches here than there), so before each
weight every rank says which one it wants. All gather the one that comes first, those that want it
go on, and a rank that has finished helps the others until all have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import in_one_line

_DONE, _FAILED = 1 << 62, -1  # in the place of a batch's number: after all others, before them
_NOTHING = -1  # in the place of a weight's number


class InterruptedByRankError(Exception):
    """Another rank cannot go on, so this one cannot either.

    Attributes:
        reason: why, if the other ranks cannot be asked any more; else empty, and they know.
    """

    def __init__(self, reason: str = ""):
        super().__init__(reason)
        self.reason = reason


class Turns:
    """The weights that ranks want, in turn, until all have finished.

    Args:
        gather: gets a weight's number, and gathers it together with the other ranks.
        device: where the ranks exchange what they want.

    Attributes:
        batch: the number of the batch that this rank is at.
    """

    def __init__(self, gather: Callable[[int], Tensor], device: torch.device):
        self._gather, self._device = gather, device
        self.batch = 0
        self._interrupted: InterruptedByRankError | None = None

    def read(self, number: int) -> Tensor:
        """Return a weight, once it is this rank's turn.

        Raises:
            InterruptedByRankError: another rank cannot go on.
        """
        while True:
            values, gathered = self._round(self.batch, number)
            if gathered == number:
                return values

    def finish(self) -> None:
        """Gather what the others want until they have finished too.

        Raises:
            InterruptedByRankError: another rank cannot go on.
        """
        while self._round(_DONE, _NOTHING)[1] != _NOTHING:
            pass

    def fail(self) -> None:
        """Tell the others that this rank cannot go on, unless they know of another."""
        if self._interrupted is None:
            self._exchange(_FAILED, _NOTHING)

    def _round(self, batch: int, number: int) -> tuple[Tensor, int]:
        """Return the weight that is gathered now, and its number."""
        first, turn = min(self._exchange(batch, number))
        if first == _FAILED:
            self._interrupted = InterruptedByRankError()
            raise self._interrupted
        return torch.empty(0) if turn == _NOTHING else self._gathered(turn), turn

    def _exchange(self, batch: int, number: int) -> list[tuple[int, int]]:
        """Return what all ranks want."""
        import torch.distributed as dist

        if self._interrupted is not None:  # and whoever caught that goes on
            raise self._interrupted
        mine = torch.tensor([batch, number], device=self._device)
        wishes = mine.new_empty(dist.get_world_size() * 2)
        try:
            dist.all_gather_into_tensor(wishes, mine)
        except RuntimeError as error:
            raise self._lost(error) from error
        return [(int(pair[0]), int(pair[1])) for pair in wishes.cpu().view(-1, 2)]

    def _gathered(self, number: int) -> Tensor:
        try:
            return self._gather(number)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> InterruptedByRankError:
        self._interrupted = InterruptedByRankError(in_one_line(error))
        return self._interrupted
