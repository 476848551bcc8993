"""Make one pruner work on a graph of whole units, and leave it as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning.pruner.algorithms.base_pruner as tp_base

from .amounts import in_runs, multiple_below, per_class
from .graph import ConfigGraph, ConfigGroup
from .pieces import in_pieces, takes_pieces
from .views import Coupled

if TYPE_CHECKING:
    from .foresee import Foreseen


class GraphInputs(dict[str, Any]):
    """Example inputs that carry the graph to prune by; made by ``pruner_kwargs``.

    Torch-Pruning hands ``example_inputs`` to the graph untouched, and a graph that is not traced
    does not look at them.

    Attributes:
        graph: the graph made from the config; ``None``: trace.
        why: which graph it is, and why.
        handed: what a pruner needs besides, as ``pruner_kwargs`` gave it.
    """

    def __init__(self, inputs: dict[str, Any], graph: ConfigGraph | None, why: str):
        super().__init__(inputs)
        self.graph, self.why = graph, why
        self.handed: dict[str, Any] = {}


@contextmanager
def building(graph: ConfigGraph) -> Iterator[None]:
    """While one pruner is constructed, its dependency graph is this one."""
    original = tp_base.dependency
    try:
        tp_base.dependency = SimpleNamespace(DependencyGraph=lambda: graph)
        graph.awaited = True
        yield
    finally:
        tp_base.dependency = original
        graph.awaited = False


def cutting_together(pruner: Any) -> AbstractContextManager[None]:
    """Around one step: what its groups cut is cut at its end, every parameter copied once."""
    if isinstance(pruner.DG, ConfigGraph) and is_plain(pruner):
        return pruner.DG.cuts.together()
    return nullcontext()


def is_plain(pruner: Any) -> bool:
    """Whether a pruner's step is Torch-Pruning's own.

    It asks for every importance before it prunes the first group, and looks at no weight
    afterwards.  Whose step that is not may look when it likes.
    """
    step = vars(pruner).get("step")
    own = getattr(step, "replaced", None) is None and "_prune" not in vars(pruner)
    return own and _inherits(pruner, _STEP)


_STEP, _ESTIMATE = ("step", "_prune"), ("estimate_importance",)
_BASE = {name: getattr(tp_base.BasePruner, name) for name in (*_STEP, *_ESTIMATE)}


def _inherits(pruner: Any, names: Iterable[str]) -> bool:
    """Whether a pruner's class has Torch-Pruning's own methods of these names."""
    return all(getattr(type(pruner), name) is _BASE[name] for name in names)


def given_ratios(pruner: Any, group: Any) -> tuple[str, Sequence[float]] | None:
    """The scope and the ratios that a pruner was given for a layer of a group, if it was.

    Looked for as in ``BasePruner._prune`` (base_pruner.py, 1.6.1).
    """
    for dep, _ in group:
        for node, function in ((dep.source, dep.trigger), (dep.target, dep.handler)):
            scope = pruner._layer_to_scope.get(node.module)
            if scope is not None and pruner.DG.is_out_channel_pruning_fn(function):
                ratios = pruner.pruning_ratio_dict.get(node.module, pruner.per_step_pruning_ratio)
                return scope[0], ratios
    return None


class UnitSteering:
    """One pruner's questions about a group, answered for groups of whole units.

    ``estimate_importance`` gives one value per unit also where a unit is several channels wide;
    ``_get_channel_groups`` knows the classes inside which units are interchangeable;
    ``_round_to`` rounds each group to what the class takes of its field, and counts the units of a
    class against those of a class (Torch-Pruning counts them against all, base_pruner.py, 1.6.1).
    Groups of whole heads are ranked by themselves, at the pruner's head ratios; where as many have
    to go out of every key/value group, those that matter least in each go.
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
        self.foreseen: Foreseen | None = None
        self.valued = False  # some group was given a value by the importance

    def attach(self) -> None:
        """Answer for the pruner, if its graph is of units."""
        self.pruner.estimate_importance = self.estimate_importance
        if isinstance(self.pruner.DG, ConfigGraph):
            for name in self._NAMES:
                setattr(self.pruner, name, getattr(self, name))
            for number, coupled in enumerate(self._of_heads()):
                scope = (f"heads {number}", [coupled.units])
                self.pruner._layer_to_scope[coupled.units] = scope
                self.pruner.pruning_ratio_dict[coupled.units] = self._head_ratios(coupled)

    def detach(self) -> None:
        """Leave the pruner as it was."""
        for coupled in self._of_heads():
            self.pruner._layer_to_scope.pop(coupled.units, None)
            self.pruner.pruning_ratio_dict.pop(coupled.units, None)
        for name, own in self._own.items():
            if vars(self.pruner).get(name) == getattr(self, name):
                delattr(self.pruner, name)
                if own is not None:
                    setattr(self.pruner, name, own)

    def estimate_importance(self, group: Any, *args: Any, **kwargs: Any) -> Any:
        """Importance of a group's units, shape ``(units,)``.

        Raises:
            ValueError: it needs gradients, and there are none.
        """
        try:
            values = self._importance_of(group, *args, **kwargs)
        except (AttributeError, TypeError) as error:  # of a gradient that is None
            if any(parameter.grad is not None for parameter in self.pruner.model.parameters()):
                raise
            raise ValueError(
                f"{type(self.pruner.importance).__name__} fails ({type(error).__name__}: {error}), "
                "and no parameter has a gradient, which importances such as Taylor's are made of. "
                "Run loss.backward() on some data before pruner.step(). Nothing is pruned yet."
            ) from error
        self.valued |= values is not None
        return values

    def why_nothing(self) -> str:
        """Why a step pruned no group."""
        pruner, step = self.pruner, self.pruner.current_step
        if step > pruner.iterative_steps:
            return f"all steps of the pruner were taken (iterative_steps={pruner.iterative_steps})"
        graph = pruner.DG
        if isinstance(graph, ConfigGraph) and not any(
            True for _ in graph.taking_part(pruner.ignored_layers, pruner.root_module_types)
        ):
            return "no group takes part (prune=, ignored_layers=, root_module_types=)"
        if not self.valued:
            name = type(pruner.importance).__name__
            return f"{name} gave no value to any group (it may need gradients, or batch norms)"
        ratios = (pruner.per_step_pruning_ratio, *pruner.pruning_ratio_dict.values())
        if not any(one[step] for one in (*ratios, pruner.per_step_head_pruning_ratio)):
            return "all ratios are 0"
        return "less than one unit of each was to go, or no group that the step gave was pruned"

    def _importance_of(self, group: Any, *args: Any, **kwargs: Any) -> Any:
        ranked, self._ranked = self._ranked, None
        if isinstance(group, ConfigGroup):
            values = self.pruner.DG.importance_of(
                group, lambda one: self._estimate_one(one, *args, **kwargs)
            )
            return values if ranked is not group or values is None else _places(group, values)
        return self._estimate(group, *args, **kwargs)

    def _of_heads(self) -> list[Coupled]:
        graph = self.pruner.DG
        return [c for c in graph.coupled if c.heads] if isinstance(graph, ConfigGraph) else []

    def _head_ratios(self, coupled: Coupled) -> list[float]:
        """The ratios of all steps, of a layer in ``head_pruning_ratio_dict`` or of all."""
        pruner = self.pruner
        if not pruner.prune_num_heads:
            return [0.0] * len(pruner.per_step_head_pruning_ratio)
        for side in coupled.sides:
            if side.module in pruner.head_pruning_ratio_dict:
                own: list[float] = pruner.head_pruning_ratio_dict[side.module]
                return own
        ratios: list[float] = pruner.per_step_head_pruning_ratio
        return ratios

    def _estimate_one(self, group: ConfigGroup, *args: Any, **kwargs: Any) -> Any:
        importance = self.pruner.importance
        own = self._own["estimate_importance"] is None and _inherits(self.pruner, _ESTIMATE)
        if own and takes_pieces(importance) and not args and not kwargs:
            return in_pieces(importance, group)
        return self._estimate(group, *args, **kwargs)

    def _get_channel_groups(self, group: Any) -> int:
        if isinstance(group, ConfigGroup):
            if self._chooses_in_each(group.coupled):
                self._ranked = group  # the pruner asks for its importance next, to rank its units
                return 1
            return group.coupled.classes
        classes: int = self._channel_groups(group)
        return classes

    def _chooses_in_each(self, coupled: Coupled) -> bool:
        """Whether each class loses its own least units, not those at the same places as others.

        Torch-Pruning ranks the places of grouped channels by their mean over the groups, but
        grouped-query heads inside each group.
        """
        pruner = self.pruner
        alone = coupled.heads or not (pruner.global_pruning or pruner.isomorphic)
        return coupled.classes > 1 and coupled.root is None and alone and bool(pruner.round_to)

    def _is_atten_group(self, group: Any) -> Any:
        self._group = group  # asked right before the group is rounded
        if isinstance(group, ConfigGroup):
            return False, []  # heads are units here, not Torch-Pruning's bookkeeping
        return self._attention(group)

    def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
        if not isinstance(self._group, ConfigGroup):
            rounded: int = self._round(n_pruned, current_channels, round_to)
            return rounded
        coupled = self._group.coupled
        together = coupled.classes if self._chooses_in_each(coupled) else 1
        size = coupled.units.count // coupled.classes
        if self.foreseen is not None:
            left = self.foreseen.units_left(coupled, self.pruner.current_step)
            if left is not None:
                return (size - left // coupled.classes) * together
        rounded_to = in_runs(round_to, coupled.run)
        multiple = per_class(coupled.multiple, rounded_to, coupled.classes)
        kept = (size * together - n_pruned) // together
        return (size - multiple_below(kept, multiple)) * together


def _places(group: ConfigGroup, values: torch.Tensor) -> torch.Tensor:
    """Each unit's place among its class's, least first, so that the least of all classes go."""
    ranked = values.view(group.coupled.classes, -1).argsort(1).argsort(1)
    return ranked.to(values.dtype).flatten()
