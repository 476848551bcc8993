"""A pruning group of the config graph, which cuts whole units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch_pruning import dependency

from .norm_order import channels_in_order
from .sides import GraphGroup, Leaving, cut, settle

Watch = Callable[["ConfigGroup"], Callable[[], None]]
"""Looks at a group that is about to be pruned; what it returns is called when it is pruned."""


class ConfigGroup(dependency.Group):  # type: ignore[misc]
    """A pruning group that cuts whole units of a dependency group; its history names a layer.

    Args:
        graph: the ``ConfigGraph`` that makes it.
        graph_group: the dependency group.
        units: the units to cut.
    """

    def __init__(self, graph: Any, graph_group: GraphGroup, units: Sequence[int]):
        super().__init__()
        self._DG = graph
        self.graph_group = graph_group
        self.units = list(units)

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """Prune the group's units, or those of the root's channels ``idxs``, in every layer.

        A graph without a hook cuts them now; with one, as soon as a config describes what is left.
        """
        group = self
        if idxs is not None:
            root = self[0].dep
            group = self._DG.get_pruning_group(root.target.module, root.handler, idxs)
        self._DG.recorded.add(group, record_history)

    def cut(self, record_history: bool = True) -> None:
        """Cut the group's units from every layer."""
        settle(self.graph_group.sides, self._DG.cuts)
        record = min(self._group, key=lambda item: self._DG.history_rank(item.dep.target.module))
        entry = [
            self._DG.history_name(record.dep.target.module),
            self._DG.is_out_channel_pruning_fn(record.dep.handler),
            list(record.idxs),
        ]
        leaving = Leaving(self.units)
        pruned = [watch(self) for watch in self._DG.watchers]
        try:
            with channels_in_order(), self._frozen_as_before(), self._DG.cuts.together():
                for side in self.graph_group.sides:
                    cut(side, leaving, self._DG.cuts, self._DG.other_sides_of(side))
                self.graph_group.units.count -= len(self.units)
                if record_history:
                    self._DG._pruning_history.append(entry)
        finally:
            for record_as_pruned in pruned:
                record_as_pruned()

    @contextmanager
    def _frozen_as_before(self) -> Iterator[None]:
        """Freeze again what was frozen: Torch-Pruning's new Parameters all require gradients."""
        frozen = [
            (module, name)
            for module in {dep.target.module for dep, _ in self}
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.requires_grad
        ]
        try:
            yield
        finally:
            for module, name in frozen:
                getattr(module, name).requires_grad_(False)
