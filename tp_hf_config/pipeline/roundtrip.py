"""Prove what was written: a fresh process loads it and computes the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checkpoint.verify import compare_saved, live_outputs
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
    run = _run(model, recipe)
    if isinstance(run, Refusal):
        raise _not_proved(run.reason)
    report = compare_saved(model, folder, *run)
    if not report.same:
        raise _not_proved(f"{report}")
    return Proof(len(report.outputs), report.numbers)


def runnable_inputs(model: PreTrainedModel, recipe: RunRecipe) -> dict[str, Any] | Refusal:
    """Return keyword arguments of a forward pass with which a model runs; or why none were found.

    Args:
        model: the model.
        recipe: how its class is run.
    """
    run = _run(model, recipe)
    return run if isinstance(run, Refusal) else run[0]


def _run(
    model: PreTrainedModel, recipe: RunRecipe
) -> tuple[dict[str, Any], dict[str, Tensor]] | Refusal:
    """Return keyword arguments with which a model runs, and its outputs; or why there are none."""
    reason = ""
    for inputs in (example_inputs(model, recipe), *input_forms(model, recipe)):
        try:
            return inputs, live_outputs(model, inputs)
        except Exception as error:  # a forward pass may raise anything
            reason = reason or f"{type(error).__name__}: {error}"
    return Refusal(f"no inputs were found that it runs with: {reason}")


def _not_proved(reason: str) -> PipelineError:
    return PipelineError(f"the model was not written, its round trip is not proved: {reason}")
