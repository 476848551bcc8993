"""Torch-Pruning's importances, asked for a few channels at a time.

Its magnitude and Taylor importances copy a whole weight three times over on the way to one number
per channel; memory for copies that large costs ten times what the arithmetic does.  A channel's
number depends on its own weights alone, so a few channels at a time give the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import _helpers
from torch_pruning.pruner import function

from .cuts import PIECE

_CHANNEL_BY_CHANNEL = {
    tp.importance.GroupMagnitudeImportance,
    tp.importance.MagnitudeImportance,
    tp.importance.LAMPImportance,
    tp.importance.GroupTaylorImportance,
    tp.importance.TaylorImportance,
}
_COLUMNS = 64  # the least, and what sums over rows take at a time: so they add in the same order


def takes_pieces(importance: Any) -> bool:
    """Whether an importance is one of those, and no subclass that may look further."""
    return type(importance) in _CHANNEL_BY_CHANNEL


def in_pieces(importance: Any, group: Any) -> Any:
    """What ``importance(group)`` is, by the same code, without copies of whole weights."""
    each = copy(importance)
    each._reduce = lambda values, roots: values  # every layer's, not yet joined
    each._normalize = lambda values, normalizer: values
    each.target_types = [*importance.target_types, _Columns]
    values: list[torch.Tensor] = []
    roots: list[Any] = []
    for item in group:
        found = [each([piece]) for piece in _pieces(item, tuple(importance.target_types))]
        if found[0] is None:  # no layer that it looks at
            continue
        for parts in zip(*found, strict=True):  # of the weight, and of the bias where it counts
            values.append(torch.cat(parts) if len(parts) > 1 else parts[0])
            roots.append(item.root_idxs)
    if not values:
        return None
    return importance._normalize(importance._reduce(values, roots), importance.normalizer)


def _pieces(item: Any, types: tuple[type, ...]) -> Iterator[Any]:
    """A group's item as several, each with some of its channels."""
    dep, idxs = item
    layer = dep.target.module
    weight = layer.weight if isinstance(layer, nn.Linear) and isinstance(layer, types) else None
    if weight is None or weight.nbytes <= PIECE or not idxs:
        yield item
    elif dep.handler == function.prune_linear_out_channels:
        rows = max(1, PIECE * len(weight) // weight.nbytes)
        for start in range(0, len(idxs), rows):
            yield _helpers.GroupItem(dep, idxs[start : start + rows])
    elif dep.handler == function.prune_linear_in_channels and idxs == [*range(weight.shape[1])]:
        columns = PIECE * weight.shape[1] // weight.nbytes // _COLUMNS * _COLUMNS
        for part in _columns(weight, max(columns, _COLUMNS)):
            target = SimpleNamespace(module=part, type=dep.target.type)
            some = SimpleNamespace(
                target=target, layer=part, handler=dep.handler, pruning_fn=dep.handler
            )
            yield _helpers.GroupItem(some, list(range(part.weight.shape[1])))
    else:
        yield item


class _Columns(nn.Linear):
    """Some columns of a linear layer's weight, and of its gradient."""

    def __init__(self, weight: torch.Tensor):
        nn.Module.__init__(self)
        vars(self).update(weight=weight, bias=None)


def _columns(weight: torch.Tensor, count: int) -> Iterator[_Columns]:
    grad = weight.grad
    starts = [*range(0, max(1, weight.shape[1] - _COLUMNS + 1), count)]
    for start, end in pairwise([*starts, weight.shape[1]]):
        part = weight.detach()[:, start:end]
        if grad is not None:
            part.grad = grad[:, start:end]
        yield _Columns(part)
