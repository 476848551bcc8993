"""Prove what was written: a fresh process loads it and computes the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.verify import fresh_run, live_outputs
from ..errors import PipelineError
from ..forward.inputs import example_inputs, input_forms
from ..forward.run_recipe import RunRecipe
from ..model.build import Refusal

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

    Args:
        model: the pruned model.
        folder: the folder.
        recipe: how the class was run before it was pruned.

    Raises:
        PipelineError: the folder does not load, its outputs differ, or no inputs were found with
            which the model runs.
    """
    reason = ""
    for inputs in _inputs(model, recipe):
        with fresh_run(model, folder, inputs) as compared_with:
            try:
                outputs = live_outputs(model, inputs)
            except Exception as error:  # a forward pass may raise anything
                reason = reason or f"{type(error).__name__}: {error}"
                continue
            report = compared_with(outputs)
        if not report.same:
            raise _not_proved(f"{report}")
        return Proof(len(report.outputs), report.numbers)
    raise _not_proved(f"no inputs were found that it runs with: {reason}")


def runnable_inputs(model: PreTrainedModel, recipe: RunRecipe) -> dict[str, Any] | Refusal:
    """Return keyword arguments of a forward pass with which a model runs; or why none were found.

    Args:
        model: the model.
        recipe: how its class is run.
    """
    reason = ""
    for inputs in _inputs(model, recipe):
        try:
            live_outputs(model, inputs)
        except Exception as error:  # a forward pass may raise anything
            reason = reason or f"{type(error).__name__}: {error}"
        else:
            return inputs
    return Refusal(f"no inputs were found that it runs with: {reason}")


def _inputs(model: PreTrainedModel, recipe: RunRecipe) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments with which a model may run, the likeliest first."""
    yield example_inputs(model, recipe)
    yield from input_forms(model, recipe)


def _not_proved(reason: str) -> PipelineError:
    return PipelineError(f"the model was not written, its round trip is not proved: {reason}")
