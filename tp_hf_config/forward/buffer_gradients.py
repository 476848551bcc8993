"""Let gradients reach the buffers of norms, so that experiments see what depends on them.

A batch norm with frozen statistics (DETR, RT-DETR, D-FINE) holds all it computes with as buffers,
which autograd does not follow by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.shortage import note_shortage
from ..model.tensors import owner, saved_buffers
from .observed_pass import PassResult, outputs_in_float64
from .run_recipe import RunRecipe


def followed_buffers(
    model: nn.Module, inputs: Mapping[str, Any], watched: Sequence[PassResult], recipe: RunRecipe
) -> frozenset[str]:
    """Return the names of the saved buffers of norms whose gradients a pass can compute.

    Tables of other modules stay out: the outputs may depend on some of them alone (MiniMax's decays
    of a text of one block), or have no gradient behind a choice (EnCodec's codebooks). Torch
    computes no gradients of its own batch norms' statistics. There are none at all if a pass fails
    with them: a class may write to a buffer.
    """
    buffers = {
        name: buffer
        for name, buffer in saved_buffers(model).items()
        if _is_norm(owner(model, name)[0])
    }
    if not buffers:
        return frozenset()
    try:
        with following(buffers.values()):
            outputs = outputs_in_float64(model, inputs, watched, recipe)
            depending = [output.sum() for output in outputs if output.requires_grad]
            total = torch.stack(depending).sum()
            torch.autograd.grad(total, list(buffers.values()), allow_unused=True)
    except RuntimeError as error:
        note_shortage(error)
        return frozenset()
    return frozenset(buffers)


def _is_norm(module: nn.Module) -> bool:
    """True if a module's own tensors are all vectors, and it is none of torch's batch norms."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    of_torch = isinstance(module, nn.modules.batchnorm._NormBase)
    return not of_torch and all(tensor.ndim <= 1 for tensor in own)


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
