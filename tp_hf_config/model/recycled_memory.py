"""Memory for tensors that are read, used and freed in turn.

The first write to a page of new memory costs several times what copying the page does, so blocks
that were freed are handed out again.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_SMALLEST = 1 << 20  # bytes: the C library recycles smaller blocks by itself
_KEPT = 3  # blocks: a tensor that is read, what is selected of it, and what is written meanwhile
_blocks: list[Tensor] = []
_lock = Lock()


def recycled_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU with any values, in memory that was used before if possible."""
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALLEST:
        return torch.empty(shape, dtype=dtype)
    block = _take(size)
    view: Any = block.numpy()[:size]  # lives as long as the tensor's storage
    weakref.finalize(view, _give_back, block)
    return torch.from_numpy(view).view(dtype).view(tuple(shape))


def _take(size: int) -> Tensor:
    """Return the smallest free block of at least so many bytes, or a new one."""
    with _lock:
        for number, block in enumerate(_blocks):
            if block.nbytes >= size:
                return _blocks.pop(number)
    return torch.empty(size, dtype=torch.uint8)


def _give_back(block: Tensor) -> None:
    """Keep a block for the next tensor; the largest ones stay, sorted by size."""
    with _lock:
        _blocks.append(block)
        _blocks.sort(key=lambda each: each.nbytes)
        del _blocks[:-_KEPT]
