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
    """Return random values for a matrix, divided by the square root of its fan-in."""
    spread: float = _fan_in(model, name, parameter) ** 0.5
    return torch.randn_like(parameter) / spread


def _fan_in(model: nn.Module, name: str, parameter: torch.Tensor) -> int:
    """Return how many numbers a parameter sums up, as far as this keeps activations from growing.

    Stacks of convolutions over sound have no norms between them. Without this, values behind them
    reach 1e11, and hide what attention adds (Mimi).
    """
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return prod(parameter.shape[2:]) * parameter.shape[0 if module.transposed else 1]
    return parameter.shape[-1]
