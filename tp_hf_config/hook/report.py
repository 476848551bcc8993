"""The report of one sync, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import as_range
from ..model.layer_entries import name_in_all_layers
from ..reports import MOST_LINES, Report, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..calibration.held_out import Refits


@dataclass(frozen=True, repr=False)
class SyncReport(Report):
    """One update of a model's config to match its weights.

    Attributes:
        step: number of this sync; the hook's first is 1.
        graph: dependency graph of the groups, and why that one was used.
        groups: groups pruned since the last sync; ``hook.cuts`` has the channels.
        fields: config field -> (old value, new value); ``None`` means unset.
        attributes: module attributes that were updated.
        buffers: non-persistent buffers that were updated.
        ties: tied weights that were made one Parameter again.
        proof: how the new config was proved; empty if it was not.
        parameters: number of parameters before and after; tied weights count once.
        seconds: wall-clock time of the sync.
        notes: what else the user should know.
        error: why no config fits; ``None`` if one does.
        inputs: encoder-state input (an encoder outside the model computes it) -> the channels that
            the model still reads, as numbered when the hook was attached.
        refits: the result of ``HFConfigSyncHook(refit=)``.
        ranked_by: what a calibration's importance ranked units by.
    """

    step: int
    graph: str = ""
    groups: Sequence[PrunedGroup] = ()
    fields: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    attributes: Sequence[str] = ()
    buffers: Sequence[str] = ()
    ties: Sequence[str] = ()
    proof: str = ""
    parameters: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    notes: Sequence[str] = ()
    error: str | None = None
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    refits: Refits | None = None
    ranked_by: list[str] = field(default_factory=list)
    most_lines = MOST_LINES

    def title(self) -> str:
        """Return what was pruned, and the config fields that changed."""
        graph = f" ({self.graph.split(':')[0]})" if self.graph else ""
        head = f"sync {self.step}: {_count(len(self.groups), 'group')} pruned{graph}"
        if self.error is not None:
            return f"{head}; the config is not updated: {self.error}"
        changes = ", ".join(f"{n} {a} -> {b}" for n, (a, b) in in_words(self.fields).items())
        return f"{head}; {changes or 'no config field changes'}"

    def lines(self) -> Iterator[str]:
        """Yield the number of parameters, the effect of refits, narrower inputs, and notes."""
        if self.error is not None:
            return
        before, after = self.parameters
        if before:
            yield f"  parameters: {before:,} -> {after:,} ({after / before:.1%})"
        if self.refits is not None:
            yield f"  {self.refits}"
        for name, channels in self.inputs.items():
            yield f"  {name}: this input now has {len(channels)} channels; report.inputs lists them"
        yield from (f"  note: {note}" for note in self.notes)

    def details(self) -> Iterator[str]:
        """Yield what ranked units, what else was updated, and how the config was proved."""
        if self.ranked_by not in ([], ["activation"]):
            yield f"  ranked by {' and '.join(self.ranked_by)}"
        updated = {"attribute": self.attributes, "buffer": self.buffers, "tie": self.ties}
        counts = ", ".join(_count(len(items), word) for word, items in updated.items() if items)
        if self.error is None:
            yield f"  {counts or 'nothing else'} updated; {self.proof}; {self.seconds:.2f} s"

    def plot(self, path: str | PathLike[str]) -> Figure:
        """Plot the widths of fields and layers before and after.

        Args:
            path: the file to write; its suffix sets the format, PNG without one.

        Raises:
            ImportError: matplotlib is missing.
        """
        from ..plots import plot_widths

        return plot_widths([self], path)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for ``json.dumps``, with the first layer of each group only."""
        groups = [
            {
                "root": group.root.name,
                "side": "out" if group.root.out else "in",
                "removed": group.root.removed,
                "of": group.root.before,
                "layers": len(group.layers),
            }
            for group in self.groups
            if group.layers
        ]
        return {**super().to_dict(), "groups": groups}


def in_words(fields: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[str, str]]:
    """Return field -> its old and new value as text; per-layer values of a field are ranges."""
    result: dict[str, tuple[str, str]] = {}
    of_layers: dict[str, list[tuple[Any, Any]]] = {}
    for name, (old, new) in fields.items():
        shared = name_in_all_layers(name)
        if shared == name:
            result[name] = str(old), str(new)
        else:
            of_layers.setdefault(shared, []).append((old, new))
    for name, changes in of_layers.items():
        olds, news = zip(*changes, strict=True)
        # "96" -> "64..70 in 4 layers"
        result[name] = as_range(olds), f"{as_range(news)} in {_count(len(changes), 'layer')}"
    return result


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


@dataclass(frozen=True)
class PrunedLayer:
    """One side of a layer in a pruned group, and how many channels it lost (``hook.cuts``: which).

    Attributes:
        name: name of the layer in the model that the pruner prunes.
        out: True if output channels were pruned, False if input channels.
        removed: number of pruned channels.
        before: number of channels before this step.
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
        """The layer at which the group was pruned."""
        return self.layers[0]


# a layer, and the channels that it loses, as numbered before
LayerCut = tuple[PrunedLayer, tuple[int, ...]]


def layers_of(graph: Any, group: Any) -> Iterator[LayerCut]:
    """Yield the layers of a pruning group, with the channels that it removes from each."""
    for dep, idxs in group:
        module, out = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
        side = graph.side_of(module, out)
        if side is not None and len(idxs):
            size = graph.get_out_channels(module) if out else graph.get_in_channels(module)
            name, is_output = side
            layer = PrunedLayer(name, is_output, len(idxs), size or 0)
            yield layer, tuple(map(int, idxs))
