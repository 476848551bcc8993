"""Torch-Pruning's iterative head pruning, mended for one pruner.

The schedule's ratios count from the start, but ``BasePruner._prune`` applies them to the heads that
are left (``math.ceil(ratio * len(head_imp))``, base_pruner.py, 1.6.1): a quarter of four heads in
three steps takes three of them.
"""

from __future__ import annotations

import math
from typing import Any


class HeadSchedule:
    """Stands in for one pruner's ``get_target_head_pruning_ratio``: ratios of the heads left."""

    def __init__(self, pruner: Any):
        self.pruner = pruner
        self._own = vars(pruner).get("get_target_head_pruning_ratio")
        self._from_start = pruner.get_target_head_pruning_ratio

    def attach(self) -> None:
        """Mend the pruner."""
        self.pruner.get_target_head_pruning_ratio = self

    def detach(self) -> None:
        """Leave the pruner as it was."""
        del self.pruner.get_target_head_pruning_ratio
        if self._own is not None:
            self.pruner.get_target_head_pruning_ratio = self._own

    def __call__(self, module: Any) -> float:
        """The share of the heads now left that has to go in this step."""
        ratio: float = self._from_start(module)
        initial = self.pruner.init_num_heads.get(module)
        left = self.pruner.num_heads.get(module)
        if self.pruner.global_pruning or not initial or not left:
            return ratio
        going = left - (initial - math.ceil(ratio * initial - 1e-9))
        return (going - 0.5) / left if going > 0 else 0.0  # its ceil makes this ``going`` again
