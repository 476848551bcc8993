"""Layers as the config graph sees them: sides, views of bare parameters, units and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch_pruning import dependency, ops
from torch_pruning.pruner import function

from ..model.config_json import FieldPath
from ..model.sharded import whole_tensor
from ..twin.layout import TensorDim, UnitLayout
from .full_size import Group
from .unit_count import UnitCount

_BATCHNORM = nn.modules.batchnorm._BatchNorm


@dataclass
class Side:
    """One side of one layer: what Torch-Pruning prunes in one call."""

    module: nn.Module  # a layer type that Torch-Pruning knows, or a :class:`ParameterView`
    out: bool  # True: output channels, False: input channels
    table: torch.Tensor  # current positions of each unit, ``(units, positions per unit)``
    dims: list[TensorDim] = field(default_factory=list)

    @property
    def layer(self) -> str:
        return self.dims[0].layer


class ParameterView(nn.Linear):
    """One dimension of a parameter, as a linear layer's outputs that importances can read."""

    owner: nn.Module  # with a ``Conv1D`` weight, stacked experts or a bare parameter
    key: str
    dim: int

    def __init__(self, owner: nn.Module, key: str, dim: int):
        nn.Module.__init__(self)
        vars(self).update(owner=owner, key=key, dim=dim, bias=None)

    @property
    def parameter(self) -> torch.Tensor:
        parameter: torch.Tensor = getattr(self.owner, self.key)
        return parameter

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The current parameter, with this dimension first, and its gradient; both are views."""
        parameter = self.parameter
        view: torch.Tensor = parameter.detach().movedim(self.dim, 0)
        grad = None if parameter.grad is None else parameter.grad.movedim(self.dim, 0)
        if view.ndim == 1:
            view, grad = view[:, None], None if grad is None else grad[:, None]
        view.grad = grad
        return view

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.parameter.shape[self.dim]

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.parameter.numel() // max(1, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.key}, dim={self.dim}, channels={self.out_features}"


def owner_of(module: Any) -> Any:
    """Return the module behind a view; any other module itself."""
    return module.owner if isinstance(module, ParameterView) else module


def is_vector(module: nn.Module) -> bool:
    return isinstance(module, ParameterView) and module.parameter.ndim == 1


def is_output(side: Side) -> bool:
    """True if a side is its layer's output; any dimension of a bare parameter counts as one."""
    module = side.module
    if not isinstance(module, ParameterView):
        return side.out
    owner, vector = module.owner, is_vector(module)
    if isinstance(owner, nn.Embedding):
        return False  # entries, not channels
    if isinstance(owner, nn.modules.conv._ConvNd):
        return vector or module.dim == int(owner.transposed)
    if isinstance(owner, nn.Linear):
        return vector or module.dim == 0
    # Conv1D's weight is transposed
    return vector or type(owner).__name__ != "Conv1D" or module.dim == 1


class Units(ops._CustomizedOp):  # type: ignore[misc]
    """Placeholder for a group's units if no layer has one output channel per unit (heads)."""

    def __init__(self, count: int):
        nn.Module.__init__(self)  # Torch-Pruning's own __init__ leaves that out
        self.op_cls, self.count = Units, count


class UnitsPruner(function.BasePruningFunc):  # type: ignore[misc]
    """Torch-Pruning's pruner of :class:`Units`: counts units and cuts no layer."""

    def prune_out_channels(self, layer: Units, idxs: Sequence[int]) -> Units:
        layer.count -= len(idxs)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Units) -> int:
        return layer.count

    get_in_channels = get_out_channels


@dataclass
class GraphGroup:
    """A dependency group of the config graph: sides that lose the same units."""

    fields: tuple[FieldPath, ...]  # config fields that count its units
    sides: list[Side]
    count: UnitCount  # before pruning
    units: Units  # holds the current number of units
    heads: bool = False  # True: pruned by the head ratios

    @property
    def inward(self) -> bool:
        """True if all sides are inputs (of the layers that read encoder states)."""
        return not any(side.out for side in self.sides)

    @property
    def root(self) -> Side | None:
        """The side whose channels are exactly the units, an output if possible; None without one.

        With other channels beside the units (the shared rotary key of latent attention),
        importances would count from the first channel. For heads it is never an input, because
        pruners look up ratios of outputs only.
        """
        sides = [] if self.inward else [s for s in self.ranked if s.out or not self.heads]
        alone = (side for side in sides if side.table.shape[1] == 1)
        return next((side for side in alone if channels_of(side) == len(side.table)), None)

    @property
    def ranked(self) -> list[Side]:
        """The sides that importances read (linear and convolution layers), outputs first."""
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        ranked = [s for s in self.sides if isinstance(s.module, kinds) and not is_vector(s.module)]
        return sorted(ranked, key=lambda side: not side.out)


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


