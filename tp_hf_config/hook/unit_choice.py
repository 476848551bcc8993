"""Choose the units that a step removes, by the rules by which Torch-Pruning chooses channels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import _helpers
from torch_pruning.pruner import function
from torch_pruning.pruner.importance import OBDCImportance

from ..calibration.importance import holds_experts
from ..graph.pruner_access import BasePruner, Importance, Pruner, scope_of
from ..graph.sides import ConfigGroup, GraphGroup
from ..model.locate import check_has_data
from ..model.sharded import gathered
from ..model.tensors import PIECE

if TYPE_CHECKING:
    from ..planning.trajectory import Trajectory


def is_unmodified(pruner: Any) -> bool:
    """True if a pruner's step is Torch-Pruning's own.

    That step computes all importances before it prunes. Other steps may read weights at any time.
    """
    step = vars(pruner).get("step")
    own = getattr(step, "replaced", None) is None and "_prune" not in vars(pruner)
    return own and all(
        getattr(type(pruner), name) is getattr(BasePruner, name) for name in ("step", "_prune")
    )


@dataclass
class _Ranked:
    group: ConfigGroup  # with all of its units
    places: Tensor  # units that are removed together, ``(channel groups, places)``
    ratio: float  # share of the units removed by the end of this step
    values: Tensor  # importance of each place, mean over the channel groups, on the CPU


class UnitChoice:
    """Chooses units as ``BasePruner._prune`` chooses channels (base_pruner.py, 1.6.1).

    Scopes, thresholds and amounts are the same. Amounts are rounded per channel group to what the
    class accepts; Torch-Pruning compares them with the channels of all groups. Groups of whole
    heads are ranked alone, by the head ratios. If every key/value group has to lose the same number
    of heads, or every group of a router as many experts, each loses its own least important ones.
    """

    def __init__(self, pruner: Pruner):
        self.pruner = pruner
        self.preflight: Trajectory | None = None  # the units that each step leaves, if known
        self.valued = False  # the importance has given some group a value
        # ranked together, groups have lost rounded numbers: for these tools ("": the default grid)
        self._rounded_for: dict[str, None] = {}

    @torch.no_grad()
    def groups(self) -> Iterator[ConfigGroup]:
        if self.pruner.current_step > self.pruner.iterative_steps:
            warnings.warn(
                "Pruning exceed the maximum iterative steps, no pruning will be performed.",
                stacklevel=2,
            )
            return
        for name, members in self._scopes().items():
            yield from self._of_scope(name, members)

    def _scopes(self) -> dict[str, list[_Ranked]]:
        pruner, graph = self.pruner, self.pruner.DG
        scopes: dict[str, list[_Ranked]] = {}
        for graph_group in graph.groups_to_prune(pruner.ignored_layers, pruner.root_module_types):
            group = graph.group_at(graph_group, range(graph_group.units.count))
            if not pruner._check_pruning_ratio(group):
                continue
            values = self._importance_of(group)
            if values is None:
                continue
            by_group = values.view(graph_group.count.channel_groups, -1)
            places = torch.arange(values.numel()).view(by_group.shape)
            if self._ranks_each_channel_group(group):
                by_group, order = by_group.sort(dim=1, stable=True)
                places = places.gather(1, order.cpu())
            values = by_group.mean(dim=0).cpu() if len(by_group) > 1 else by_group[0].cpu()
            name, ratios = scope_of(pruner, group)
            ranked = _Ranked(group, places, ratios[pruner.current_step], values)
            scopes.setdefault(name, []).append(ranked)
        return scopes

    def _of_scope(self, name: str, members: list[_Ranked]) -> Iterator[ConfigGroup]:
        pruner, graph = self.pruner, self.pruner.DG
        together = torch.cat([ranked.values for ranked in members])
        initial = pruner._scope_initial_channels.setdefault(name, len(together))
        lost = len(together) - int(initial * (1 - members[0].ratio))
        if lost <= 0:
            return
        lowest = torch.topk(together, k=lost, largest=False)
        for ranked in members:
            wanted = lost
            if len(members) > 1 or pruner.global_pruning:
                wanted = int((ranked.values <= lowest.values[-1]).sum())
            count = self._rounded(ranked.group.graph_group, wanted) if wanted else 0
            units = ranked.places[:, ranked.values.argsort()[:count]].flatten().sort().values
            chosen = graph.group_at(ranked.group.graph_group, units.tolist())
            if isinstance(pruner.importance, OBDCImportance):
                pruner.importance.adjust_fisher(ranked.group, chosen[0].idxs)
            if graph.check_pruning_group(chosen):
                yield chosen

    def _rounded(self, graph_group: GraphGroup, lost: int) -> int:
        """Return how many of ``lost`` places are removed so that the class accepts the rest."""
        count, now = graph_group.count, graph_group.units.count
        units = None
        if self.preflight is not None:
            units = self.preflight.units_left(graph_group, self.pruner.current_step)
        if units is None:
            wanted = now - lost * count.channel_groups
            if self.pruner.round_to is None:
                units = count.near(wanted / count.per_field_unit, now)
                if units not in (None, wanted):
                    self._rounded_for[count.grid.target] = None
            if units is None:
                units = count.rounded(wanted, now, self.pruner.round_to or 1)
        return max(0, (now - units) // count.channel_groups)

    def _ranks_each_channel_group(self, group: ConfigGroup) -> bool:
        """True if each channel group loses its own least important units, not the same places."""
        # Torch-Pruning ranks places of grouped channels by their mean over the groups, but
        # grouped-query heads within each key/value group
        pruner, graph_group = self.pruner, group.graph_group
        alone = graph_group.heads or not (pruner.global_pruning or pruner.isomorphic)
        return graph_group.count.channel_groups > 1 and (
            (graph_group.root is None and alone) or holds_experts(group, pruner.DG.pretrained)
        )

    def _importance_of(self, group: ConfigGroup) -> Tensor | None:
        """Return the importance of a group's units, ``(units,)``; ``None`` if it has none."""
        try:
            values: Tensor | None = self.pruner.DG.importance_of(group, self._estimate)
        except (AttributeError, TypeError) as error:  # the importance reads a gradient that is None
            if any(parameter.grad is not None for parameter in self.pruner.model.parameters()):
                raise
            raise ValueError(
                f"{type(self.pruner.importance).__name__} fails ({type(error).__name__}: {error}), "
                "and no parameter has a gradient. Importances such as Taylor's need gradients: run "
                "loss.backward() on some data before pruner.step(). Nothing is pruned yet."
            ) from error
        if values is not None and values.is_meta:
            check_has_data(self.pruner.DG.pretrained)
        self.valued |= values is not None
        return values

    def _estimate(self, group: ConfigGroup) -> Any:
        pruner: Any = self.pruner
        own = type(pruner).estimate_importance is BasePruner.estimate_importance
        # a subclass of such an importance may read more than a channel's weights
        by_channel = type(pruner.importance) in _CHANNEL_BY_CHANNEL
        if own and by_channel and "estimate_importance" not in vars(pruner):
            return _in_pieces(pruner.importance, group)
        with _gathered(group, group):
            return pruner.estimate_importance(group)

    def notes(self, pruned: bool) -> list[str]:
        """Return what a step did differently from the ratios, or why it pruned nothing."""
        step, lines = self.pruner.current_step, list[str]()
        if self.preflight is not None and (pruned or not self.preflight.changes(step)):
            lines = self.preflight.notes(step)
        for target in self._rounded_for if self.preflight is None and pruned else ():
            default = "multiples of 64, 32, 16 or 8 that are near (round_to=1: exactly the ranking)"
            lines.append(f"widths are rounded to {f'what {target} takes' if target else default}")
        return lines if pruned or lines else [f"nothing was pruned: {self._why_nothing()}"]

    def _why_nothing(self) -> str:
        pruner, step = self.pruner, self.pruner.current_step
        if step > pruner.iterative_steps:
            return (
                "the pruner has already taken all its steps "
                f"(iterative_steps={pruner.iterative_steps})"
            )
        groups = pruner.DG.groups_to_prune(pruner.ignored_layers, pruner.root_module_types)
        if not any(True for _ in groups):
            return "the settings exclude every group (prune=, ignored_layers=, root_module_types=)"
        if not self.valued:
            name = type(pruner.importance).__name__
            return (
                f"{name} returned no importance for any group (it may need gradients, or batch "
                "norms)"
            )
        ratios = (pruner.per_step_pruning_ratio, *pruner.pruning_ratio_dict.values())
        if not any(by_step[step] for by_step in (*ratios, pruner.per_step_head_pruning_ratio)):
            return "all ratios are 0"
        return (
            "the ratios ask for less than one unit of each group, or no group that the step "
            "yielded was pruned"
        )


