"""How much a model's output changes: KL divergence of logits, or a relative squared error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..forward.output_tensors import tensors_in
from .over_ranks import ALONE, Ranks

_RELATIVE = "squared error"
_AT_ONCE = 16  # tokens: no float32 copy of all logits is made


class Difference:
    """Keeps a model's outputs, batch by batch, and compares others with them.

    ``ranks``: the ranks that compare, each on batches of its own.

    Attributes:
        measure: what is computed: ``"KL"`` where the outputs have logits of several classes, for
            each input or for each of its tokens, else ``"squared error"``.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self.measure = "KL"
        self._outputs: list[Tensor] = []
        self._sums: list[float] = []

    def note(self, number: int, result: Any) -> None:
        """Keep the output for a batch, on the CPU, in the model's own dtype."""
        if not _has_classes(_logits_of(result)):
            self.measure = _RELATIVE
        self._outputs.append(_output_of(result).detach().cpu())

    def begin(self) -> None:
        """Forget what was compared."""
        self._sums = []

    def compare(self, number: int, result: Any) -> None:
        """Compare the output for a batch with the one that was kept."""
        before, now = self._outputs[number], _output_of(result).detach().cpu()
        if before.shape != now.shape:
            self._sums.append(math.nan)  # an output as wide as what is pruned
            return
        if self.measure == "KL":
            self._sums.append(_divergence(before.flatten(0, -2), now.flatten(0, -2)))
        else:
            before, now = before.float(), now.float()
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


def _divergence(before: Tensor, now: Tensor) -> float:
    """Return the mean KL divergence of logits, ``(tokens, classes)``; some tokens at a time."""
    total = 0.0
    for some, same in zip(*(torch.split(each, _AT_ONCE) for each in (before, now)), strict=True):
        wanted, found = some.float().log_softmax(-1), same.float().log_softmax(-1)
        total += float((wanted.exp() * (wanted - found)).sum())
    return total / max(1, len(before))


def _logits_of(result: Any) -> Tensor | None:
    logits = result.get("logits") if isinstance(result, Mapping) else None
    return logits if isinstance(logits, Tensor) else None


def _has_classes(logits: Tensor | None) -> bool:
    """True if logits have several classes along the last axis; those of images have them along 1.

    A single logit is the same after a softmax whatever it is.
    """
    return logits is not None and 2 <= logits.ndim <= 3 and logits.shape[-1] > 1


def _output_of(result: Any) -> Tensor:
    """Return a model's logits, or the first tensor that it returns.

    Raises:
        CalibrationError: it returns none.
    """
    logits = _logits_of(result)
    output = next(tensors_in(result), None) if logits is None else logits
    if output is None:
        raise CalibrationError(
            f"the model returns no tensor but a {type(result).__name__}, so its outputs on held-"
            "out data cannot be compared. Let its forward pass return a tensor, a tuple or a dict"
        )
    return output
