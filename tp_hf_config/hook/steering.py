"""Answer one pruner's questions in whole units, and restore the pruner afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning.pruner.algorithms.base_pruner as tp_base

from ..graph.config_group import ConfigGroup
from ..graph.sides import GraphGroup
from ..model.surroundings import restore_attribute
from .chunked_importance import in_pieces, takes_pieces

if TYPE_CHECKING:
    from ..planning.preflight import Preflight


def is_unmodified(pruner: Any) -> bool:
    """True if a pruner's step is Torch-Pruning's own.

    Torch-Pruning's step asks for every importance before it prunes the first group, and reads no
    weight afterwards.  Any other step may read weights at any time.
    """
    step = vars(pruner).get("step")
    own = getattr(step, "replaced", None) is None and "_prune" not in vars(pruner)
    return own and _inherits(pruner, _STEP)


_STEP, _ESTIMATE = ("step", "_prune"), ("estimate_importance",)
_BASE = {name: getattr(tp_base.BasePruner, name) for name in (*_STEP, *_ESTIMATE)}


def _inherits(pruner: Any, names: Iterable[str]) -> bool:
    """True if a pruner's class has Torch-Pruning's own methods of these names."""
    return all(getattr(type(pruner), name) is _BASE[name] for name in names)


class UnitSteering:
    """Answers one pruner's questions about a group in whole units.

    ``estimate_importance`` returns one value per unit, also where a unit is several channels wide.
    ``_get_channel_groups`` returns the channel groups inside which units are interchangeable.
    ``_round_to`` rounds each group to a number that the class accepts for its field; it compares
    the units of one channel group with the units of one channel group, while Torch-Pruning compares
    them with all units (base_pruner.py, 1.6.1).  Groups of whole heads are ranked on their own, at
    the pruner's head ratios; where every key/value group has to lose the same number of heads, each
    loses its own least important ones.

    Attributes:
        preflight: what the preflight says that each step leaves; ``None`` where it is not known.
        valued: True once the importance has given some group a value.
    """

    _NAMES = ("estimate_importance", "_get_channel_groups", "_is_atten_group", "_round_to")

    def __init__(self, pruner: Any):
        self.pruner = pruner
        self._own = {name: vars(pruner).get(name) for name in self._NAMES}
        self._estimate = pruner.estimate_importance
        self._channel_groups = pruner._get_channel_groups
        self._attention = pruner._is_atten_group
        self._round = pruner._round_to
        self._group: Any = None
        self._ranked: Any = None
        self.preflight: Preflight | None = None
        self.valued = False

    def attach(self) -> None:
        """Install the answers; each group of heads gets a ranking scope and the head ratios."""
        for name in self._NAMES:
            setattr(self.pruner, name, getattr(self, name))
        for number, graph_group in enumerate(self._head_groups()):
            scope = (f"heads {number}", [graph_group.units])
            self.pruner._layer_to_scope[graph_group.units] = scope
            self.pruner.pruning_ratio_dict[graph_group.units] = self._head_ratios(graph_group)

    def detach(self) -> None:
        """Restore the pruner as it was before :meth:`attach`."""
        for graph_group in self._head_groups():
            self.pruner._layer_to_scope.pop(graph_group.units, None)
            self.pruner.pruning_ratio_dict.pop(graph_group.units, None)
        for name, own in self._own.items():
            if vars(self.pruner).get(name) == getattr(self, name):
                restore_attribute(self.pruner, name, own)

    def estimate_importance(self, group: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the importance of a group's units, shape ``(units,)``; ``None`` if it has none.

        Raises:
            ValueError: the importance fails, and no parameter has a gradient.
        """
        try:
            values = self._importance_of(group, *args, **kwargs)
        except (AttributeError, TypeError) as error:  # the importance reads a gradient that is None
            if any(parameter.grad is not None for parameter in self.pruner.model.parameters()):
                raise
            raise ValueError(
                f"{type(self.pruner.importance).__name__} fails ({type(error).__name__}: {error}), "
                "and no parameter has a gradient, which importances such as Taylor's are made of. "
                "Run loss.backward() on some data before pruner.step(). Nothing is pruned yet."
            ) from error
        self.valued |= values is not None
        return values

    def notes(self, pruned: bool) -> list[str]:
        """Return what a step did instead of what the ratios ask for, or why it pruned nothing.

        ``pruned``: whether it pruned any group.
        """
        step, lines = self.pruner.current_step, list[str]()
        if self.preflight is not None and (pruned or not self.preflight.changes(step)):
            lines = self.preflight.notes(step)
        return lines if pruned or lines else [f"nothing was pruned: {self._why_nothing()}"]

    def _why_nothing(self) -> str:
        """Return the reason why a step pruned no group."""
        pruner, step = self.pruner, self.pruner.current_step
        if step > pruner.iterative_steps:
            return f"all steps of the pruner were taken (iterative_steps={pruner.iterative_steps})"
        graph = pruner.DG
        if not any(
            True for _ in graph.groups_to_prune(pruner.ignored_layers, pruner.root_module_types)
        ):
            return "no group takes part (prune=, ignored_layers=, root_module_types=)"
        if not self.valued:
            name = type(pruner.importance).__name__
            return f"{name} gave no value to any group (it may need gradients, or batch norms)"
        ratios = (pruner.per_step_pruning_ratio, *pruner.pruning_ratio_dict.values())
        if not any(by_step[step] for by_step in (*ratios, pruner.per_step_head_pruning_ratio)):
            return "all ratios are 0"
        return "less than one unit of each was to go, or no group that the step gave was pruned"

    def _importance_of(self, group: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a group's importance, or its units' ranks where ``_ranks_each_group`` says so."""
        ranked, self._ranked = self._ranked, None
        if isinstance(group, ConfigGroup):
            values = self.pruner.DG.importance_of(
                group, lambda each: self._estimate_group(each, *args, **kwargs)
            )
            return values if ranked is not group or values is None else _ranks(group, values)
        return self._estimate(group, *args, **kwargs)

    def _head_groups(self) -> list[GraphGroup]:
        """Return the groups whose units are whole heads."""
        return [graph_group for graph_group in self.pruner.DG.graph_groups if graph_group.heads]

    def _head_ratios(self, graph_group: GraphGroup) -> list[float]:
        """Return a group's head ratio at each step; ``head_pruning_ratio_dict`` comes first."""
        pruner = self.pruner
        if not pruner.prune_num_heads:
            return [0.0] * len(pruner.per_step_head_pruning_ratio)
        by_module = pruner.head_pruning_ratio_dict
        own = (by_module[side.module] for side in graph_group.sides if side.module in by_module)
        ratios: list[float] = next(own, pruner.per_step_head_pruning_ratio)
        return ratios

    def _estimate_group(self, group: ConfigGroup, *args: Any, **kwargs: Any) -> Any:
        importance = self.pruner.importance
        own = self._own["estimate_importance"] is None and _inherits(self.pruner, _ESTIMATE)
        if own and takes_pieces(importance) and not args and not kwargs:
            return in_pieces(importance, group)
        return self._estimate(group, *args, **kwargs)

    def _get_channel_groups(self, group: Any) -> int:
        if isinstance(group, ConfigGroup):
            if self._ranks_each_group(group.graph_group):
                self._ranked = group  # the pruner asks next for the importance to rank it by
                return 1
            return group.graph_group.count.channel_groups
        channel_groups: int = self._channel_groups(group)
        return channel_groups

    def _ranks_each_group(self, graph_group: GraphGroup) -> bool:
        """True if each channel group loses its own least important units.

        If not, all channel groups lose units at the same positions.  Torch-Pruning ranks positions
        of grouped channels by their mean over the channel groups, but grouped-query heads inside
        each key/value group.
        """
        pruner = self.pruner
        alone = graph_group.heads or not (pruner.global_pruning or pruner.isomorphic)
        return (
            graph_group.count.channel_groups > 1
            and graph_group.root is None
            and alone
            and bool(pruner.round_to)
        )

    def _is_atten_group(self, group: Any) -> Any:
        self._group = group  # the pruner asks this right before it rounds the group
        if isinstance(group, ConfigGroup):
            return False, []  # heads are units here; Torch-Pruning need not count them
        return self._attention(group)

    def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
        if not isinstance(self._group, ConfigGroup):
            rounded: int = self._round(n_pruned, current_channels, round_to)
            return rounded
        graph_group, count = self._group.graph_group, self._group.graph_group.count
        together = count.channel_groups if self._ranks_each_group(graph_group) else 1
        now = graph_group.units.count
        units = None
        if self.preflight is not None:
            units = self.preflight.units_left(graph_group, self.pruner.current_step)
        if units is None:
            remaining = (now // count.channel_groups * together - n_pruned) // together
            units = count.rounded(remaining * count.channel_groups, now, round_to)
        return (now - units) // count.channel_groups * together


def _ranks(group: ConfigGroup, values: torch.Tensor) -> torch.Tensor:
    """Return each unit's rank in its channel group, 0 for the least important: shape ``(units,)``.

    Ranked this way, the least important units of all channel groups go first.
    """
    ranked = values.view(group.graph_group.count.channel_groups, -1).argsort(1).argsort(1)
    return ranked.to(values.dtype).flatten()
