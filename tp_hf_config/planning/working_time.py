"""Estimate how long calibrating and a step with refits take on a CPU, by the operations in them."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration.batches import TOKENS, WINDOW
from ..calibration.forecast import inputs_of
from .streaming_cost import Cut, Solved

RATE = 140e9
"""Operations in float32 in a second, on two CPU cores (`benchmarks/working_time.py`)."""
_HELD_OUT = 8 * WINDOW  # tokens
_PASSES = 4  # over held-out data: unpruned, cut, refitted, pruned
_UPPER = 5 / 8  # of a Gram matrix is computed: little of its lower triangle
_DOUBLE = 2  # an operation in float64 takes as long as so many in float32


@dataclass(frozen=True)
class WorkingTime:
    """How long it takes in memory on two CPU cores, in seconds; experts take longer.

    Attributes:
        calibrate: ``calibrate(model)`` on as many tokens as it takes by default.
        step: the first step of a pruner with refits.
    """

    calibrate: float
    step: float

    def __str__(self) -> str:
        return f"{_said(self.calibrate)} to calibrate, {_said(self.step)} for a step with refits"


def working_time(cut: Cut, flops: int | None, tokens: int = TOKENS) -> WorkingTime | None:
    """Return how long it takes; ``None``: what weights read is not known, or no FLOPs are.

    Args:
        cut: what a plan comes to.
        flops: FLOPs of a forward pass for a token.
        tokens: how many are measured.
    """
    inputs = inputs_of(cut.field_map, cut.full)
    if inputs is None or flops is None:
        return None
    solved = [Solved(cut, each, 0) for each in inputs if each.sums]
    grams = sum(2 * _UPPER * each.size**2 for each in solved if each.input.sums == "gram")
    step: float = _PASSES * min(_HELD_OUT, tokens) * flops
    losing = [each for each in solved if each.kept < each.size]
    behind = [each for each in losing if each.input.sums == "products"]
    if behind:
        step += tokens * (flops + sum(2 * each.kept * (each.kept + each.size) for each in behind))
    for each in losing:
        targets = each.size if each in behind else each.size - each.kept
        solving = each.kept**3 / 3 + 2 * each.kept**2 * targets
        step += _DOUBLE * each.input.parts * solving
    return WorkingTime(tokens * (flops + grams) / RATE, step / RATE)


def _said(seconds: float) -> str:
    """Return a time in two digits: ``31 s``, ``12 min``, ``3.4 h``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.2g} {unit}"
    return f"about {max(1.0, seconds):.2g} s"
