"""What was pruned, group by group, for reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..reports import short


@dataclass(frozen=True)
class PrunedLayer:
    """One side of one layer in a pruned group, and how many channels it lost.

    Which ones says the hook's cut list.

    Attributes:
        name: the layer's name in the model that the pruner prunes.
        out: True if output channels were pruned, False if input channels.
        removed: the number of pruned channels.
        before: the number of channels before this step.
    """

    name: str
    out: bool
    removed: int
    before: int

    def __repr__(self) -> str:
        return short(self, str(self))

    def __str__(self) -> str:
        side = "output" if self.out else "input"
        return f"{self.removed:,} of {self.before:,} {side} channels of {self.name}"


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


@dataclass(frozen=True)
class LayerCut:
    """One side of one layer in a group that is cut, and the channels that it loses.

    Attributes:
        name: the layer's name in the model that the pruner prunes.
        out: True if it loses output channels, False if input channels.
        removed: the channels, as they are numbered before this cut.
        before: the number of channels before this step.
    """

    name: str
    out: bool
    removed: tuple[int, ...]
    before: int


@dataclass(frozen=True)
class GroupCut:
    """A dependency group whose layers lose channels together; its first layer is the root."""

    layers: tuple[LayerCut, ...]

    def counted(self) -> PrunedGroup:
        """Return it for a report, which keeps numbers of channels only."""
        return PrunedGroup(
            tuple(
                PrunedLayer(layer.name, layer.out, len(layer.removed), layer.before)
                for layer in self.layers
            )
        )


def layers_of(graph: Any, group: Any) -> Iterator[LayerCut]:
    """Yield the layers of a group with the channels that the group removes from each."""
    for dep, idxs in group:
        module, out = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
        side = graph.side_of(module, out)
        if side is None or not len(idxs):
            continue
        size = graph.get_out_channels(module) if out else graph.get_in_channels(module)
        name, is_output = side
        yield LayerCut(name, is_output, tuple(map(int, idxs)), size or 0)
