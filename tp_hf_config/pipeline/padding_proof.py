"""Prove that a padded model computes what the model did: run both on small inputs in float64.

Equal outputs are not enough: an expert of zeros may not be chosen in these few tokens.  So what
leads into the added units is set to noise too, one side of a layer after the other: where that
changes an output, zeros are not neutral.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..fieldmap.learn_field_map import map_of
from ..forward.observed_pass import outputs_in_float64
from ..forward.run_recipe import RunRecipe
from ..graph.sides import Side, is_output, sides_of
from ..model.build import Refusal
from ..model.config_json import field_name
from ..model.layer_entries import name_in_all_layers
from ..model.surroundings import same_random_state
from ..model.tensors import tensor
from .padding import Padded
from .roundtrip import runnable_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDING = 1e-9
"""The largest relative difference of outputs in float64 that counts as rounding."""
_LOUD = 10.0
"""How much larger noise is than the weights around it: a router's choice has to follow it."""


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
        return f"{self.numbers:,} numbers of outputs in float64, {self.difference:.0e} apart"


def in_float64(model: PreTrainedModel, recipe: RunRecipe) -> PreTrainedModel:
    """Return a copy of a model on the CPU, in float64 and eval mode, without fused kernels."""
    twin: Any = copy.deepcopy(model).cpu().double().train(False)
    twin.set_attn_implementation(recipe.attention)
    if getattr(twin, "_can_set_experts_implementation", lambda: False)():
        twin.set_experts_implementation("eager")  # fused ones know no float64
    return twin  # type: ignore[no-any-return]


def outputs_of(model: nn.Module, inputs: Mapping[str, Any], recipe: RunRecipe) -> list[Tensor]:
    """Return the outputs of a model in float64 on the CPU."""

    def on_cpu(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    inputs = {key: on_cpu(value) for key, value in inputs.items()}
    with torch.no_grad(), same_random_state():
        return outputs_in_float64(model, inputs, recipe=recipe)


def compared(expected: list[Tensor], found: list[Tensor]) -> SameOutputs:
    """Return how far outputs are from those that are expected; infinitely, if others come."""
    if [value.shape for value in expected] != [value.shape for value in found]:
        return SameOutputs(0, float("inf"))
    apart = [
        float((a - b).norm() / a.norm().clamp_min(1e-30))
        for a, b in zip(expected, found, strict=True)
    ]
    worst = max(apart, key=lambda value: float("inf") if value != value else value)
    return SameOutputs(sum(value.numel() for value in expected), worst)


def prove_padding(model: PreTrainedModel, padded: Padded) -> SameOutputs | Refusal:
    """Compare a padded model with the model, and ask whether zeros are neutral in every width.

    Returns:
        The comparison; or a refusal that names the field in which zeros are not neutral, or says
        why the model cannot be run.
    """
    recipe = map_of(model).recipe
    inputs = runnable_inputs(model, recipe)
    if isinstance(inputs, Refusal):
        return inputs
    expected = outputs_of(in_float64(model, recipe), inputs, recipe)
    twin = in_float64(padded.model, recipe)
    found = outputs_of(twin, inputs, recipe)
    for name, entrance in _entrances(twin, padded):
        with _noise(twin, entrance):
            loud = outputs_of(twin, inputs, recipe)
        if not compared(found, loud).difference <= ROUNDING:
            return Refusal(
                f"zeros are not neutral in {name}: what its other units compute depends on "
                "how many there are, as in a norm or a choice over all of them"
            )
    same = compared(expected, found)
    if not same.difference <= ROUNDING:
        return Refusal(f"with zeros its outputs are {same.difference:.0e} off")
    return same


_Entrance = list[tuple[Side, Tensor]]
"""The same side of like layers, each with the positions of the channels that were added."""


def _entrances(model: nn.Module, padded: Padded) -> Iterable[tuple[str, _Entrance]]:
    """Return what leads into added units: sides of layers that compute them, alike ones together.

    Each comes with the name of the field that counts the units.
    """
    kinds: dict[tuple[str, str], _Entrance] = {}
    for group, added in padded.groups:
        name = " + ".join(name_in_all_layers(field_name(field)) for field in group.fields)
        for side in filter(is_output, sides_of(model, group, {})):
            kind = re.sub(r"\.\d+(?=\.)", ".*", str(side.dims[0].place))
            kinds.setdefault((name, kind), []).append((side, side.table[added].flatten()))
    return [(name, entrance) for (name, _), entrance in kinds.items()]


@contextmanager
def _noise(model: nn.Module, entrance: _Entrance) -> Iterator[None]:
    """While open, channels that were added hold noise in the parameters of some sides."""
    places = [(dim.place, channels) for side, channels in entrance for dim in side.dims]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for (name, axis), channels in places:
                weight = tensor(model, name)
                shape = [*weight.shape]
                shape[axis] = len(channels)
                noise = torch.randn(shape, generator=generator, dtype=weight.dtype)
                loud = _LOUD * weight.abs().mean().clamp_min(1e-3)
                weight.index_copy_(axis, channels, noise * loud)
        yield
    finally:
        with torch.no_grad():
            for (name, axis), channels in places:
                tensor(model, name).index_fill_(axis, channels, 0.0)
