"""Find a width for every layer, so that a model of a given size changes as little as possible.

Units of one layer at a time are removed, with refits, and outputs on held-out data are compared
with the unpruned model's. A Lagrangian then finds the cheapest parameters, in whichever layer. The
costs of layers cut one at a time are too low where the others are cut too, so widths halfway to
equal shares are compared with these, all layers cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import lcm
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import Count, Positive, Share, check_arguments
from ..calibration.calibrate import Calibration
from ..calibration.held_out import Difference, run_as_cut, run_held_out
from ..calibration.importance import Kind
from ..calibration.refit import StepRefits
from ..errors import UnsupportedModelError
from ..fieldmap.model_view import ModelView, view_of
from ..forward.run_recipe import MakeInputs
from ..graph.config_graph import ConfigGraph
from ..graph.layer_fields import fields_named, layers_listed
from ..graph.prunable import Width, widths_of
from ..graph.unit_count import EXACT, Grid, multiple_for_round_to
from ..model.config_json import field_name
from ..model.layer_class import stock_class
from ..model.layer_entries import layer_number, name_in_all_layers
from ..model.locate import find_pretrained
from ..reports import Report
from .selection import in_multiples
from .settings import PruneSettings, Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.2, 0.4, 0.6)  # shares of each layer's units whose removal is measured
# The cheapest widths are returned only if the output changes this much less with them than halfway
# to equal shares: smaller differences on a few batches are not seen on other text (docs/quality.md)
_MUCH_LESS = 0.9
_HALFWAY = 0.5


@dataclass(frozen=True, repr=False)
class Allocation(Report):
    """Widths for every layer; ``print`` or ``plot`` it, prune by it with a hook's ``plan=``.

    Attributes:
        model: the name of the class.
        measure: how outputs are compared: ``"KL"`` of the logits, or a relative ``"squared
            error"``.
        curves: what was measured of each layer.
        widths: the layer's own field -> its value in the end.
        parameters: the model's parameters before and after.
        evenness: how far the widths are from the cheapest ones (0) to equal shares (1).
    """

    model: str
    measure: str
    curves: tuple[LayerCurve, ...]
    widths: Mapping[str, int]
    parameters: tuple[int, int]
    evenness: float = 0.0
    _make_inputs: MakeInputs | None = field(default=None, repr=False, compare=False)

    @property
    def make_inputs(self) -> MakeInputs | None:
        """The user's function that makes a forward pass's inputs, if there is one."""
        return self._make_inputs

    @property
    def _before(self) -> dict[str, int]:
        return {curve.field: curve.units for curve in self.curves}

    @property
    def ratios(self) -> dict[str, float]:
        """The layer's own field -> the share of its units that is removed, for ``ratios=``."""
        before = self._before
        left = ((name, (width + 1e-6) / before[name]) for name, width in self.widths.items())
        return {name: 1 - share for name, share in left if share < 1}

    @check_arguments
    def at(self, target_params: Count, round_to: Count | None = None) -> Allocation:
        """Return the allocation for another number of parameters, from the same measurements.

        Args:
            target_params: how many parameters may be left: a number, not a share.
            round_to: a multiple that widths keep; default: see :func:`~tp_hf_config.allocate`.

        Raises:
            ValueError: the number cannot be reached with the largest share that was measured.
        """
        before = self.parameters[0]
        widths, after = _lagrangian(self.curves, before, target_params, round_to, self.evenness)
        return replace(self, widths=widths, parameters=(before, after))

    @property
    def settings(self) -> PruneSettings:
        """The settings of a hook that carries the allocation out."""
        ratios = self.ratios
        return PruneSettings(tuple(ratios), ratios=ratios, per_layer=True)

    def of_pruner(self) -> dict[str, Any]:
        """Return the pruner's arguments that carry the allocation out; steps are free."""
        return {"round_to": 1}  # exactly these widths

    def check_fits(self, model: nn.Module) -> None:
        """Check that the allocation was made for a model of this class.

        Raises:
            UnsupportedModelError: it was not.
        """
        name = stock_class(type(find_pretrained(model)[1])).__name__
        if name != self.model:
            raise UnsupportedModelError(
                f"this allocation was made for a {self.model}, not for a {name}. Make a new one: "
                "tp_hf_config.allocate(model, calibration, ...)."
            )

    def title(self) -> str:
        """Return the class, with its parameters before and after."""
        old, new = self.parameters
        return f"{self.model}: {old:,} -> {new:,} parameters ({new / old:.1%})"

    def lines(self) -> Iterator[str]:
        """Yield the widths of each field by layer."""
        by_name: dict[str, list[str]] = {}
        for own in self.widths:
            by_name.setdefault(name_in_all_layers(own), []).append(own)
        for name, fields in by_name.items():
            before = [f"{self._before[field]:,}" for field in fields]
            was = f"{before[0]} in each layer" if len(set(before)) == 1 else " ".join(before)
            yield f"{name}, {was} -> {' '.join(f'{self.widths[field]:,}' for field in fields)}"

    @check_arguments
    def plot(self, path: str | PathLike[str]) -> Figure:
        """Draw each layer's width, and how much the output changes when a share of it is removed.

        Args:
            path: the file to write; its suffix sets the format, PNG without one.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is missing.
        """
        from ..plots import plot_allocation

        curves: dict[str, list[LayerCurve]] = {}
        for curve in self.curves:
            curves.setdefault(name_in_all_layers(curve.field), []).append(curve)
        return plot_allocation(curves, self.widths, self.measure, path)


