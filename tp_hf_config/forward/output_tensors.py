"""The tensors in what a model returns, as numbers that can be compared."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Return scores with masked ones as large as the largest other, and of the sign they had."""
    masked = scores.detach().abs() > _MASKED
    if not bool(masked.any()):
        return scores
    others = scores.masked_fill(masked, 0.0)
    largest = float(others.detach().abs().nan_to_num(0.0).max()) or 1.0
    return torch.where(masked, scores.detach().sign() * largest, others)
