"""Layers as a graph of whole units sees them: sides, views of bare parameters, cutting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch_pruning import ops
from torch_pruning.pruner import function

from .cuts import Cuts
from .expand import Member

_BATCHNORM = nn.modules.batchnorm._BatchNorm
# the weight's dimension and the attribute that counts it: output side, input side
_PLAIN: dict[type, tuple[tuple[int, str], ...]] = {
    nn.Linear: ((0, "out_features"), (1, "in_features")),
    nn.Embedding: ((1, "embedding_dim"),),
    nn.LayerNorm: ((0, "normalized_shape"),),
}


@dataclass
class Side:
    """One side of one layer: what Torch-Pruning prunes in one call.

    Attributes:
        module: a layer that Torch-Pruning knows, or a view of a parameter that looks like one.
        out: whether these are the layer's output channels.
        table: the positions of each unit that is left, shape ``(units, positions per unit)``.
        members: the parameters' dimensions behind it.
    """

    module: nn.Module
    out: bool
    table: torch.Tensor
    members: list[Member] = field(default_factory=list)

    @property
    def layer(self) -> str:
        """The layer's name in the Hugging Face model."""
        return self.members[0].name.rpartition(".")[0]


class ParameterView(nn.Linear):
    """One dimension of a parameter, for importances to read as a linear layer's output channels.

    ``Conv1D`` weights, stacked experts and bare parameters become visible to them this way.
    ``weight`` is a view of the parameter as it is now, its channels first.
    """

    owner: nn.Module
    key: str
    dim: int

    def __init__(self, owner: nn.Module, key: str, dim: int):
        nn.Module.__init__(self)
        vars(self).update(owner=owner, key=key, dim=dim, bias=None)

    @property
    def parameter(self) -> torch.Tensor:
        """The parameter behind the view, or the buffer."""
        parameter: torch.Tensor = getattr(self.owner, self.key)
        return parameter

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The parameter with this dimension first, and its gradient; both write through."""
        parameter = self.parameter
        view: torch.Tensor = parameter.detach().movedim(self.dim, 0)
        grad = None if parameter.grad is None else parameter.grad.movedim(self.dim, 0)
        if view.ndim == 1:
            view, grad = view[:, None], None if grad is None else grad[:, None]
        view.grad = grad
        return view

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """The length of the dimension."""
        return self.parameter.shape[self.dim]

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """The number of values per channel."""
        return self.parameter.numel() // max(1, self.out_features)

    def extra_repr(self) -> str:
        """The parameter and its dimension, for ``print(group)``."""
        return f"{self.key}, dim={self.dim}, channels={self.out_features}"


def is_vector(module: nn.Module) -> bool:
    """Whether a module is a view of a parameter with a single dimension."""
    return isinstance(module, ParameterView) and module.parameter.ndim == 1


def is_output(side: Side) -> bool:
    """Whether a side is what its layer puts out; of bare parameters every dimension counts."""
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
    return vector or type(owner).__name__ != "Conv1D" or module.dim == 1  # that is transposed


class Units(ops._CustomizedOp):  # type: ignore[misc]
    """Stands for the units of a group in which no output has one channel per unit (heads)."""

    def __init__(self, count: int):
        nn.Module.__init__(self)  # Torch-Pruning's own leaves that out
        self.op_cls, self.count = Units, count


class UnitsPruner(function.BasePruningFunc):  # type: ignore[misc]
    """Counts a group's units; what is cut are its layers."""

    def prune_out_channels(self, layer: Units, idxs: Sequence[int]) -> Units:
        """Fewer units."""
        layer.count -= len(idxs)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Units) -> int:
        """The number of units."""
        return layer.count

    get_in_channels = get_out_channels


@dataclass
class Coupled:
    """A group of sides that lose the same units.

    ``multiple``: the class takes only multiples of it; ``grain``: how many of its units go with
    one unit of the fields; ``heads``: it follows the head ratios; ``run``: how many neighbouring
    channels a unit is; ``least``: fewer units, and the class does not run.
    """

    fields: tuple[tuple[str | int, ...], ...]
    sides: list[Side]
    classes: int
    units: Units
    multiple: int = 1
    grain: int = 1
    heads: bool = False
    run: int = 1
    least: int = 1

    @property
    def inward(self) -> bool:
        """Whether it is inputs alone (of the layers that read the states of an encoder)."""
        return not any(side.out for side in self.sides)

    @property
    def root(self) -> Side | None:
        """The side whose channels are the units, one to one, an output if there is one.

        All its channels: beside others (the shared rotary key of latent attention), importances
        would count from the first.  Of heads no input: pruners look for the ratios of outputs
        alone, and would not find those of heads.
        """
        for side in () if self.inward else self.ranked:
            if self.heads and not side.out:
                continue
            if side.table.shape[1] == 1 and channels_of(side) == len(side.table):
                return side
        return None

    @property
    def ranked(self) -> list[Side]:
        """The sides that importances look at, output sides first."""
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        seen = [side for side in self.sides if isinstance(side.module, kinds)]
        return sorted(
            (side for side in seen if not is_vector(side.module)), key=lambda side: not side.out
        )


