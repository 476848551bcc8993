"""Torch-Pruning's iterative head pruning, repaired for one pruner.

The schedule's ratios count from the start, but ``BasePruner._prune`` applies them to the heads that
are left (``math.ceil(ratio * len(head_imp))``, base_pruner.py, 1.6.1): a quarter of four heads in
three steps takes three of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class HeadSchedule:
    """Replaces one pruner's ``get_target_head_pruning_ratio`` by ratios of the heads that are left.

    Args:
        pruner: the pruner to repair.
        accepts: ``accepts(now, then)`` is True if the class takes ``then`` heads where it has
            ``now``; fewer heads go until it does.
    """

    def __init__(self, pruner: Any, accepts: Callable[[int, int], bool]):
        self.pruner, self.accepts = pruner, accepts
        self._own = vars(pruner).get("get_target_head_pruning_ratio")
        self._from_start = type(pruner).get_target_head_pruning_ratio

    def attach(self) -> None:
        """Repair the pruner, unless another hook has."""
        if not isinstance(self._own, HeadSchedule):
            self.pruner.get_target_head_pruning_ratio = self

    def detach(self) -> None:
        """Restore the pruner as it was."""
        if vars(self.pruner).get("get_target_head_pruning_ratio") is self:
            del self.pruner.get_target_head_pruning_ratio
            if self._own is not None:
                self.pruner.get_target_head_pruning_ratio = self._own

    def __call__(self, module: Any) -> float:
        """Return the share of the heads now left that has to go in this step."""
        if self._own is not None:
            ratio: float = self._own(module)
        else:
            ratio = self._from_start(self.pruner, module)
        initial = self.pruner.init_num_heads.get(module)
        now = self.pruner.num_heads.get(module)
        if self.pruner.global_pruning or not initial or not now:
            return ratio
        wanted = initial - math.ceil(ratio * initial - 1e-9)
        kept = next((n for n in range(max(wanted, 1), now) if self.accepts(now, n)), now)
        going = now - kept
        return (going - 0.5) / now if going > 0 else 0.0  # Torch-Pruning's ceil gives ``going``
