"""Prove a result: a fresh process loads it and computes the same bits, or two models agree."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.verify import fresh_run, live_outputs
from ..errors import PipelineError
from ..forward.inputs import example_inputs, input_forms
from ..forward.observed_pass import outputs_in_float64
from ..forward.run_recipe import RunRecipe
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


class NotProvedError(PipelineError):
    """Nothing is written, because a proof fails or a format cannot express a model."""


def prove_roundtrip(model: PreTrainedModel, folder: Path, recipe: RunRecipe) -> Proof:
    """Raise unless a fresh process loads ``folder`` and computes the same as ``model``.

    ``recipe``: how the class was run before it was pruned.
    """
    try:
        inputs, outputs = first_run(model, recipe)
        report = fresh_run(model, folder, inputs, outputs)
        if not report.same:
            raise NotProvedError(str(report))
    except NotProvedError as error:
        raise PipelineError(
            f"the model was not written, because its round trip could not be proved: {error}"
        ) from error
    return Proof(len(report.outputs), report.numbers)


def first_run(
    model: PreTrainedModel, recipe: RunRecipe
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the first inputs that a model runs with, and its outputs."""
    reasons: list[str] = []
    for inputs in chain([example_inputs(model, recipe)], input_forms(model, recipe)):
        try:
            return inputs, live_outputs(model, inputs)
        except Exception as error:  # a forward pass may raise anything
            raise_shortage(error)
            reasons.append(f"{type(error).__name__}: {error}")
    raise NotProvedError(f"no inputs were found that it runs with: {reasons[0]}")


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