@check_arguments
def allocate(
    model: nn.Module,
    calibration: Calibration,
    *,
    target_params: Positive,
    prune: str | Iterable[str] | None = None,
    importance: Kind = "auto",
    shares: Sequence[Share] = SHARES,
    batches: Count = 4,
    round_to: Count | None = None,
    target: str | None = None,
) -> Allocation:
    """Find a width for every layer, so that a model of a given size changes as little as possible.

    Args:
        model: the Hugging Face model, or a module that contains it; it is not changed.
        calibration: the result of ``calibrate(model, ...)``.
        target_params: how many parameters may be left: a share of them (up to 1), or a number.
        prune: config fields, by their names for all layers. Default: every width that each layer
            has of its own, except attention heads and numbers of experts.
        importance: how the units of a layer are ranked.
        shares: the shares of a layer's units whose removal is measured (default: 0.2, 0.4 and 0.6);
            no layer loses more than the largest.
        batches: number of held-out batches on which outputs are compared.
        round_to: a multiple that widths keep. Default: the largest of 64, 32, 16 and 8 channels
            that moves no width by more than 2 % of the original.
        target: tools that the widths have to suit, instead of ``round_to``: see
            :func:`~tp_hf_config.plan`.

    Returns:
        The allocation. ``HFConfigSyncHook(plan=allocation, refit=calibration)`` carries it out.

    Raises:
        UnsupportedModelError: the model's layers cannot differ, a field cannot be pruned, or no
            batch is held out.
        ValueError: the target cannot be reached with the largest share.
    """
    PruneSettings(round_to=round_to, target=target)  # raises
    if not calibration.holds_out():
        raise UnsupportedModelError(
            "allocate compares layers on held-out batches, and the calibration has none. Pass at "
            "least two batches to calibrate()"
        )
    with layers_listed(model):
        view = view_of(model)
        before = view.model.num_parameters()
        goal = int(target_params * (before if target_params <= 1 else 1))
        widths = _widths(view, prune)
        sensitivity = _Sensitivity(view, calibration, importance, batches, Target.of(target))
        curves = tuple(sensitivity.curve(width, shares) for width in widths)
        left, after = _lagrangian(curves, before, goal, round_to, _HALFWAY)
        halfway = Allocation(
            stock_class(type(view.model)).__name__,
            sensitivity.measure,
            curves,
            left,
            (before, after),
            _HALFWAY,
            view.field_map.recipe.make_inputs,
        )
        cheapest = replace(halfway, evenness=0.0).at(goal, round_to)
        shares_of = cheapest.ratios, halfway.ratios
        if shares_of[0] == shares_of[1]:
            return halfway
        change, other = map(sensitivity.change, shares_of)
    return cheapest if change < _MUCH_LESS * other else halfway