def norms_of(group: GraphGroup, model: nn.Module) -> torch.Tensor:
    squares = torch.zeros(group.units.count)  # of the parameters that each unit holds
    for side in group.sides:
        for name, axis in dict.fromkeys(dim.place for dim in side.dims):
            values = whole_tensor(model, name).movedim(axis, 0)
            channels = values.reshape(len(values), -1).float().square().sum(1).cpu()
            squares += channels[side.table.cpu()].sum(1)
    return squares.sqrt()


def channels_of(side: Side) -> int:
    if isinstance(side.module, ParameterView):
        return side.module.out_features
    layer_pruner = function.PrunerBox[ops.module2type(side.module)]
    count = layer_pruner.get_out_channels if side.out else layer_pruner.get_in_channels
    return int(count(side.module))


def handler_of(module: nn.Module, out: bool) -> Any:
    """Return Torch-Pruning's pruning function for one side of a layer."""
    if isinstance(module, Units):
        return UNITS.prune_out_channels
    if is_vector(module):
        # makes importances skip bare vectors (norm weights), as they do in a traced graph
        return function.PrunerBox[ops.OPTYPE.PARAMETER].prune_out_channels
    layer_pruner = function.PrunerBox[ops.module2type(module)]
    return layer_pruner.prune_out_channels if out else layer_pruner.prune_in_channels


UNITS = UnitsPruner()


def layer_side(layer: nn.Module, dim: int) -> bool | None:
    """Return True if a dimension of a layer's parameter is its output, False: input; or None."""
    if parametrize.is_parametrized(layer):  # weight norms: the weight cannot be assigned
        return None
    if isinstance(layer, nn.Linear) and layer.weight.shape == (
        layer.out_features,
        layer.in_features,
    ):
        return dim == 0
    if isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed:
        if layer.groups != 1 or dim > 1:
            return None
        return dim == 0
    if isinstance(layer, nn.Embedding):
        return True if dim == 1 else None
    if isinstance(layer, (nn.LayerNorm, _BATCHNORM)):
        return True if layer.weight.ndim == 1 else None  # else one norm per head (Chameleon)
    return None


def sides_of(
    model: nn.Module, group: Group, views: dict[tuple[str, int], ParameterView]
) -> list[Side]:
    """Return the layer sides behind a group's tensor dims; add missing views to ``views``."""
    sides: dict[tuple[int, bool], Side] = {}
    tables: dict[UnitLayout, torch.Tensor] = {}
    for dim in group.dims:
        layer_name, _, key = dim.name.rpartition(".")
        layer = model.get_submodule(layer_name)
        if dim.layout not in tables:
            tables[dim.layout] = dim.layout.table(group.count.units)
        table = tables[dim.layout]
        side_of_layer = layer_side(layer, dim.dim)
        out, module = side_of_layer is not False, layer
        if side_of_layer is None:
            module = views.setdefault(dim.place, ParameterView(layer, key, dim.dim))
        side = sides.setdefault((id(module), out), Side(module, out, table))
        if any(other.name == dim.name for other in side.dims):  # fused q, k and v
            side.table = torch.cat([side.table, table], dim=1)
        side.dims.append(dim)
    return list(sides.values())


def units_of(side: Side, channels: Sequence[int]) -> list[int] | None:
    """Return the units that some channels of a side belong to; None if they are not whole units."""
    if not channels:
        return []
    table, positions = side.table, torch.tensor(channels)
    unit_at = torch.full((int(max(table.max(), positions.max())) + 1,), -1)
    unit_at[table] = torch.arange(len(table))[:, None]
    if positions.min() < 0 or unit_at[positions].min() < 0:
        return None
    units = unit_at[positions]
    # a channel of a fused gate and up projection means both: a whole run in one part is enough
    counts = units.bincount(minlength=len(table))
    first = table[0].tolist()
    run = next((i for i in range(1, len(first)) if first[i] != first[i - 1] + 1), len(first))
    return None if (counts % run).any() else list(dict.fromkeys(units.tolist()))
