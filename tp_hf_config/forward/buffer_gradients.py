"""Let gradients reach buffers, so that experiments see what depends on them.

A batch norm with frozen statistics (DETR, RT-DETR, D-FINE) holds all it computes with as buffers,
which autograd does not follow by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.tensors import owner, saved_buffers
from .observed_pass import PassResult, outputs_in_float64
from .run_recipe import RunRecipe


def followed_buffers(
    model: nn.Module, inputs: Mapping[str, Any], watched: Sequence[PassResult], recipe: RunRecipe
) -> frozenset[str]:
    """Return the names of the saved buffers whose gradients a pass can compute.

    Torch computes none of the statistics of its own batch norms. There are none at all if a pass
    fails with them: a class may write to a buffer.
    """
    buffers = {
        name: buffer
        for name, buffer in saved_buffers(model).items()
        if not isinstance(owner(model, name)[0], nn.modules.batchnorm._NormBase)
    }
    if not buffers:
        return frozenset()
    try:
        with following(buffers.values()):
            outputs = outputs_in_float64(model, inputs, watched, recipe)
            depending = [output.sum() for output in outputs if output.requires_grad]
            total = torch.stack(depending).sum()
            torch.autograd.grad(total, list(buffers.values()), allow_unused=True)
    except RuntimeError:
        return frozenset()
    return frozenset(buffers)


@contextmanager
def following(tensors: Iterable[Tensor]) -> Iterator[None]:
    """While open, autograd follows these tensors."""
    followed = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in followed:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in followed:
            tensor.requires_grad_(False)
