"""Ask Torch-Pruning's importances for a few channels at a time.

Its magnitude and Taylor importances copy a whole weight three times to get one number per channel,
and memory for such large copies costs ten times what the arithmetic does.  A channel's number
depends only on its own weights, so a few channels at a time give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import _helpers
from torch_pruning.pruner import function

from ..model.lazy_tensor import in_memory
from ..model.tensors import PIECE

_CHANNEL_BY_CHANNEL = {
    tp.importance.GroupMagnitudeImportance,
    tp.importance.MagnitudeImportance,
    tp.importance.LAMPImportance,
    tp.importance.GroupTaylorImportance,
    tp.importance.TaylorImportance,
}
_BY_SLICE = {tp.importance.GroupMagnitudeImportance}  # others sort the channels that they get
# the fewest columns of a piece; sums over rows take so many at a time, so the order of adding stays
_COLUMNS = 64


def takes_pieces(importance: Any) -> bool:
    """True if an importance is one of ``_CHANNEL_BY_CHANNEL``.

    A subclass is not: it may look at more than a channel's own weights.
    """
    return type(importance) in _CHANNEL_BY_CHANNEL


def in_pieces(importance: Any, group: Any) -> Any:
    """Return ``importance(group)``, by the same code, without copies of whole weights."""
    each = copy(importance)
    each._reduce = lambda values, roots: values  # those of each layer, not yet joined
    each._normalize = lambda values, normalizer: values
    each.target_types = [*importance.target_types, _Columns]
    values: list[torch.Tensor] = []
    roots: list[Any] = []
    types = tuple(importance.target_types)
    by_slice = type(importance) in _BY_SLICE
    for item in group:
        module = item.dep.target.module
        with in_memory(module) if isinstance(module, types) else nullcontext():
            results = [each([piece]) for piece in _pieces(item, types, by_slice)]
        if results[0] is None:  # the importance does not look at this layer
            continue
        for parts in zip(*results, strict=True):  # the weight's, and the bias's where it counts
            values.append(torch.cat(parts) if len(parts) > 1 else parts[0])
            roots.append(item.root_idxs)
    if not values:
        return None
    return importance._normalize(importance._reduce(values, roots), importance.normalizer)


def _pieces(item: Any, types: tuple[type, ...], by_slice: bool) -> Iterator[Any]:
    """Yield a group's item as several items, each with some of its channels.

    Items that need no splitting, or that cannot be split, are yielded whole.
    """
    dep, idxs = item
    layer = dep.target.module
    weight = layer.weight if isinstance(layer, nn.Linear) and isinstance(layer, types) else None
    if weight is None or weight.nbytes <= PIECE or not idxs:
        yield item
    elif dep.handler == function.prune_linear_out_channels:
        rows = max(1, PIECE * len(weight) // weight.nbytes)
        for start in range(0, len(idxs), rows):
            some = idxs[start : start + rows]
            yield _helpers.GroupItem(dep, _as_slice(some) if by_slice else some)
    elif dep.handler == function.prune_linear_in_channels and idxs == [*range(weight.shape[1])]:
        columns = PIECE * weight.shape[1] // weight.nbytes // _COLUMNS * _COLUMNS
        for part in _columns(weight, max(columns, _COLUMNS)):
            target = SimpleNamespace(module=part, type=dep.target.type)
            part_dep = SimpleNamespace(
                target=target, layer=part, handler=dep.handler, pruning_fn=dep.handler
            )
            yield _helpers.GroupItem(part_dep, list(range(part.weight.shape[1])))
    else:
        yield item


def _as_slice(idxs: list[int]) -> list[int] | slice:
    """Return channels as a slice if they follow each other: indexing by it copies nothing."""
    if idxs[-1] - idxs[0] == len(idxs) - 1 and idxs == [*range(idxs[0], idxs[-1] + 1)]:
        return slice(idxs[0], idxs[-1] + 1)
    return idxs


class _Columns(nn.Linear):
    """Some columns of a linear layer's weight, with their gradient."""

    def __init__(self, weight: torch.Tensor):
        nn.Module.__init__(self)
        vars(self).update(weight=weight, bias=None)


def _columns(weight: torch.Tensor, count: int) -> Iterator[_Columns]:
    """Yield a weight's columns in order, ``count`` at a time.

    The last piece has a few more where fewer than ``_COLUMNS`` would be left over.
    """
    grad = weight.grad
    starts = [*range(0, max(1, weight.shape[1] - _COLUMNS + 1), count)]
    for start, end in pairwise([*starts, weight.shape[1]]):
        part = weight.detach()[:, start:end]
        if grad is not None:
            part.grad = grad[:, start:end]
        yield _Columns(part)
