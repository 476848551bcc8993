"""Record what a pruner prunes, group by group, as it happens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..model.surroundings import restore_attribute
from ..notebook import short


@dataclass(frozen=True)
class PrunedLayer:
    """One side of one layer in a pruned group, and the channels that it lost.

    Attributes:
        name: the layer's name in the model that the pruner prunes.
        out: True if output channels were pruned, False if input channels.
        removed: the pruned channels, as they were numbered before this prune.
        before: the number of channels before this prune.
    """

    name: str
    out: bool
    removed: tuple[int, ...]
    before: int

    def __repr__(self) -> str:
        return short(self, str(self))

    def __str__(self) -> str:
        side = "output" if self.out else "input"
        return f"{len(self.removed):,} of {self.before:,} {side} channels of {self.name}"


@dataclass(frozen=True)
class PrunedGroup:
    """A dependency group whose layers lost channels together; its first layer is the root."""

    layers: tuple[PrunedLayer, ...]

    def __repr__(self) -> str:
        first = str(self.root) if self.layers else "nothing"
        return short(self, f"{first}, in {len(self.layers)} layers")

    @property
    def root(self) -> PrunedLayer:
        """Return the layer at which the group was requested."""
        return self.layers[0]


class Recorder:
    """Records each group that one ``ConfigGraph`` hands out, at the moment it is pruned.

    Only this graph instance changes; :meth:`detach` restores it.
    """

    def __init__(self, graph: Any):
        self.graph = graph
        self._groups: list[PrunedGroup] = []

    def attach(self) -> None:
        """Start to record."""
        watched = vars(self.graph).get("get_pruning_group")
        if not isinstance(watched, _Watched):
            watched = self.graph.get_pruning_group = _Watched(self.graph)
        watched.recorders.append(self)

    def detach(self) -> None:
        """Stop recording; groups that were handed out earlier are not recorded any more."""
        watched = self.graph.get_pruning_group
        watched.recorders.remove(self)
        if not watched.recorders:
            watched.restore()

    def drain(self) -> list[PrunedGroup]:
        """Return the groups pruned since the last call."""
        groups, self._groups = self._groups, []
        return groups

    def note(self, group: PrunedGroup) -> None:
        """Add a pruned group to those that :meth:`drain` returns."""
        self._groups.append(group)


class _Watched:
    """Replaces one graph's ``get_pruning_group`` while recorders watch the graph."""

    def __init__(self, graph: Any):
        self.graph = graph
        self.recorders: list[Recorder] = []
        self._own = vars(graph).get("get_pruning_group")
        self._original = graph.get_pruning_group

    def __call__(self, module: Any, pruning_fn: Any, idxs: Any) -> Any:
        # for a ratio, BasePruner.manual_prune_width passes a tensor (base_pruner.py, 1.6.1): its
        # elements are not found among numbers, so nothing would be cut
        numbers = [int(index) for index in idxs] if isinstance(idxs, Iterable) else idxs
        group = self._original(module, pruning_fn, numbers)
        group.prune = partial(self._prune, group)
        return group

    def restore(self) -> None:
        """Give the graph its own ``get_pruning_group`` back."""
        restore_attribute(self.graph, "get_pruning_group", self._own)

    def _prune(self, group: Any, idxs: Any = None, record_history: bool = True) -> None:
        """Prune a group and record it; frozen parameters stay frozen."""
        prune = type(group).prune
        if idxs is not None:  # this prunes another group, recorded by itself
            prune(group, idxs, record_history)
            return
        layers = tuple(layers_of(self.graph, group))
        modules = [dep.target.module for dep, _ in group]
        frozen = [
            (module, name)
            for module in modules
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.requires_grad
        ]
        try:
            prune(group, None, record_history)
        finally:
            for recorder in self.recorders:
                recorder.note(PrunedGroup(layers))
            for module, name in frozen:  # Torch-Pruning's new Parameters all require gradients
                getattr(module, name).requires_grad_(False)


def layers_of(graph: Any, group: Any) -> Iterator[PrunedLayer]:
    """Yield the layers of a group with the channels that the group removes from each."""
    for dep, idxs in group:
        module, out = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
        side = graph.side_of(module, out)
        if side is None or not len(idxs):
            continue
        size = graph.get_out_channels(module) if out else graph.get_in_channels(module)
        name, is_output = side
        yield PrunedLayer(name, is_output, tuple(int(i) for i in idxs), size or 0)
