"""The tensors in what a model returns, as numbers that can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_MASKED = 1e30
"""A larger score marks what is masked; beside it every difference would vanish."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a model's output, however it is nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def unmasked(scores: Tensor) -> Tensor:
    """Return scores with 0 in the place of masked ones.

    A head that is masked as a whole leaves nothing but zeros, as it does where no score is masked.
    """
    masked = scores.detach().abs() > _MASKED
    return scores.masked_fill(masked, 0.0) if bool(masked.any()) else scores


def largest_in(tensor: Tensor) -> float:
    """Return the largest absolute value of a tensor; 0 of one without elements."""
    if not tensor.numel():
        return 0.0
    values = tensor.detach()
    least, most = torch.aminmax(values.abs() if values.is_complex() else values)
    return max(-float(least), float(most))


def largest_by_name(tensors: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Return the largest absolute value of each tensor; 0: there is none."""
    return {name: 0.0 if one is None else largest_in(one) for name, one in tensors.items()}
