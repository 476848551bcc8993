"""Try refits on held-out data: the model runs as if it were cut, with refits or without."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor

from ..graph.edits import plain_cut
from .linear_ops import Consumer, LinearOp
from .measured import MeasuredModel
from .passes import Together, together_on, watched_pass
from .refits_of_step import Copies, StepRefits
from .sources import Sources


@dataclass
class Errors:
    """Squared errors of a layer's output over the held-out data.

    Attributes:
        cut: without a refit.
        refit: with it.
        output: the squared output itself.
    """

    cut: float = 0.0
    refit: float = 0.0
    output: float = 0.0


def run_as_cut(
    step: StepRefits, using: Collection[Consumer], after_batch: Callable[[int, Any], None]
) -> None:
    """Run the model on held-out data, every weight reading what the step leaves of its inputs.

    What is computed without a weight (products of queries and keys of fewer dimensions) is as in
    the whole model.

    Args:
        step: the refits of the step.
        using: the consumers whose refits are used.
        after_batch: gets the number of each batch and the model's result.
    """
    sources, copies = step.sources(_leaders(step)), Copies()

    def visit(op: LinearOp) -> Any:
        rows = step.after_cut(op, sources, copies)
        if rows is None:
            return op.run()
        if op.consumer in using:
            return op.run(op.shaped(step.refits[op.consumer].estimate(rows)))
        return op.run(op.shaped(_cut(op, rows, step)))

    _held_out_pass(step.calibration, visit, sources, after_batch, step.together())


def layer_errors(
    step: StepRefits, after_batch: Callable[[int, Any], None]
) -> dict[Consumer, Errors]:
    """Run the whole model on held-out data, and return each refit's errors there, of all ranks.

    ``after_batch``: gets the number of each batch and the model's result.
    """
    sources, copies = step.sources(_leaders(step)), Copies()
    errors: dict[Consumer, Errors] = {}

    def visit(op: LinearOp) -> Any:
        whole = op.run()
        refit = step.refits.get(op.consumer)
        rows = None if refit is None else step.after_cut(op, sources, copies)
        if refit is not None and rows is not None:
            sums = errors.setdefault(op.consumer, Errors())
            sums.cut += _squares(op.run(op.shaped(_cut(op, rows, step))) - whole)
            sums.refit += _squares(op.run(op.shaped(refit.estimate(rows))) - whole)
            sums.output += _squares(whole)
        return whole

    _held_out_pass(step.calibration, visit, sources, after_batch, step.together())
    own = [errors.get(consumer, Errors()) for consumer in step.refits]
    sums = step.calibration.ranks.sums([value for each in own for value in astuple(each)])
    return {
        consumer: Errors(*sums[3 * number : 3 * number + 3])
        for number, consumer in enumerate(step.refits)
    }


def run_held_out(calibration: MeasuredModel, after_batch: Callable[[int, Any], None]) -> None:
    """Run a measured model as it is now on its held-out data."""
    together = together_on(calibration.model, calibration.max_memory)
    _held_out_pass(calibration, lambda op: op.run(), None, after_batch, together)


def _held_out_pass(
    calibration: MeasuredModel,
    visit: Callable[[LinearOp], Any],
    sources: Sources | None,
    after_batch: Callable[[int, Any], None],
    together: Together | None,
) -> None:
    """Run a measured model on its held-out data; see :func:`watched_pass`."""
    model, batches, ranks = calibration.model, calibration.held_out, calibration.ranks
    watched_pass(model, batches, visit, sources, after_batch, together=together, ranks=ranks)


def _cut(op: LinearOp, rows: Tensor, step: StepRefits) -> Tensor:
    """Return an operation's inputs with zeros in the place of channels that are cut."""
    return plain_cut(rows, step.kept[op.consumer], op.inputs.shape[op.axis])


def _leaders(step: StepRefits) -> set[Consumer]:
    return {step.readings.leaders[consumer] for consumer in step.kept}


def _squares(values: Tensor) -> float:
    return float(values.double().square().sum())
