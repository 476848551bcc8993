"""Give a tiny model random weights, none of them trivial."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from ...model.tensors import compute_unsaved, saved_buffers


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

    Convolutions over images get twice as much: activations between them halve small values, and
    what the image changes would be lost beside the biases (MobileViT).
    """
    module = model.get_submodule(name.rpartition(".")[0])
    over_images = isinstance(module, nn.modules.conv._ConvNd) and parameter.ndim > 3
    divisor: float = _fan_in(module, parameter) ** 0.5 / (2 if over_images else 1)
    return torch.randn_like(parameter) / divisor


def _fan_in(module: nn.Module, parameter: torch.Tensor) -> int:
    """Return how many numbers a parameter sums up, as far as this keeps activations from growing.

    Stacks of convolutions have no norms between them, or batch norms, which do not divide by what
    they are given here. Without this, values behind them reach 1e11 (Mimi) or 1e17 (DETR), and hide
    what attention adds.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return prod(parameter.shape[2:]) * parameter.shape[0 if module.transposed else 1]
    return parameter.shape[-1]
