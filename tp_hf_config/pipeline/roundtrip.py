"""The proof of what was written: a fresh process loads it and computes the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.child import outputs_of
from ..checkpoint.verify import compare_saved
from ..errors import PipelineError
from ..inputs import example_inputs, input_forms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Proof:
    """That a folder holds a model: how many output tensors, and numbers in them, are identical."""

    tensors: int
    numbers: int

    def __str__(self) -> str:
        return (
            f"a fresh process loaded it: {self.numbers:,} numbers in {self.tensors} output "
            "tensors, bit for bit the same"
        )


def prove_roundtrip(model: PreTrainedModel, folder: Path) -> Proof:
    """Compare a model with what a fresh process loads from the folder that it was saved to.

    Raises:
        PipelineError: it does not load, or computes anything else.
    """
    report = compare_saved(model, folder, _inputs(model))
    if not report.same:
        raise _failed(f"{report}")
    return Proof(len(report.outputs), report.numbers)


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs that the model runs with."""
    reason = ""
    for inputs in (example_inputs(model), *input_forms(model)):
        try:
            outputs_of(model, inputs)
        except Exception as error:  # whatever a forward pass raises at another form
            reason = reason or f"{type(error).__name__}: {error}"
        else:
            return inputs
    raise _failed(f"no inputs were found that it runs with: {reason}")


def _failed(reason: str) -> PipelineError:
    return PipelineError(
        f"the pruned model was not written, its round trip is not proved: {reason}"
    )
