"""What Torch-Pruning's traced groups cut: tensor dims, and which channels go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...model.versions import graph_module as tp_graph
from ..pruner_access import given_ratios

Key = tuple[nn.Parameter, int]
"""A parameter and one of its dimensions; a tied weight is one parameter."""
UNTOUCHED, MIXED = -1, -2
_Conv = nn.modules.conv._ConvNd
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_KEPT = "_groups_of_the_constructor"


@dataclass(frozen=True)
class TracedGroup:
    """A group that a pruner may prune.

    Attributes:
        root: the name of the layer that it starts at.
        pieces: (parameter, dimension) that it cuts -> pairs of positions along it and the root's
            channels that they go with.
        ways: one tensor for each way in which the pruner chooses channels (dimensions of all heads,
            whole heads): a label for each channel of the root; channels that only go together have
            the same one.
        opaque: parameters of its layers of which it is unknown what is cut.
        notes: why some of it is unknown.
    """

    root: str
    pieces: Mapping[Key, Sequence[tuple[list[int], list[int]]]]
    ways: Sequence[Tensor]
    opaque: Sequence[nn.Parameter] = ()
    notes: Sequence[str] = ()

    def cuts(self, together: Tensor) -> dict[Key, Tensor]:
        """Return, for each dimension that is cut, the label that each position goes with.

        Args:
            together: a label for each channel of the root, one of ``ways``.

        Returns:
            (parameter, dimension) -> a label per position, shape ``(size,)``. ``UNTOUCHED``: the
            position goes with no channel; ``MIXED``: with several that have different labels.
        """
        everything = list(range(len(together)))
        result: dict[Key, Tensor] = {}
        for (parameter, dim), pieces in self.pieces.items():
            size = parameter.shape[dim]
            if size == len(everything) and pieces == [(everything, everything)]:
                result[parameter, dim] = together
                continue
            positions = torch.tensor([p for where, _ in pieces for p in where])
            going = together[torch.tensor([r for _, roots in pieces for r in roots])]
            if int(positions.max()) >= size:
                result[parameter, dim] = torch.full((size,), MIXED)
                continue
            none = torch.full((size,), UNTOUCHED)
            low = none.scatter_reduce(0, positions, going, "amin", include_self=False)
            high = none.scatter_reduce(0, positions, going, "amax", include_self=False)
            result[parameter, dim] = torch.where(low == high, low, MIXED)
        return result


@contextmanager
def keeping_groups() -> Iterator[None]:
    """Make graphs keep the groups that they list: finding them is most of a constructor's time.

    If paths of the trace meet, Torch-Pruning keeps one root of a channel and drops the others
    (dependency/group.py, ``add_and_merge``); groups made inside ``with`` remember the dropped ones.
    """
    if hasattr(tp_graph.Group, "dropped"):  # another hook has patched it already
        yield
        return
    original = tp_graph.Group
    listing = tp_graph.DependencyGraph.get_all_groups

    class KeepingGroup(original):  # type: ignore[valid-type, misc]
        """A group that remembers the roots that merging drops."""

        dropped: Sequence[tuple[Any, Any]] = ()

        def __init__(self) -> None:
            super().__init__()
            self._roots: dict[Any, dict[int, int]] = {}

        def add_and_merge(self, dep: Any, idxs: Any) -> None:
            key = (id(dep.target), dep.handler)
            if key in self._roots:
                roots = self._roots[key]
                if not roots:
                    first = next(i for d, i in self._group if (id(d.target), d.handler) == key)
                    roots |= {index.idx: index.root_idx for index in first}
                self.dropped = [
                    *self.dropped,
                    *(
                        (dep, index)
                        for index in idxs
                        if roots.setdefault(index.idx, index.root_idx) != index.root_idx
                    ),
                ]
            else:
                self._roots[key] = {}  # filled when a second path comes
            super().add_and_merge(dep, idxs)

    def get_all_groups(graph: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        groups = []
        for group in listing(graph, *args, **kwargs):
            groups.append(group)
            yield group
        vars(graph)[_KEPT] = groups

    try:
        tp_graph.Group = KeepingGroup
        tp_graph.DependencyGraph.get_all_groups = get_all_groups
        yield
    finally:
        tp_graph.Group = original
        tp_graph.DependencyGraph.get_all_groups = listing


def listed_groups(pruner: Any) -> list[Any]:
    """Return the groups of a pruner's graph; they are listed once, until :func:`forget_groups`."""
    if _KEPT not in vars(pruner.DG):
        vars(pruner.DG)[_KEPT] = list(
            pruner.DG.get_all_groups(
                ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
            )
        )
    groups: list[Any] = vars(pruner.DG)[_KEPT]
    return groups