def _widths(view: ModelView, prune: str | Iterable[str] | None) -> list[Width]:
    own = [
        width
        for width in widths_of(view.model, view.field_map)
        if width.reason is None and len(width.fields) == 1 and len(width.groups) == 1
        if layer_number(width.fields[0]) is not None
    ]
    if prune is None:
        inner = view.inner_widths()
        return [width for width in own if set(width.fields) <= inner]
    names_of = fields_named(view.field_map)
    names = [
        name for given in ([prune] if isinstance(prune, str) else prune) for name in names_of(given)
    ]
    by_name = {width.name: width for width in own}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        offered = dict.fromkeys(map(name_in_all_layers, by_name))
        raise UnsupportedModelError(
            f"allocate: {unknown[0]} is not a width that can differ from layer to layer. The "
            f"widths that can: {', '.join(offered)}"
        )
    return [by_name[name] for name in names]


class _Sensitivity:
    def __init__(
        self,
        view: ModelView,
        calibration: Calibration,
        kind: Kind,
        batches: int,
        target: Target,
    ):
        self._target = target
        self._view, self._importance = view, calibration.importance(kind)
        self._calibration = calibration.comparing_on(calibration.held_out[:batches])
        self._outputs = Difference(len(self._calibration.held_out), calibration.ranks)
        run_held_out(self._calibration, self._outputs.note)
        # field -> its graph, and the units of each channel group, the least important first
        self._ranked: dict[str, tuple[ConfigGraph, Tensor]] = {}

    @property
    def measure(self) -> str:
        return self._outputs.measure

    def curve(self, width: Width, shares: Iterable[float]) -> LayerCurve:
        """Return how the output changes when shares of a width's units are removed, with refits."""
        model, width = self._view.model, in_multiples(self._view, width, self._target)
        graph = ConfigGraph(model, width.groups)
        graph.build_dependency(model)
        (graph_group,) = graph.graph_groups
        count, name = graph_group.count, field_name(width.fields[0])
        whole = graph.group_at(graph_group, range(count.units))
        values = graph.importance_of(whole, self._importance).view(count.channel_groups, -1)
        starts = torch.arange(0, count.units, values.shape[1], device=values.device)
        self._ranked[name] = graph, values.argsort(1) + starts[:, None]
        changes = {share: self.change({name: share}) for share in shares}
        each = count.per_field_unit
        return LayerCurve(
            name,
            width.units,
            width.parameters,
            changes,
            multiple=count.step(1) // each,
            minimum=-(-count.minimum // each),
            run=count.run * each,
            grid=count.grid,
        )

    def change(self, shares: Mapping[str, float]) -> float:
        """Return how the output changes without these shares of fields' units, with refits."""
        groups = []
        for name, share in shares.items():
            graph, order = self._ranked[name]  # each channel group loses equally many
            removed = order[:, : int(share * order.shape[1] + 1e-3)].flatten().tolist()
            groups.append(graph.group_at(graph.graph_groups[0], removed))
        step = StepRefits(self._calibration, groups)
        self._outputs.begin()
        run_as_cut(step, set(step.refits), self._outputs.compare)
        return self._outputs.mean()


def _lagrangian(
    curves: Sequence[LayerCurve],
    before: int,
    target: int,
    round_to: int | None,
    evenness: float,
) -> tuple[dict[str, int], int]:
    """Return the widths and parameters that are left.

    ``evenness``: how far the widths are from the cheapest ones (0) to equal shares (1).
    """
    whole = {curve.field: curve.units for curve in curves}
    steps = sorted(_steps(curves, round_to), key=lambda step: step[0])
    cheapest, after = _taken(steps, whole, before, target)
    if not evenness:
        return cheapest, after
    even, _ = _taken(sorted(steps, key=lambda s: -s[2] / s[1].units), whole, before, target)
    left, parameters = whole, before
    for curve in curves:
        between = evenness * even[curve.field] + (1 - evenness) * cheapest[curve.field]
        left[curve.field] = min(size for size in curve.sizes(round_to) if size >= between)
        parameters -= (curve.units - left[curve.field]) * curve.parameters
    return _taken(steps, left, parameters, target)


def _taken(
    steps: Iterable[tuple[float, LayerCurve, int]],
    widths: Mapping[str, int],
    parameters: int,
    target: int,
) -> tuple[dict[str, int], int]:
    """Take steps in order until the target is reached; return widths and parameters."""
    left = dict(widths)
    for _, curve, units in steps:
        if parameters <= target:
            break
        parameters -= max(0, left[curve.field] - units) * curve.parameters
        left[curve.field] = min(units, left[curve.field])
    if parameters > target:
        raise ValueError(
            f"target_params={target:,}: {parameters:,} parameters remain even if the largest of "
            "shares= is pruned from every layer. Pass larger shares, name more fields in prune=, "
            "or choose a larger target"
        )
    return left, parameters


def _steps(
    curves: Sequence[LayerCurve], round_to: int | None
) -> Iterator[tuple[float, LayerCurve, int]]:
    """Yield cost per parameter, layer and the units left; within a layer, costs never fall."""
    for curve in curves:
        sizes = curve.sizes(round_to)
        costs = [curve.change_at(1 - size / curve.units) for size in sizes]
        highest = 0.0
        for (size, cost), (less, more) in pairwise(zip(sizes, costs, strict=True)):
            slope = (more - cost) / ((size - less) * curve.parameters)
            highest = max(highest, slope)  # larger widths' steps are taken first
            yield highest, curve, less


@dataclass(frozen=True)
class LayerCurve:
    """How much the model's output changes when units of one layer are removed.

    Attributes:
        field: the layer's own field.
        units: how many units it has now.
        parameters: number of parameters of one unit.
        changes: the share of the units that is removed -> the change of the model's output.
        multiple: the class accepts only multiples of this number of units.
        minimum: the fewest units with which the class runs.
        run: neighbouring channels per unit (those of a head).
        grid: the multiples that its width goes to without ``round_to``.
    """

    field: str
    units: int
    parameters: int
    changes: Mapping[float, float]
    multiple: int = 1
    minimum: int = 1
    run: int = 1
    grid: Grid = EXACT

    def sizes(self, round_to: int | None) -> list[int]:
        """Return about 64 sizes to choose from, all units first; then ever fewer."""
        near = (m for m in self.grid.multiples if m / 2 < self.grid.near * self.units)
        own = next(near, 1) if round_to is None else multiple_for_round_to(round_to, self.run)
        grid = lcm(self.multiple, own)
        step = max(grid, self.units // 64 // grid * grid)
        least = max(int(self.units * (1 - max(self.changes))), self.minimum)
        return [self.units, *range((self.units - 1) // step * step, least - 1, -step)]

    def change_at(self, share: float) -> float:
        """Return the change at any share: its square root is interpolated, from 0 at share 0."""
        points = [(0.0, 0.0), *((s, max(0.0, c) ** 0.5) for s, c in sorted(self.changes.items()))]
        for (low, first), (high, last) in pairwise(points):
            if share <= high or high == points[-1][0]:
                return float((first + (last - first) * (share - low) / (high - low)) ** 2)
        return 0.0
