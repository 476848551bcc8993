"""Try refits on held-out data: the model runs as if it were cut, with refits or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.edits import plain_cut
from ..model.lazy_tensor import values_of
from .linear_ops import Consumer, LinearOp
from .measured import MeasuredModel
from .passes import watched_pass
from .refits_of_step import Copies, StepRefits
from .sources import Sources
from .sums import Sums


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
    step: StepRefits,
    using: Collection[Consumer],
    after_batch: Callable[[int, Any], None],
    what: str = "",
) -> None:
    """Run the model on held-out data, every weight reading what the step leaves of its inputs.

    What is computed without a weight (products of queries and keys of fewer dimensions) is as in
    the whole model.

    Args:
        step: the refits of the step.
        using: the consumers whose refits are used.
        after_batch: gets the number of each batch and the model's result.
        what: the title of the progress bar; empty: there is none.
    """
    sources, copies = step.sources(_leaders(step)), Copies()
    latest: tuple[Any, Tensor, Tensor] | None = None

    def visit(op: LinearOp) -> Any:
        nonlocal latest
        used = op.consumer in using
        alike = step.alike.get(op.consumer, op.consumer), used
        values = op.inputs
        if latest is None or latest[0] != alike or not _same(values, latest[1]):
            rows = step.after_cut(op, sources, copies)
            if rows is None:
                return op.run()
            refit = step.refits[op.consumer] if used else None
            latest = alike, values, _cut(op, rows, step) if refit is None else refit.estimate(rows)
        return op.run(op.shaped(latest[2]))

    _held_out_pass(step.calibration, visit, sources, after_batch, what)


def layer_errors(
    step: StepRefits, after_batch: Callable[[int, Any], None]
) -> dict[Consumer, Errors]:
    """Run the whole model on held-out data, and return each refit's errors there, of all ranks.

    The errors of a layer's output follow from products of the errors of what it reads, which the
    weights that read the same have in common. A convolution with a kernel is run again instead.

    ``after_batch``: gets the number of each batch and the model's result.
    """
    errors = {consumer: Errors() for consumer in step.refits}
    sizes = {first: 8 * len(step.refits[first].targets) ** 2 for first in step.alike.values()}
    for number, some in enumerate(step.of_one_pass(sizes)):
        _add_errors(step, errors, set(some), _nothing if number else after_batch)
    own = [value for each in errors.values() for value in astuple(each)]
    sums = iter(step.calibration.ranks.sums(own))
    return {consumer: Errors(*islice(sums, 3)) for consumer in errors}


def _add_errors(
    step: StepRefits,
    errors: Mapping[Consumer, Errors],
    firsts: Collection[Consumer],
    after_batch: Callable[[int, Any], None],
) -> None:
    """Add the errors of all weights that read what some consumers read, in one pass."""
    model = step.calibration.model
    sources, copies, sums = step.sources(_leaders(step)), Copies(), Sums()
    with_kernel = {c for c in step.refits if _has_kernel(model, c)}
    read: set[Consumer] = set()

    def visit(op: LinearOp) -> Any:
        whole, first = op.run(), step.alike.get(op.consumer)
        if first not in firsts:
            return whole
        refit, found = step.refits[op.consumer], errors[op.consumer]
        is_kernel = op.consumer in with_kernel
        rows = step.after_cut(op, sources, copies) if is_kernel or op.consumer == first else None
        if rows is not None and is_kernel:
            found.cut += _squares(op.run(op.shaped(_cut(op, rows, step))) - whole)
            found.refit += _squares(op.run(op.shaped(refit.estimate(rows))) - whole)
        if rows is not None and op.consumer == first:
            read.add(first)
            lost = refit.errors(rows, op.channels_last())
            sums.add(first, [each.T @ each for each in lost])
        if rows is not None or first in read:
            found.output += _squares(whole)
        return whole

    what = "held-out data, unpruned"
    _held_out_pass(step.calibration, visit, sources, after_batch, what)
    for consumer in step.refits:
        if step.alike[consumer] in firsts and consumer not in with_kernel:
            values, at = consumer.matrix_of(model.get_parameter(consumer.parameter).detach())
            weight = values_of(values).movedim(at, -1).flatten(0, -2)  # all ranks read it
            products = sums.of(step.alike[consumer])
            if products is not None:
                targets = step.refits[consumer].targets
                weight = weight.index_select(-1, targets.to(weight.device)).to(products[0])
                cut, refit = (float(((weight @ each) * weight).sum()) for each in products)
                errors[consumer].cut, errors[consumer].refit = cut, refit


def _has_kernel(model: nn.Module, consumer: Consumer) -> bool:
    """True if a weight reads several places at once, so that its error follows from no product."""
    layer = model.get_submodule(consumer.parameter.rpartition(".")[0])
    return isinstance(layer, nn.modules.conv._ConvNd) and math.prod(layer.kernel_size) > 1


def run_held_out(
    calibration: MeasuredModel, after_batch: Callable[[int, Any], None], what: str = ""
) -> None:
    """Run a measured model as it is now on its held-out data."""
    _held_out_pass(calibration, lambda op: op.run(), None, after_batch, what)


def _held_out_pass(
    calibration: MeasuredModel,
    visit: Callable[[LinearOp], Any],
    sources: Sources | None,
    after_batch: Callable[[int, Any], None],
    what: str,
) -> None:
    """Run a measured model on its held-out data; see :func:`watched_pass`."""
    model, batches, ranks = calibration.model, calibration.held_out, calibration.ranks
    watched_pass(model, batches, visit, sources, after_batch, what, ranks)


def _cut(op: LinearOp, rows: Tensor, step: StepRefits) -> Tensor:
    """Return an operation's inputs with zeros in the place of channels that are cut."""
    return plain_cut(rows, step.kept[op.consumer], op.inputs.shape[op.axis])


def _leaders(step: StepRefits) -> set[Consumer]:
    return {step.readings.leaders[consumer] for consumer in step.kept}


def _same(values: Tensor, others: Tensor) -> bool:
    """True if two tensors are the same values in memory."""
    places = (
        (each.data_ptr(), each.shape, each.stride(), each._version) for each in (values, others)
    )
    return next(places) == next(places)


def _squares(values: Tensor) -> float:
    return float(
        torch.linalg.vector_norm(
            values, dtype=torch.promote_types(values.dtype, torch.float32)
        ).double()
        ** 2
    )


def _nothing(number: int, result: Any) -> None:
    pass