class Leaving:
    """The units that leave a group: what is left of a table is computed once for all its sides."""

    def __init__(self, units: Sequence[int]):
        self.units = list(units)
        self._seen: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def of(self, table: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
        """Positions that go and that stay of a dimension, its new table, and the old one."""
        if (id(table), size) not in self._seen:  # the old one is held, so that its id stays its own
            gone = table[self.units].flatten()
            kept = torch.ones(size, dtype=torch.bool)
            kept[gone] = False
            left = torch.ones(len(table), dtype=torch.bool)
            left[self.units] = False
            renumbered = kept.cumsum(0) - 1
            stays = kept.nonzero().flatten()
            self._seen[id(table), size] = gone, stays, renumbered[table[left]], table
        return self._seen[id(table), size]


def cut(side: Side, leaving: Leaving, cuts: Cuts) -> None:
    """Cut units from one side of one layer; the table follows.

    A plain layer's parameters go to ``cuts``, which may copy them later, together with what other
    sides lose; any other layer is cut now, by Torch-Pruning's own pruner.
    """
    module = side.module
    places = _places(module, side.out)
    for owner, key, dim, _ in places:
        cuts.settle(owner, key, dim)
    gone, kept, table, _ = leaving.of(side.table, channels_of(side))
    for owner, key, dim, size in places:
        cuts.keep(owner, key, dim, kept, size)
    if not places:
        handler_of(module, side.out)(module, gone.tolist())
    side.table = table


def _places(module: nn.Module, out: bool) -> list[tuple[nn.Module, str, int, str | None]]:
    """Owner, name, dimension and size attribute of all that a side cuts; none: not a plain layer.

    Of subclasses and parametrized layers it is not known what else there is to do.
    """
    if isinstance(module, ParameterView):
        return [(module.owner, module.key, module.dim, None)]
    if type(module) not in _PLAIN or module._parameters.get("weight") is None:
        return []
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return []
    dim, size = _PLAIN[type(module)][0 if out else -1]
    places: list[tuple[nn.Module, str, int, str | None]] = [(module, "weight", dim, size)]
    if dim == 0 and module._parameters.get("bias") is not None:
        places.append((module, "bias", 0, None))
    return places


def channels_of(side: Side) -> int:
    """How many channels a side has."""
    if isinstance(side.module, ParameterView):
        return side.module.out_features
    layer_pruner = function.PrunerBox[ops.module2type(side.module)]
    count = layer_pruner.get_out_channels if side.out else layer_pruner.get_in_channels
    return int(count(side.module))


def handler_of(module: nn.Module, out: bool) -> Any:
    """Torch-Pruning's pruning function of one side of a layer."""
    if isinstance(module, Units):
        return UNITS.prune_out_channels
    if is_vector(module):
        # importances pass over bare vectors (norm weights), as over those of a traced graph
        return function.PrunerBox[ops.OPTYPE.PARAMETER].prune_out_channels
    layer_pruner = function.PrunerBox[ops.module2type(module)]
    return layer_pruner.prune_out_channels if out else layer_pruner.prune_in_channels


UNITS = UnitsPruner()


def layer_side(layer: nn.Module, key: str, dim: int) -> bool | None:
    """Whether a dimension is a layer's output side (else its input side); None: neither."""
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
        return True if layer.weight.ndim == 1 else None  # of every head another (Chameleon)
    return None


def units_of(side: Side, channels: Sequence[int]) -> list[int] | None:
    """The units that channels are; None where they are none, or not whole ones.

    One channel of fused gate and up stands for both: units count where one whole part is given.
    """
    if not channels:
        return []
    table, asked = side.table, torch.tensor(channels)
    where = torch.full((int(max(table.max(), asked.max())) + 1,), -1)
    where[table] = torch.arange(len(table))[:, None]
    if asked.min() < 0 or where[asked].min() < 0:
        return None
    units = where[asked]
    counts = units.bincount(minlength=len(table))
    row = table.shape[1]
    run = 1
    if row > 1:
        first = table[0].tolist()
        run = next((i for i in range(1, row) if first[i] != first[i - 1] + 1), row)
    return None if (counts % run).any() else list(dict.fromkeys(units.tolist()))