_CHANNEL_BY_CHANNEL = {
    tp.importance.GroupMagnitudeImportance,
    tp.importance.MagnitudeImportance,
    tp.importance.LAMPImportance,
    tp.importance.GroupTaylorImportance,
    tp.importance.TaylorImportance,
}
# fewest columns of a piece: sums over rows take this many at a time, in the same order
_COLUMNS = 64


def _gathered(group: ConfigGroup, items: Iterable[Any]) -> AbstractContextManager[None]:
    """While open, the items' layers have whole weights if FSDP2 keeps them in shards."""
    names = (group._DG.layer_name(item.dep.target.module) for item in items)
    return gathered(group._DG.pretrained, filter(None, names))


def _in_pieces(importance: Importance, group: Any) -> Any:
    each: Any = copy(importance)
    each._reduce = lambda values, roots: values  # those of each layer, not yet joined
    each._normalize = lambda values, normalizer: values
    each.target_types = [*importance.target_types, _Columns]
    values: list[torch.Tensor] = []
    roots: list[Any] = []
    types = tuple(importance.target_types)
    by_slice = type(importance) is tp.importance.GroupMagnitudeImportance  # others sort indices
    for item in group:
        module = item.dep.target.module
        with _gathered(group, [item] if isinstance(module, types) else []):
            results = [each([piece]) for piece in _pieces(item, types, by_slice)]
        if results[0] is None:  # the importance does not look at this layer
            continue
        for parts in zip(*results, strict=True):  # the weight's, and the bias's where it counts
            values.append(torch.cat(parts) if len(parts) > 1 else parts[0])
            roots.append(item.root_idxs)
    if not values:
        return None
    return importance._normalize(importance._reduce(values, roots), importance.normalizer)


