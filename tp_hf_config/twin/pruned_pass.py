"""Run a pruned model, and tell by the values of its weights which units it kept.

Weights are random, so that each value tells its position; no record of the pruning is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forward.observed_pass import PassResult, outputs_in_float64
from ..forward.run_recipe import AXIS, PLAIN, RunRecipe, encoder_states_in, encoder_states_of
from ..model.build import Refusal
from ..model.tensors import saved_buffers
from .width_scalars import CutDim, SizesRead, as_written

Kept = dict[str, tuple[CutDim, ...]]
"""The name of every tensor -> one ``CutDim`` for each dimension."""


@dataclass(frozen=True)
class PrunedPass:
    """One forward pass of a pruned model.

    Attributes:
        kept: the kept positions of every tensor.
        inputs: keyword arguments of the pass: those of the original, without removed channels.
        outputs: the floating point outputs, watched results last.
        sizes: the sizes that the model read (:class:`SizesRead`).
    """

    kept: Kept
    inputs: dict[str, Any]
    outputs: list[Tensor]
    sizes: list[tuple[int, ...]]


def pruned_pass(
    original: nn.Module,
    pruned: nn.Module,
    inputs: Mapping[str, Any],
    watched: Sequence[PassResult] = (),
    recipe: RunRecipe = PLAIN,
) -> PrunedPass | Refusal:
    """Run a pruned model; the refusal says which tensor is no cut of the original's.

    Encoder states among the inputs lose the channels that the layer which reads them lost.

    Args:
        original: the model before pruning, every weight random, in float64 and eval mode.
        pruned: the model after pruning.
        inputs: keyword arguments of one forward pass of the original.
        watched: intermediate results that are compared like outputs.
        recipe: how the class is run.
    """
    kept = kept_positions(original, pruned)
    if isinstance(kept, Refusal):
        return kept
    pruned_inputs = _cut_inputs(inputs, original, kept, recipe)
    with torch.no_grad(), as_written(pruned), SizesRead() as sizes_read:
        outputs = outputs_in_float64(pruned, pruned_inputs, watched, recipe)
    return PrunedPass(kept, pruned_inputs, outputs, sizes_read.sizes)


def kept_positions(original: nn.Module, pruned: nn.Module) -> Kept | Refusal:
    """Return the kept positions of every tensor, or a ``Refusal`` if one holds anything else."""
    before, after = tensors_of(original), tensors_of(pruned)
    if before.keys() != after.keys():
        return Refusal(f"other tensors: {', '.join(sorted(before.keys() ^ after.keys())[:3])}")
    kept: Kept = {}
    for name, value in before.items():
        cut_dims = cut_dims_of(value, after[name])
        if isinstance(cut_dims, Refusal):
            return Refusal(f"{name} holds {cut_dims.reason}")
        kept[name] = cut_dims
    return kept


def pruned_inputs_of(
    original: nn.Module, pruned: nn.Module, inputs: Mapping[str, Any], recipe: RunRecipe
) -> dict[str, Any] | Refusal:
    """Return the inputs of a pruned model: those of the original, without removed channels.

    Only encoder states lose channels. A ``Refusal`` says why the kept positions cannot be told.
    """
    if encoder_states_of(original, recipe.encoder_states) is None:
        return dict(inputs)
    kept = kept_positions(original, pruned)
    return kept if isinstance(kept, Refusal) else _cut_inputs(inputs, original, kept, recipe)


def _cut_inputs(
    inputs: Mapping[str, Any], original: nn.Module, kept: Kept, recipe: RunRecipe
) -> dict[str, Any]:
    """Return the inputs, with encoder states cut to the channels that their reader kept."""
    states_input = encoder_states_of(original, recipe.encoder_states)
    states = encoder_states_in(original, inputs, recipe.encoder_states)
    if states_input is None:
        return dict(inputs)
    index = kept[states_input.reader][states_input.dim].kept
    return {**inputs, **{name: value.index_select(AXIS, index) for name, value in states.items()}}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and saved buffer by its name, detached."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | saved_buffers(model)
    return {name: value.detach() for name, value in tensors.items()}


def cut_dims_of(before: Tensor, after: Tensor) -> tuple[CutDim, ...] | Refusal:
    """Return which positions along each dimension pruning kept of a tensor of random values.

    They are told by the values. The refusal says that ``after`` is not a selection from ``before``
    along each dimension, in the same order.
    """
    if before.shape == after.shape:
        if not torch.equal(before, after):
            return Refusal("other values than before")
        return tuple(CutDim(size, torch.arange(size)) for size in before.shape)
    if before.ndim != after.ndim:
        return Refusal("other dimensions than before")
    if not before.numel():  # an empty tensor (no such tokens): nothing tells which are kept
        sizes = zip(before.shape, after.shape, strict=True)
        return tuple(CutDim(size, torch.arange(new_size)) for size, new_size in sizes)
    values, order = before.flatten().sort()
    differs = F.pad(values[1:] != values[:-1], (1, 1), value=True)  # from the value before
    unique = differs[1:] & differs[:-1]
    where = torch.searchsorted(values, after.flatten()).clamp(max=len(values) - 1)
    if not torch.equal(values[where], after.flatten()):
        return Refusal("values that the original has not")
    positions = torch.unravel_index(order[where], before.shape)
    certain = unique[where].view(after.shape)
    cut_dims: list[CutDim] = []
    expected = before
    for dim, (size, new_size) in enumerate(zip(before.shape, after.shape, strict=True)):
        if size == new_size:
            cut_dims.append(CutDim(size, torch.arange(size)))
            continue
        origins = positions[dim].view(after.shape).masked_fill(~certain, size)
        kept = origins.movedim(dim, 0).reshape(new_size, -1).amin(1)  # they agree, or it differs
        if not bool((kept.diff() > 0).all()) or bool((kept == size).any()):
            return Refusal("channels in another order")
        expected = expected.index_select(dim, kept)
        cut_dims.append(CutDim(size, kept))
    return tuple(cut_dims) if torch.equal(expected, after) else Refusal("channels of mixed origin")
