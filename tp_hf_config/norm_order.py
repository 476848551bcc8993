"""Torch-Pruning's pruner of ``nn.LayerNorm`` keeps channels in no order; here it keeps theirs.

It takes what a Python ``set`` gives, and sorts a copy that it drops (``pruner/function.py:281``).
Sets of small numbers come in order only while they are dense: where more than half of the channels
go at once, the norm's weights stood at other channels than those that they were trained for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch_pruning import ops
from torch_pruning.pruner import function

_PRUNER: Any = function.PrunerBox[ops.OPTYPE.LN]
_CUT = "_prune_parameter_and_grad"
_lock = threading.Lock()
_inside = 0


@contextmanager
def channels_in_order() -> Iterator[None]:
    """While it lasts, layer norms that Torch-Pruning cuts keep their channels in order.

    It may end in another order than it began: an interactive step lasts as long as its user wants.
    """
    _count(+1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _inside
    with _lock:
        _inside += change
        if _inside:
            setattr(_PRUNER, _CUT, _cut_in_order)
        else:
            delattr(_PRUNER, _CUT)


def _cut_in_order(weight: nn.Parameter, keep_idxs: Any, pruning_dim: int) -> Any:
    cut = getattr(type(_PRUNER), _CUT)  # looked up now: another may record what is cut
    return cut(_PRUNER, weight, keep_idxs.sort().values, pruning_dim)