def _pieces(item: Any, types: tuple[type, ...], by_slice: bool) -> Iterator[Any]:
    """Yield an item as several items with some of its channels each, if needed and possible."""
    dep, idxs = item
    layer = dep.target.module
    weight = layer.weight if isinstance(layer, nn.Linear) and isinstance(layer, types) else None
    if weight is None or weight.nbytes <= PIECE or not idxs:
        yield item
    elif dep.handler == function.prune_linear_out_channels:
        rows = max(1, PIECE * len(weight) // weight.nbytes)
        for start in range(0, len(idxs), rows):
            some = idxs[start : start + rows]
            yield _helpers.GroupItem(dep, _as_slice(some) if by_slice else some)
    elif dep.handler == function.prune_linear_in_channels and idxs == [*range(weight.shape[1])]:
        columns = PIECE * weight.shape[1] // weight.nbytes // _COLUMNS * _COLUMNS
        for part in _columns(weight, max(columns, _COLUMNS)):
            target = SimpleNamespace(module=part, type=dep.target.type)
            part_dep = SimpleNamespace(
                target=target, layer=part, handler=dep.handler, pruning_fn=dep.handler
            )
            yield _helpers.GroupItem(part_dep, list(range(part.weight.shape[1])))
    else:
        yield item


def _as_slice(idxs: list[int]) -> list[int] | slice:
    """Return adjacent channels as a slice: indexing by it copies nothing."""
    if idxs[-1] - idxs[0] == len(idxs) - 1 and idxs == [*range(idxs[0], idxs[-1] + 1)]:
        return slice(idxs[0], idxs[-1] + 1)
    return idxs


class _Columns(nn.Linear):
    def __init__(self, weight: torch.Tensor):
        nn.Module.__init__(self)
        vars(self).update(weight=weight, bias=None)


def _columns(weight: torch.Tensor, count: int) -> Iterator[_Columns]:
    """Yield a weight's columns in order, ``count`` at a time; the last piece may have more."""
    grad = weight.grad
    # no piece has fewer than _COLUMNS
    starts = [*range(0, max(1, weight.shape[1] - _COLUMNS + 1), count)]
    for start, end in pairwise([*starts, weight.shape[1]]):
        part = weight.detach()[:, start:end]
        if grad is not None:
            part.grad = grad[:, start:end]
        yield _Columns(part)
