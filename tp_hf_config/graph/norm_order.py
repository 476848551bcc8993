"""Make Torch-Pruning's pruner of ``nn.LayerNorm`` keep channels in order.

The pruner takes the channels to keep from a Python ``set``, and sorts a copy that it drops
(``pruner/function.py:281``). A set of small numbers is in order only while it is dense: if more
than half of the channels go at once, the norm's weights end up at other channels than those that
they were trained for.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch_pruning import ops
from torch_pruning.pruner import function

_PRUNER: Any = function.PrunerBox[ops.OPTYPE.LN]
_CUT = "_prune_parameter_and_grad"
_lock = threading.Lock()
_inside: Counter[int] = Counter()
"""Thread -> how many blocks it has open."""


@contextmanager
def channels_in_order() -> Iterator[None]:
    """Keep the channels of layer norms that this thread cuts in order, inside ``with``.

    Blocks may overlap and end in any order: an interactive step lasts as long as its user wants.
    """
    thread = threading.get_ident()
    _count(thread, +1)
    try:
        yield
    finally:
        _count(thread, -1)


def _count(thread: int, change: int) -> None:
    """Count the open blocks: the first one patches the pruner, the last one restores it."""
    with _lock:
        _inside[thread] += change
        if _inside.total():
            setattr(_PRUNER, _CUT, _cut_in_order)
        else:
            delattr(_PRUNER, _CUT)
            _inside.clear()


def _cut_in_order(weight: nn.Parameter, keep_idxs: Any, pruning_dim: int) -> Any:
    """Cut as Torch-Pruning does; in a thread with an open block, sort the positions to keep."""
    cut = getattr(type(_PRUNER), _CUT)  # looked up now: others patch it to record cuts
    if _inside[threading.get_ident()]:
        keep_idxs = keep_idxs.sort().values
    return cut(_PRUNER, weight, keep_idxs, pruning_dim)
