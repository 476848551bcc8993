"""A pruning group of the config graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_pruning import dependency

from .sides import GraphGroup


class ConfigGroup(dependency.Group):  # type: ignore[misc]
    """Whole units of one dependency group, as Torch-Pruning's ``Group``."""

    def __init__(
        self, graph: Any, graph_group: GraphGroup, units: Sequence[int], by_channel: bool = False
    ):
        super().__init__()
        self.by_channel = by_channel  # every channel of the root is an index: for importances
        self._DG = graph
        self.graph_group = graph_group
        self.units = list(units)

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """Record the group's units, or those of the root's channels ``idxs``; a hook cuts them."""
        group = self
        if idxs is not None:
            root = self[0].dep
            group = self._DG.get_pruning_group(root.target.module, root.handler, idxs)
        self._DG.recorded.add(group, record_history)
