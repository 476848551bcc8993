"""How much a model's output changes: KL divergence of logits, or a relative squared error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .over_ranks import ALONE, Ranks

_RELATIVE = "squared error"


class Difference:
    """Keeps a model's outputs, batch by batch, and compares others with them.

    ``ranks``: the ranks that compare, each on batches of its own.

    Attributes:
        measure: what is computed: ``"KL"`` where the outputs have logits for every token, else
            ``"squared error"``.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self.measure = "KL"
        self._outputs: list[Tensor] = []
        self._sums: list[float] = []

    def note(self, number: int, result: Any) -> None:
        """Keep the output for a batch, on the CPU."""
        output = _output_of(result)
        if not _has_logits(result):
            self.measure = _RELATIVE
        self._outputs.append(output.detach().float().cpu())

    def begin(self) -> None:
        """Forget what was compared."""
        self._sums = []

    def compare(self, number: int, result: Any) -> None:
        """Compare the output for a batch with the one that was kept."""
        before, now = self._outputs[number], _output_of(result).detach().float().cpu()
        if before.shape != now.shape:
            self._sums.append(math.nan)  # an output as wide as what is pruned
            return
        if self.measure == "KL":
            wanted, found = before.log_softmax(-1), now.log_softmax(-1)
            per_token = (wanted.exp() * (wanted - found)).sum(-1)
            self._sums.append(float(per_token.mean()))
        else:
            scale = float(before.square().sum()) or 1.0
            self._sums.append(float((now - before).square().sum()) / scale)

    def mean(self) -> float:
        """Return the mean over all batches that were compared; NaN if some had another shape.

        All ranks have to call this; ``measure`` is what they have compared then.
        """
        if _RELATIVE in self._ranks.gathered(self.measure):
            self.measure = _RELATIVE  # a rank without batches does not know
        total, batches = self._ranks.sums([sum(self._sums), len(self._sums)])
        return total / max(1, batches)


def _has_logits(result: Any) -> bool:
    logits = result.get("logits") if isinstance(result, Mapping) else None
    return isinstance(logits, Tensor) and logits.ndim >= 2


def _output_of(result: Any) -> Tensor:
    """Return a model's logits, or the first tensor that it returns."""
    if _has_logits(result):
        return torch.as_tensor(result["logits"])
    if isinstance(result, Tensor):
        return result
    values = result.values() if isinstance(result, Mapping) else result
    return next(value for value in values if isinstance(value, Tensor))
