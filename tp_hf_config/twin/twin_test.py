"""Find by experiment which dimensions of a model's parameters belong together: the twin test.

Two units of a width become twins: one gets the other's weights in every tensor dim of the width. If
the units are interchangeable, their gradients are now equal everywhere. Then one twin gets noise in
one tensor dim. The gradients now differ in exactly the dims that share units with that dim: these
are a group. The group is right if permuting its units does not change the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..forward.observed_pass import PassResult, following, outputs_in_float64
from ..forward.output_tensors import largest_by_name, largest_in
from ..forward.replay import Replay
from ..forward.run_recipe import PLAIN, RunRecipe, encoder_states_in
from .layout import TensorDim, UnitLayout, positions_of

_EQUAL = 1e-9  # largest relative difference at which two float64 results count as the same
_NO_GRADIENT = 1e-12  # smaller gradients count as none
_ROUNDING = 1e-15  # of the largest gradient: smaller ones may be rounding alone
_PAIRS = 4  # of twins at most

# a permutation and what is compared: the tensor dims, the order of the units, the lengths of output
# axes that hold units, the results that count as outputs
Proof = tuple[frozenset[TensorDim], tuple[int, ...], frozenset[int], tuple[PassResult, ...]]

Pair = tuple[int, int]  # two units, which are made twins
Grads = Mapping[str, Tensor | None]  # the gradients of parameters by name


class TwinTest:
    """The experiments on one small model in float64 and eval mode; its parameters are restored."""

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        units: int,
        # An output axis of ``units`` times one of these holds the units: in the layouts of tensor
        # dims of that length, or else in runs or parts of that number.
        runs: Sequence[int] = (1,),
        watched: Sequence[PassResult] = (),  # intermediate results that count as outputs
        recipe: RunRecipe = PLAIN,
        replay: Replay | None = None,  # results of the parts that an experiment does not change
        proofs: dict[Proof, bool] | None = None,  # known permutations: neutral or not
        outputs: Sequence[Tensor] | None = None,  # floating point, watched last; None: run a pass
        followed: Collection[str] = (),  # buffers that get gradients, like parameters
    ):
        self.model, self.inputs, self.units = model, dict(inputs), units
        self.watched, self.recipe = watched, recipe
        self._replay, self._followed = replay, followed
        self._proofs = {} if proofs is None else proofs
        # length of an output axis that holds the units -> its possible layouts
        self.axes = {units * run: (UnitLayout(run=run), UnitLayout(parts=run)) for run in runs}
        self.parameters: dict[str, Tensor] = dict(model.named_buffers())
        self.parameters.update(model.named_parameters())
        self._edits = Edits(self.parameters)
        encoder_states = encoder_states_in(model, inputs, recipe.encoder_states)
        for name, states in encoder_states.items():  # units too
            self.inputs[name] = self.parameters[name] = states.detach().clone().requires_grad_(True)
        self._random: dict[torch.Size, Tensor] = {}
        if outputs is None:
            outputs = outputs_in_float64(model, inputs, watched, recipe)
        self._number_of_outputs = len(outputs)
        self._depending = [number for number, output in enumerate(outputs) if output.requires_grad]
        self._outward = outputs[: len(outputs) - len(watched)]
        self.base = [outputs[number].detach() for number in self._depending]

    def outputs(self, names: Iterable[str] = ()) -> list[Tensor]:
        """Return the outputs that depend on parameters; only ``names`` may get gradients."""
        changed = {*names, *self._edits.names}
        if self._replay is not None and changed:
            held = [self.parameters[name] for name in changed]
            replayed = self._replay.outputs(held, self.inputs, self.recipe)
            if replayed is not None and len(replayed) == self._number_of_outputs:
                return [replayed[number] for number in self._depending]
            self._replay = None  # some results are collected inside of skipped parts
        tensors = outputs_in_float64(self.model, self.inputs, self.watched, self.recipe)
        return [tensors[number] for number in self._depending]

    def links(
        self,
        dims: Sequence[TensorDim],
        doubted: Collection[TensorDim] = (),
        still_doubted: Callable[[Links], Collection[TensorDim]] | None = None,
    ) -> Links:
        """Make two units twins and disturb one tensor dim after another; return what is linked.

        ``doubted`` dims are disturbed with every pair of units until they are one group;
        ``still_doubted`` reduces them after each pair.
        """
        groups: list[set[TensorDim]] = []
        links = Links((), (), tuple(dims))
        hidden = unobserved = list(dims)
        # several pairs, because a unit can be hidden for these inputs (a dead ReLU)
        for first in range(0, min(2 * _PAIRS, self.units - 1), 2):
            pair = first, first + 1
            with self._edits.undone():
                self._make_twins(dims, pair)
                grads = self._gradients(dims, pair)
                observed, unequal = self._observed(dims, grads, pair)
                unobserved = [dim for dim in unobserved if dim not in observed]
                if unequal:
                    return Links((), tuple(unequal), tuple(unobserved))
                settled = {dim for group in groups for dim in group} - {*hidden, *doubted}
                hidden = [d for d in hidden if d in observed and self._is_dead(grads, d, first)]
                unsettled = [dim for dim in observed if dim not in settled]
                for group in self._components(unsettled, observed, pair, doubted):
                    groups = merged(groups, group)
            ordered = (tuple(dim for dim in dims if dim in group) for group in groups)
            links = Links(tuple(ordered), (), tuple(unobserved))
            if doubted and still_doubted is not None:
                doubted = still_doubted(links)
            if not hidden and any(map({*doubted}.issubset, [*groups, ()])):
                break  # more pairs of units cannot separate what is linked
        return links

    def alike(self, dims: Sequence[TensorDim], channel_groups: int) -> bool:
        """True if the first and last unit of a channel group have equal gradients as twins."""
        # relative to their own size: differences may be too small to see in permuted outputs
        pair = 0, self.units // channel_groups - 1
        with self._edits.undone():
            self._make_twins(dims, pair)
            return not self._observed(dims, self._gradients(dims, pair), pair)[1]

    def _make_twins(self, dims: Sequence[TensorDim], pair: Pair) -> None:
        for dim in dims:
            source, target = self._positions(dim, *pair)
            values = self.parameters[dim.name].data.index_select(dim.dim, source)
            self._edits.write(dim, target, values)

    def _is_dead(self, grads: Grads, dim: TensorDim, unit: int) -> bool:
        grad = grads[dim.name]
        (index,) = self._positions(dim, unit)
        return grad is not None and not bool(grad.index_select(dim.dim, index).any())

    def shows_outside(self) -> bool:
        """True if an output has an axis that may hold the units of the width."""
        return any(size in self.axes for output in self._outward for size in output.shape)

    def multiples(self, per_unit: Collection[int] = ()) -> set[int]:
        """Return how many times the width an output's axis is, if several times."""
        sizes = {output.shape[-1] for output in self._outward if output.ndim}
        # maps of features have their channels before height and width
        lengths = {size for output in self._outward for size in output.shape}
        sizes |= {size for size in lengths if size // self.units in per_unit}
        return {size // self.units for size in sizes if size and size % self.units == 0} - {0, 1}

    def unused(self, names: Iterable[str]) -> bool:
        """True if the outputs depend on none of these parameters, whatever their values are."""
        names = list(names)
        parameters = [self.parameters[name] for name in names if self.parameters[name].numel()]
        if not all(parameter.requires_grad for parameter in parameters):
            return False  # buffers have no gradient
        outputs = self.outputs(names)
        if not parameters or not any(output.requires_grad for output in outputs):
            return True
        total = torch.stack([output.sum() for output in outputs]).sum()
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
        return all(grad is None for grad in grads)

    def permutation_error(self, dims: Sequence[TensorDim], order: Sequence[int]) -> float:
        """Return the largest relative change of an output if units are reordered."""
        moved = [place for place, unit in enumerate(order) if place != unit]
        with self._edits.undone(), torch.no_grad():
            for dim in dims:
                data = self.parameters[dim.name].data
                table = dim.layout.table(self.units).to(data.device)
                source = table[[order[place] for place in moved]].flatten()
                self._edits.write(dim, table[moved].flatten(), data.index_select(dim.dim, source))
            changed = self.outputs()
        axes = self._axes(dims)
        return max(
            (self._change(*pair, order, axes) for pair in zip(self.base, changed, strict=True)),
            default=torch.inf,
        )

    def proves(self, dims: Sequence[TensorDim], order: Sequence[int]) -> bool:
        """True if the outputs are the same with the units in this order."""
        key: Proof = (frozenset(dims), tuple(order), frozenset(self.axes), tuple(self.watched))
        if key not in self._proofs:
            self._proofs[key] = self.permutation_error(dims, order) < _EQUAL
        return self._proofs[key]

    def _axes(self, dims: Iterable[TensorDim]) -> dict[int, tuple[UnitLayout, ...]]:
        by_size: dict[int, dict[UnitLayout, None]] = {size: {} for size in self.axes}
        for layout in dict.fromkeys(dim.layout for dim in dims):
            size = self.units * layout.parts * layout.run
            if size in by_size and not layout.offset and not layout.gap:
                by_size[size][layout] = None
        return {size: tuple(layouts) or self.axes[size] for size, layouts in by_size.items()}

    def _change(
        self,
        old: Tensor,
        new: Tensor,
        order: Sequence[int],
        axes: Mapping[int, Sequence[UnitLayout]],
    ) -> float:
        """Return how much an output changed, with each axis in the old or the new order."""
        if old.shape != new.shape:  # a model may compute how long its output is (VITS' sound)
            return torch.inf
        if not torch.equal(old.isnan(), new.isnan()):
            return torch.inf
        old, new = old.nan_to_num(0.0), new.nan_to_num(0.0)
        scale = float(old.abs().max()) or 1.0
        candidates = [old]
        for axis, size in enumerate(old.shape):
            orders = [layout.permuted(self.units, order) for layout in axes.get(size, ())]
            candidates += [
                candidate.index_select(axis, index.to(old.device))
                for candidate in candidates
                for index in orders
            ]
        return min(float((candidate - new).abs().max()) for candidate in candidates) / scale

    def _components(
        self,
        unsettled: Sequence[TensorDim],
        dims: list[TensorDim],
        pair: Pair,
        doubted: Collection[TensorDim],
    ) -> list[set[TensorDim]]:
        """Return groups of linked tensor dims: those that unsettled ones are in."""
        groups: list[set[TensorDim]] = []
        for dim in unsettled:
            in_doubt = dim in doubted and not any({*doubted} <= group for group in groups)
            if in_doubt or not any(dim in group for group in groups):
                linked = {dim, *self._disturbed(dim, dims, pair)}
                groups = merged(groups, linked)
        return groups

    def _disturbed(self, dim: TensorDim, dims: list[TensorDim], pair: Pair) -> list[TensorDim]:
        """Return the dims in which the twins' gradients differ after noise in ``dim`` of one."""
        data = self.parameters[dim.name].data
        (positions,) = self._positions(dim, pair[0])
        generator = torch.Generator().manual_seed(1)
        shape = data.index_select(dim.dim, positions).shape
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(data.device)
        for other in dims:
            if other.name == dim.name and other.dim != dim.dim:
                one, two = self._positions(other, *pair)
                noise.index_copy_(other.dim, two, noise.index_select(other.dim, one))
        with self._edits.undone():
            self._edits.write(dim, positions, data.index_select(dim.dim, positions) + noise)
            grads = self._gradients(dims, pair)
            return self._unequal(dims, grads, largest_by_name(grads), pair)

    def _gradients(self, dims: Sequence[TensorDim], pair: Pair) -> Grads:
        """Return the gradients of parameters by name, of a loss that treats both twins alike."""
        by_name: dict[str, Tensor | None] = dict.fromkeys(dim.name for dim in dims)
        buffers = [self.parameters[name] for name in by_name if name in self._followed]
        with following(buffers):
            names = [name for name in by_name if self.parameters[name].requires_grad]
            axes = self._axes(dims)
            outputs = [output for output in self.outputs(names) if output.requires_grad]
            losses = [self._loss(output, pair, axes) for output in outputs]
            if not names or not losses:
                return by_name
            asked = [self.parameters[name] for name in names]
            grads = torch.autograd.grad(torch.stack(losses).sum(), asked, allow_unused=True)
        return by_name | dict(zip(names, grads, strict=True))

    def _loss(self, output: Tensor, pair: Pair, axes: Mapping[int, Sequence[UnitLayout]]) -> Tensor:
        """Return a loss not linear in the output: else the last projection shows no link."""
        weights = self._weights(output.shape)
        for axis, size in enumerate(output.shape):
            if size in axes:
                tied = self._tied_positions(size, pair, axes[size])
                weights = weights.index_select(axis + 1, tied)
        weights = weights.to(output.device)
        return (output * weights[0] + output * output * weights[1]).sum()

    def _weights(self, shape: torch.Size) -> Tensor:
        """Return two random numbers for each number of an output of this shape, always the same."""
        if shape not in self._random:
            generator = torch.Generator().manual_seed(2)
            self._random[shape] = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        return self._random[shape]

    def _tied_positions(self, size: int, pair: Pair, layouts: Sequence[UnitLayout]) -> Tensor:
        """Return for each position of an output axis the one whose weight in the loss it gets."""
        twins = [[layout.positions(unit, self.units) for unit in pair] for layout in layouts]
        tied = torch.arange(size)
        for _ in twins:
            for one, two in twins:
                tied[one] = tied[two] = torch.minimum(tied[one], tied[two])
        return tied

    def _observed(
        self, dims: Sequence[TensorDim], grads: Grads, pair: Pair
    ) -> tuple[list[TensorDim], list[TensorDim]]:
        """Return the tensor dims with gradients, and those of them in which the twins' differ."""
        largest = largest_by_name(grads)
        observed = [dim for dim in dims if largest[dim.name] >= _NO_GRADIENT]
        unequal = self._unequal(observed, grads, largest, pair)
        # differences that are rounding of larger gradients: such a dim is in neither list
        least = _ROUNDING * max(largest.values(), default=0.0)
        rounded = {dim for dim in unequal if largest[dim.name] < least}
        return (
            [dim for dim in observed if dim not in rounded],
            [dim for dim in unequal if dim not in rounded],
        )

    def _unequal(
        self, dims: Sequence[TensorDim], grads: Grads, largest: Mapping[str, float], pair: Pair
    ) -> list[TensorDim]:
        result = []
        for dim in dims:
            grad = grads[dim.name]
            if grad is None or not grad.numel():
                continue
            one, two = self._positions(dim, *pair)
            apart = grad.index_select(dim.dim, one) - grad.index_select(dim.dim, two)
            if largest_in(apart) > _EQUAL * largest[dim.name]:
                result.append(dim)
        return result

    def _positions(self, dim: TensorDim, *units: int) -> list[Tensor]:
        device = self.parameters[dim.name].device
        return [positions_of(dim.layout, unit, self.units, device) for unit in units]


class Edits:
    """The changes that an experiment makes to some tensors, until it ends."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        # changed positions alone: a copy of every tensor takes longer than a pass
        self._before: list[tuple[TensorDim, Tensor, Tensor]] = []

    @property
    def names(self) -> set[str]:
        return {dim.name for dim, _, _ in self._before}

    def write(self, dim: TensorDim, positions: Tensor, values: Tensor) -> None:
        data = self._tensors[dim.name].data
        self._before.append((dim, positions, data.index_select(dim.dim, positions)))
        data.index_copy_(dim.dim, positions, values)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Restore at the end of the context what was changed in it."""
        start = len(self._before)
        try:
            yield
        finally:
            for dim, positions, values in reversed(self._before[start:]):
                self._tensors[dim.name].data.index_copy_(dim.dim, positions, values)
            del self._before[start:]


@dataclass(frozen=True)
class Links:
    groups: tuple[tuple[TensorDim, ...], ...]  # tensor dims that belong together
    unequal: tuple[TensorDim, ...]  # in which the two units are distinguishable
    unobserved: tuple[TensorDim, ...]  # without a gradient, so that their group is unknown


def merged(groups: Sequence[set[TensorDim]], added: set[TensorDim]) -> list[set[TensorDim]]:
    """Return the groups with one more, which is joined with all that share a tensor dim with it."""
    overlapping = [group for group in groups if group & added]
    return [*(group for group in groups if not group & added), added.union(*overlapping)]
