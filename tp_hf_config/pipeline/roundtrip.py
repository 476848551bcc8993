"""Prove what was written: a fresh process loads it and computes the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checkpoint.verify import fresh_run, live_outputs
from ..errors import PipelineError
from ..forward.inputs import example_inputs, input_forms
from ..forward.run_recipe import RunRecipe
from ..model.build import Refusal
from ..model.shortage import raise_shortage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Proof:
    """A proof that a folder holds a model: the outputs of both are identical.

    Attributes:
        tensors: the number of output tensors that were compared.
        numbers: the number of numbers in them.
    """

    tensors: int
    numbers: int

    def __str__(self) -> str:
        return (
            f"a fresh process loaded it: {self.numbers:,} numbers in {self.tensors} output "
            "tensors, bit for bit the same"
        )


def prove_roundtrip(model: PreTrainedModel, folder: Path, recipe: RunRecipe) -> Proof:
    """Compare a model with what a fresh process loads from the folder that it was saved to.

    ``recipe``: how the class was run before it was pruned.

    Raises:
        PipelineError: the folder does not load, its outputs differ, or no inputs were found with
            which the model runs.
    """
    refusals: list[Refusal] = []
    for inputs in _inputs(model, recipe):
        with fresh_run(model, folder, inputs) as compared_with:
            outputs = _outputs(model, inputs)
            if isinstance(outputs, Refusal):
                refusals.append(outputs)
                continue
            report = compared_with(outputs)
        if not report.same:
            raise _not_proved(f"{report}")
        return Proof(len(report.outputs), report.numbers)
    raise _not_proved(_none_runs(refusals).reason)


def runnable_inputs(model: PreTrainedModel, recipe: RunRecipe) -> dict[str, Any] | Refusal:
    """Return keyword arguments of a forward pass with which a model runs; or why there are none."""
    refusals: list[Refusal] = []
    for inputs in _inputs(model, recipe):
        outputs = _outputs(model, inputs)
        if not isinstance(outputs, Refusal):
            return inputs
        refusals.append(outputs)
    return _none_runs(refusals)


def _inputs(model: PreTrainedModel, recipe: RunRecipe) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments with which a model may run, the likeliest first."""
    yield example_inputs(model, recipe)
    yield from input_forms(model, recipe)


def _outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor] | Refusal:
    """Return what a model computes of some inputs; or why it does not run with them."""
    try:
        return live_outputs(model, inputs)
    except Exception as error:  # a forward pass may raise anything
        raise_shortage(error)
        return Refusal(f"{type(error).__name__}: {error}")


def _none_runs(refusals: Sequence[Refusal]) -> Refusal:
    """Return why a model cannot be run: what it says of the likeliest inputs."""
    return Refusal(f"no inputs were found that it runs with: {refusals[0].reason}")


def _not_proved(reason: str) -> PipelineError:
    return PipelineError(f"the model was not written, its round trip is not proved: {reason}")
