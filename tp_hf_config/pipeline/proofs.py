"""Prove a result: a fresh process loads it and computes the same bits, or two models agree."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.verify import fresh_run, live_outputs
from ..errors import PipelineError
from ..forward.inputs import example_inputs, input_forms
from ..forward.observed_pass import outputs_in_float64
from ..forward.run_recipe import RunRecipe
from ..model.build import Refusal
from ..model.surroundings import raise_shortage, same_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDING = 1e-9  # largest relative difference of float64 outputs that counts as rounding


@dataclass(frozen=True)
class Proof:
    tensors: int  # output tensors that were compared
    numbers: int

    def __str__(self) -> str:
        return (
            f"a fresh process loaded it: {self.numbers:,} numbers in {self.tensors} output "
            "tensors, bit for bit the same"
        )


def prove_roundtrip(model: PreTrainedModel, folder: Path, recipe: RunRecipe) -> Proof:
    """Raise unless a fresh process loads ``folder`` and computes the same as ``model``.

    ``recipe``: how the class was run before it was pruned.
    """
    refusals: list[Refusal] = []
    for inputs in _inputs(model, recipe):
        outputs = _outputs(model, inputs)
        if isinstance(outputs, Refusal):
            refusals.append(outputs)
            continue
        report = fresh_run(model, folder, inputs, outputs)
        if not report.same:
            raise _not_proved(f"{report}")
        return Proof(len(report.outputs), report.numbers)
    raise _not_proved(_none_runs(refusals).reason)


def runnable_inputs(model: PreTrainedModel, recipe: RunRecipe) -> dict[str, Any] | Refusal:
    refusals: list[Refusal] = []
    for inputs in _inputs(model, recipe):
        outputs = _outputs(model, inputs)
        if not isinstance(outputs, Refusal):
            return inputs
        refusals.append(outputs)
    return _none_runs(refusals)


def _inputs(model: PreTrainedModel, recipe: RunRecipe) -> Iterator[dict[str, Any]]:
    yield example_inputs(model, recipe)
    yield from input_forms(model, recipe)


def _outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor] | Refusal:
    try:
        return live_outputs(model, inputs)
    except Exception as error:  # a forward pass may raise anything
        raise_shortage(error)
        return Refusal(f"{type(error).__name__}: {error}")


def _none_runs(refusals: list[Refusal]) -> Refusal:
    return Refusal(f"no inputs were found that it runs with: {refusals[0].reason}")


def _not_proved(reason: str) -> PipelineError:
    return PipelineError(
        f"the model was not written, because its round trip could not be proved: {reason}"
    )


@dataclass(frozen=True)
class SameOutputs:
    """Two models computed the same on small inputs.

    Attributes:
        numbers: how many numbers were compared.
        difference: their largest relative difference.
    """

    numbers: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.numbers:,} output numbers compared in float64, largest relative difference "
            f"{self.difference:.0e}"
        )


@dataclass(frozen=True)
class SameTensors:
    """Transformers read a model's tensors back from a GGUF file.

    Attributes:
        tensors: how many were compared.
        difference: the largest difference of a value, relative to values above 1.
        unread: why the file was not read back; empty if it was.
    """

    tensors: int = 0
    difference: float = 0.0
    unread: str = ""

    def __str__(self) -> str:
        if self.unread:
            return f"none, the file was not read back: {self.unread}"
        off = f"at most {self.difference:.0e} off" if self.difference else "bit for bit the same"
        return f"Transformers read {self.tensors} tensors back from the file, {off}"


def in_float64(model: PreTrainedModel, recipe: RunRecipe) -> PreTrainedModel:
    """Return a copy of a model on the CPU, in float64 and eval mode, without fused kernels."""
    twin: Any = copy.deepcopy(model).cpu().double().train(False)
    twin.set_attn_implementation(recipe.attention)
    if getattr(twin, "_can_set_experts_implementation", lambda: False)():
        twin.set_experts_implementation("eager")  # fused ones do not support float64
    return twin  # type: ignore[no-any-return]


def outputs_of(model: nn.Module, inputs: Mapping[str, Any], recipe: RunRecipe) -> list[Tensor]:
    def on_cpu(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    inputs = {key: on_cpu(value) for key, value in inputs.items()}
    with torch.no_grad(), same_random_state():
        return outputs_in_float64(model, inputs, recipe=recipe)


def compared(expected: list[Tensor], found: list[Tensor]) -> SameOutputs:
    """Return how far outputs are from the expected ones; infinitely, if shapes differ or none."""
    if not expected or [value.shape for value in expected] != [value.shape for value in found]:
        return SameOutputs(0, float("inf"))
    apart = [
        float((a - b).norm() / a.norm().clamp_min(1e-30))
        for a, b in zip(expected, found, strict=True)
    ]
    worst = max(apart, key=lambda value: float("inf") if value != value else value)
    return SameOutputs(sum(value.numel() for value in expected), worst)
