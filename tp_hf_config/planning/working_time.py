"""Estimate how long calibrating and a step with refits take on a CPU, by the operations in them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..calibration.batches import TOKENS, WINDOW
from ..calibration.measured import inputs_of
from ..fieldmap.field_map import FieldMap

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


def working_time(
    field_map: FieldMap, full: nn.Module, after: nn.Module, steps: int, flops: int | None
) -> WorkingTime | None:
    """Return how long it takes; ``None``: what weights read is not known, or no FLOPs are.

    Args:
        field_map: the field map of the class.
        full: the class with all layers, on the meta device.
        after: the same in the end.
        steps: the number of steps.
        flops: FLOPs of a forward pass for a token.
    """
    inputs = inputs_of(field_map, full)
    if inputs is None or flops is None:
        return None
    grams, products = 0.0, 0
    step: float = _PASSES * _HELD_OUT * flops
    for each in (each for each in inputs if each.sums):
        size, end = (m.get_parameter(each.parameter).shape[each.dim] for m in (full, after))
        kept = size - (size - end) // steps
        if each.sums == "gram":
            grams += 2 * _UPPER * size**2
        if kept == size:
            continue
        if each.sums == "products":
            products += 2 * kept * (kept + size)
        targets = size if each.sums == "products" else size - kept
        step += _DOUBLE * each.parts * (kept**3 / 3 + 2 * kept**2 * targets)
    if products:
        step += TOKENS * (flops + products)
    return WorkingTime(TOKENS * (flops + grams) / RATE, step / RATE)


def _said(seconds: float) -> str:
    """Return a time in two digits: ``31 s``, ``12 min``, ``3.4 h``."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.2g} {unit}"
    return f"about {max(1.0, seconds):.2g} s"