def forget_groups(graph: Any) -> None:
    """Make a graph list its groups anew from here on, because they are going to change."""
    vars(graph).pop(_KEPT, None)


def traced_groups(pruner: Any) -> Iterator[TracedGroup]:
    """Yield the groups that a pruner's ratios prune."""
    graph = pruner.DG
    with keeping_groups():
        for group in listed_groups(pruner):
            root = graph._module2name.get(group[0].dep.target.module, "")
            attention, layers = pruner._is_atten_group(group)
            if attention:  # the pruner starts such a group at another layer
                group = pruner._downstream_node_as_root_if_attention(group)
            if group is not None and _ratio(pruner, group) > 0:
                yield _read(pruner, group, root, layers)


def _ratio(pruner: Any, group: Any) -> float:
    """Return the largest ratio of any step for a group, looked up as ``BasePruner._prune`` does."""
    given = given_ratios(pruner, group)
    return float(max(pruner.per_step_pruning_ratio if given is None else given[1]))


def _read(pruner: Any, group: Any, root: str, heads: Sequence[nn.Module]) -> TracedGroup:
    """Return what a traced group cuts.

    Args:
        pruner: the pruner.
        group: Torch-Pruning's group.
        root: the name of the layer that it starts at.
        heads: the layers in it that are split into heads.
    """
    graph = pruner.DG
    pieces: dict[Key, list[tuple[list[int], list[int]]]] = {}
    opaque: list[nn.Parameter] = []
    notes: list[str] = []
    kept = [(item.dep, item.idxs, item.root_idxs) for item in group.items]
    dropped = [(dep, [index.idx], [index.root_idx]) for dep, index in group.dropped]
    for dep, positions, roots in kept + dropped:
        module = dep.target.module
        if not isinstance(module, nn.Parameter) and module not in graph._module2name:
            continue  # an operation, not a layer
        keys = _cut(graph, dep)
        if keys is None:
            opaque += module.parameters()
            notes.append(f"what is cut of a {type(module).__name__} is not known")
        for key in keys or ():
            pieces.setdefault(key, []).append((positions, roots))
    channels = torch.arange(len(group[0].idxs))
    ways: list[Tensor] = []
    if not heads or pruner.prune_head_dims:
        ways.append(channels % max(1, len(channels) // pruner._get_channel_groups(group)))
    if heads and pruner.prune_num_heads and _head_ratio(pruner, heads[0]) > 0:
        counts = {pruner.num_heads[module] for module in heads}
        if len(counts) == 1:
            ways.append(channels // max(1, len(channels) // min(counts)))
        else:
            notes.append("query heads are cut without the key and value heads that they share")
    return TracedGroup(root, pieces, ways, opaque, notes)


def _head_ratio(pruner: Any, module: nn.Module) -> float:
    """Return the largest head ratio of any step for a layer."""
    ratios = pruner.per_step_head_pruning_ratio
    return float(max(pruner.head_pruning_ratio_dict.get(module, ratios)))


def _cut(graph: Any, dep: Any) -> list[Key] | None:
    """Return what one item of a group cuts, as parameters with a dimension; None if unknown."""
    module = dep.target.module
    if isinstance(module, nn.Parameter):
        return [(module, dep.target.pruning_dim)]
    if type(module) in graph.CUSTOMIZED_PRUNERS or module in graph.CUSTOMIZED_PRUNERS:
        return None
    out = graph.is_out_channel_pruning_fn(dep.handler)
    turned = bool(getattr(module, "transposed", False))
    if isinstance(module, nn.Embedding):
        dims = {"weight": 1}
    elif isinstance(module, _NORMS):
        dims = {"weight": -1, "bias": -1}
    elif isinstance(module, (nn.Linear, _Conv)) and out:
        dims = {"weight": 1 if turned else 0, "bias": 0}
    elif isinstance(module, (nn.Linear, _Conv)) and getattr(module, "groups", 1) == 1:
        dims = {"weight": 0 if turned else 1}
    else:
        return None
    own = module._parameters
    present = [(own[key], dim) for key, dim in dims.items() if own.get(key) is not None]
    return [(parameter, dim % parameter.ndim) for parameter, dim in present]
