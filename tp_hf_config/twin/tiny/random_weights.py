"""Give a tiny model random weights, none of them trivial."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...forward.coverage import forward_error
from ...forward.run_recipe import RunRecipe
from ...model.tensors import compute_unsaved, saved_buffers

_LARGEST = 4.0
"""The values of a convolution have at most this root mean square."""


def randomise(model: nn.Module) -> None:
    """Give every parameter and saved buffer random values, none of them trivial, in place.

    Parameters that are not saved (Marian's positions) get what the class computes for this config:
    loading computes them again, with other values for another width.
    """
    unsaved = compute_unsaved(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(True)  # also fixed position tables: they have dimensions too
            if name in unsaved:
                continue
            if parameter.ndim > 1:
                parameter.copy_(_matrix(model, name, parameter))
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))

        for buffer in saved_buffers(model).values():
            buffer.mul_(1 + 0.3 * torch.rand_like(buffer))  # a variance stays above 0
            buffer.add_(0.3 * torch.rand_like(buffer))


def redraw_matrices(model: nn.Module) -> None:
    """Give every saved matrix other random values, in place."""
    unsaved = compute_unsaved(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name not in unsaved:
                parameter.copy_(_matrix(model, name, parameter))


def _matrix(model: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return random values for a matrix, divided by the square root of its fan-in.

    Of other tensors than weights of convolutions that is their last dimension. Convolutions are
    scaled later, but the model runs before (VITS took 100 s for that with larger weights).
    """
    layer, fan_in = model.get_submodule(name.rpartition(".")[0]), parameter.shape[-1]
    if isinstance(layer, nn.modules.conv._ConvNd):
        fan_in = math.prod(parameter.shape[2:]) * parameter.shape[0 if layer.transposed else 1]
    spread: float = fan_in**0.5
    return torch.randn_like(parameter) / spread


def scale_convolutions(model: nn.Module, inputs: dict[str, Any], recipe: RunRecipe) -> None:
    """Scale convolutions so that values neither grow nor fade from one to the next, in place.

    Stacks of convolutions have no norms between them, or batch norms, which do not divide by what
    they are given here: values behind them would reach 1e17 (DETR) and hide what attention adds.
    Each weight is divided by the :func:`_level` of what it computes from these inputs, in the order
    in which a pass calls them, as in layer-sequential unit-variance initialisation (Mishkin and
    Matas, https://arxiv.org/abs/1511.06422).
    """
    scaled: set[int] = set()

    def scale(layer: nn.modules.conv._ConvNd, _: Any, output: torch.Tensor) -> torch.Tensor:
        if "weight" not in layer._parameters or id(layer.weight) in scaled:
            return output  # computed from others, as by a weight norm; or shared, and scaled before
        scaled.add(id(layer.weight))
        bias = torch.zeros(()) if layer.bias is None else layer.bias
        bias = bias.reshape(-1, *[1] * (output.ndim - 2))
        level = _level(output - bias)
        layer.weight.div_(level)
        return (output - bias) / level + bias

    layers = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    if not layers:
        return
    with _attributes_kept(model):
        for layer in layers:
            layer.register_forward_hook(scale)
        forward_error(model, inputs, recipe)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give all modules the attributes back that they have now, and dictionaries what is in them.

    Classes install hooks as they run, and note that they have; the hooks that scale go too.
    """
    before = [
        (module, {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _level(output: torch.Tensor) -> float:
    """Return how much the output of a convolution differs from sample to sample.

    Never less than a part of the values themselves: where samples hardly differ, as in the means
    over an image, large values would saturate the gates that follow. Returns 1 for zeros.
    """
    differing = (output - output.mean(dim=0, keepdim=True)).square().mean().sqrt()
    level = float(torch.maximum(differing, output.square().mean().sqrt() / _LARGEST))
    return level if 0 < level < math.inf else 1.0
