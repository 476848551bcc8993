"""Find by experiment which dimensions of a model's parameters belong together: the twin test.

Two units of a width are made twins (the same weights in every dimension of that width), so that
nothing in the model can tell them apart and their gradients are equal everywhere.  Where they are
not, the two are not interchangeable there.  Then one dimension's twin is disturbed: exactly the
dimensions that are indexed by the same unit now show unequal gradients.  What is linked is a group,
and a group is right when permuting its units leaves the model's output as it was.

It needs a model, inputs and a list of dimensions, and knows nothing of configs or pruners.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .passes import Result, outputs_in_float64
from .states import states_in

_EQUAL = 1e-9
"""Relative difference up to which two float64 results are the same."""
_SILENT = 1e-12
"""Gradients that are no larger are none."""
_ROUNDING = 1e-15
"""The share of the largest gradient that rounding alone may leave of another."""


@dataclass(frozen=True)
class Layout:
    """Where the units of a width stand along one dimension.

    The dimension holds ``blocks`` blocks; in each, ``parts`` times all of the block's units; a unit
    is ``run`` positions long. One block of several parts is "gate, then up"; one block per head of
    three parts is "query, key and value of head 0, of head 1, ...".  ``gap`` positions behind every
    part belong to something else ("value dims of head 0, its key dims, value dims of head 1, ...").
    """

    parts: int = 1
    run: int = 1
    blocks: int = 1
    offset: int = 0
    gap: int = 0

    def positions(self, unit: int, units: int) -> list[int]:
        """The positions of one unit out of ``units``."""
        block, place = divmod(unit, units // self.blocks)
        per_part = units // self.blocks * self.run + self.gap
        start = self.offset + block * self.parts * per_part + place * self.run
        return [start + part * per_part + i for part in range(self.parts) for i in range(self.run)]

    def table(self, units: int) -> Tensor:
        """Positions of every unit, shape ``(units, parts * run)``."""
        return torch.tensor([self.positions(unit, units) for unit in range(units)])

    def permuted(self, units: int, order: Sequence[int]) -> Tensor:
        """Which position stands at each of a dimension that is full of units in another order."""
        table = self.table(units)
        return table[list(order)].flatten()[table.flatten().argsort()]

    def grouped(self, size: int) -> Layout:
        """The layout of units that are ``size`` neighbouring units each."""
        return replace(self, run=self.run * size)


@dataclass(frozen=True)
class Dim:
    """One dimension of one parameter, and how a width's units stand along it."""

    name: str
    dim: int
    layout: Layout = Layout()


@dataclass(frozen=True)
class Links:
    """What the twin test found.

    Attributes:
        groups: dimensions that belong together.
        unequal: dimensions in which the two units are not interchangeable.
        silent: dimensions without any gradient; where they belong cannot be seen.
    """

    groups: tuple[tuple[Dim, ...], ...]
    unequal: tuple[Dim, ...]
    silent: tuple[Dim, ...]


class TwinTest:
    """The experiments on one model.

    Args:
        model: small, in float64 and eval mode; its parameters are changed and put back.
        inputs: keyword arguments of one forward pass.
        units: how many units the width has.
        runs: an output axis that is one of these times as long holds the units, as the dimensions
            of that length do, or else in such runs or parts.
        watched: what counts as an output beside the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        units: int,
        runs: Sequence[int] = (1,),
        watched: Sequence[Result] = (),
    ):
        self.model, self.inputs, self.units, self.watched = model, dict(inputs), units, watched
        self.axes = {units * run: (Layout(run=run), Layout(parts=run)) for run in runs}
        self.parameters: dict[str, Tensor] = dict(model.named_buffers())
        self.parameters.update(model.named_parameters())
        for name, states in states_in(model, inputs).items():  # units stand along them too
            self.inputs[name] = self.parameters[name] = states.detach().clone().requires_grad_(True)
        self._weights: list[tuple[Tensor, Tensor]] = []
        every = outputs_in_float64(model, inputs, watched)
        self._depending = [number for number, one in enumerate(every) if one.requires_grad]
        self._outward = every[: len(every) - len(watched)]
        self.base = [every[number].detach() for number in self._depending]

    def outputs(self) -> list[Tensor]:
        """The outputs of one forward pass that depend on parameters."""
        every = outputs_in_float64(self.model, self.inputs, self.watched)
        return [every[number] for number in self._depending]

    def links(self, dims: Sequence[Dim], pairs: int = 4, doubted: Collection[Dim] = ()) -> Links:
        """Make two units twins, disturb one dimension after the other, join what is linked.

        A unit can be out of sight for these inputs (a dead ReLU), so up to ``pairs`` pairs of
        units are tried until every dimension was seen.  One disturbance mostly shows the whole
        group; those that are ``doubted`` are disturbed all the same, with every pair.
        """
        groups: list[set[Dim]] = []
        hidden = list(dims)
        silent = list(dims)
        for first in range(0, min(2 * pairs, self.units - 1), 2):
            second = first + 1
            with self._restored(dims):
                self._make_twins(dims, first, second)
                grads = self._gradients(dims, first, second)
                rest, unequal = self._seen(dims, grads, first, second)
                silent = [dim for dim in silent if dim not in rest]
                if unequal:
                    return Links((), tuple(unequal), tuple(silent))
                settled = {dim for group in groups for dim in group} - {*hidden, *doubted}
                hidden = [d for d in hidden if d in rest and self._is_dead(grads, d, first)]
                asked = [dim for dim in rest if dim not in settled]
                for group in self._components(asked, rest, first, second, doubted):
                    joined = [other for other in groups if other & group]
                    groups = [other for other in groups if not other & group]
                    groups.append(group.union(*joined))
            if not hidden and not doubted:
                break
        ordered = (tuple(dim for dim in dims if dim in group) for group in groups)
        return Links(tuple(ordered), (), tuple(silent))

    def alike(self, dims: Sequence[Dim], classes: int) -> bool:
        """Whether the first and last unit of a class are told apart in none of these dimensions.

        Gradients are compared with what each of them is: a change that is lost in the outputs,
        which a permutation would not show, shows here.
        """
        first, second = 0, self.units // classes - 1
        with self._restored(dims):
            self._make_twins(dims, first, second)
            grads = self._gradients(dims, first, second)
            return not self._seen(dims, grads, first, second)[1]

    def _make_twins(self, dims: Sequence[Dim], first: int, second: int) -> None:
        for dim in dims:
            data = self.parameters[dim.name].data
            source, target = self._pair(dim, first, second)
            data.index_copy_(dim.dim, target, data.index_select(dim.dim, source).clone())

    def _is_dead(self, grads: dict[str, Tensor | None], dim: Dim, unit: int) -> bool:
        grad = grads[dim.name]
        index = torch.tensor(dim.layout.positions(unit, self.units))
        return grad is not None and not bool(grad.index_select(dim.dim, index).any())

    def shows_outside(self) -> bool:
        """Whether an output has an axis as long as the width."""
        return any(size in self.axes for output in self._outward for size in output.shape)

    def multiples(self, held: Collection[int] = ()) -> set[int]:
        """How often the width goes into the last axis of an output, where it does several times.

        Args:
            held: how often it goes into dimensions; an output's other axes can be as long (maps of
                features, with their channels before height and width).
        """
        sizes = {output.shape[-1] for output in self._outward if output.ndim}
        sizes |= {n for output in self._outward for n in output.shape if n // self.units in held}
        return {size // self.units for size in sizes if size and size % self.units == 0} - {0, 1}

    def unused(self, names: Iterable[str]) -> bool:
        """Whether none of these parameters has any part in the outputs, whatever its values."""
        asked = [self.parameters[name] for name in names]
        asked = [parameter for parameter in asked if parameter.numel()]
        if not all(parameter.requires_grad for parameter in asked):
            return False  # buffers: not seen this way
        outputs = self.outputs()
        if not asked or not outputs:
            return True
        total = torch.stack([output.sum() for output in outputs]).sum()
        grads = torch.autograd.grad(total, asked, allow_unused=True)
        return all(grad is None for grad in grads)

    def permutation_error(self, dims: Sequence[Dim], order: Sequence[int]) -> float:
        """How much the outputs change when the units stand in another order in ``dims``.

        An output axis that is itself as long as the width may come out in the new order.
        """
        with self._restored(dims), torch.no_grad():
            for dim in dims:
                parameter = self.parameters[dim.name].data
                table = dim.layout.table(self.units).to(parameter.device)
                parameter.index_copy_(
                    dim.dim,
                    table.flatten(),
                    parameter.index_select(dim.dim, table[list(order)].flatten()).clone(),
                )
            changed = self.outputs()
        axes = self._axes(dims)
        return max(
            (self._change(*pair, order, axes) for pair in zip(self.base, changed, strict=True)),
            default=0.0,
        )

    def proves(self, dims: Sequence[Dim], order: Sequence[int]) -> bool:
        """Whether that order of the units leaves the model the same function."""
        return self.permutation_error(dims, order) < _EQUAL

    def _axes(self, dims: Iterable[Dim]) -> dict[int, tuple[Layout, ...]]:
        """For each length of an output axis that holds the units, the layouts they may have."""
        found: dict[int, dict[Layout, None]] = {size: {} for size in self.axes}
        for layout in dict.fromkeys(dim.layout for dim in dims):
            size = self.units * layout.parts * layout.run
            if size in found and not layout.offset and not layout.gap:
                found[size][layout] = None
        return {size: tuple(layouts) or self.axes[size] for size, layouts in found.items()}

    def _change(
        self,
        old: Tensor,
        new: Tensor,
        order: Sequence[int],
        axes: Mapping[int, Sequence[Layout]],
    ) -> float:
        if old.shape != new.shape:  # a model may compute how much it gives (VITS' sound)
            return torch.inf
        if bool(new.isnan().any()) and not bool(old.isnan().any()):
            return torch.inf
        scale = float(old.abs().max()) or 1.0
        candidates = [old]
        for axis, size in enumerate(old.shape):
            orders = [layout.permuted(self.units, order) for layout in axes.get(size, ())]
            candidates += [
                one.index_select(axis, index.to(old.device))
                for one in candidates
                for index in orders
            ]
        return min(float((one - new).abs().max()) for one in candidates) / scale

    def _components(
        self,
        asked: Sequence[Dim],
        dims: list[Dim],
        first: int,
        second: int,
        doubted: Collection[Dim],
    ) -> list[set[Dim]]:
        """What the dimensions that are asked for are linked with, of all of them."""
        groups: list[set[Dim]] = []
        for dim in asked:
            if dim not in doubted and any(dim in group for group in groups):
                continue
            linked = {dim, *self._disturbed(dim, dims, first, second)}
            joined = [group for group in groups if group & linked]
            groups = [group for group in groups if not group & linked]
            groups.append(linked.union(*joined))
        return groups

    def _disturbed(self, dim: Dim, dims: list[Dim], first: int, second: int) -> list[Dim]:
        """The dimensions in which the twins differ once one of them has noise in ``dim``."""
        parameter = self.parameters[dim.name]
        source, _ = self._pair(dim, first, second)
        before = parameter.data.clone()
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(
            parameter.index_select(dim.dim, source).shape, generator=generator, dtype=torch.float64
        ).to(parameter.device)
        for other in dims:
            if other.name == dim.name and other.dim != dim.dim:
                one, two = self._pair(other, first, second)
                noise.index_copy_(other.dim, two, noise.index_select(other.dim, one).clone())
        parameter.data.index_add_(dim.dim, source, noise)
        try:
            grads = self._gradients(dims, first, second)
            return self._unequal(dims, grads, first, second)
        finally:
            parameter.data.copy_(before)

    def _gradients(self, dims: Sequence[Dim], first: int, second: int) -> dict[str, Tensor | None]:
        names = [n for n in dict.fromkeys(d.name for d in dims) if self.parameters[n].requires_grad]
        found: dict[str, Tensor | None] = dict.fromkeys(dim.name for dim in dims)
        axes = self._axes(dims)
        losses = [self._loss(output, first, second, axes) for output in self.outputs()]
        if not names or not losses:
            return found
        grads = torch.autograd.grad(
            torch.stack(losses).sum(), [self.parameters[name] for name in names], allow_unused=True
        )
        found.update(zip(names, grads, strict=True))
        return found

    def _loss(
        self, output: Tensor, first: int, second: int, axes: Mapping[int, Sequence[Layout]]
    ) -> Tensor:
        """Not linear in the output, or the last projection would show no link."""
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn((2, *output.shape), generator=generator, dtype=torch.float64)
        for axis, size in enumerate(output.shape):
            if size in axes:
                alike = self._alike(size, first, second, axes[size])
                weights = weights.index_select(axis + 1, alike)
        weights = weights.to(output.device)
        return (output * weights[0] + output * output * weights[1]).sum()

    def _alike(self, size: int, first: int, second: int, layouts: Sequence[Layout]) -> Tensor:
        """For each position of an output's axis, the one that counts as much: a twin's counterpart.

        Where the axis can hold the units in several ways, they are twins in each.
        """
        pairs = [
            (layout.positions(first, self.units), layout.positions(second, self.units))
            for layout in layouts
        ]
        alike = torch.arange(size)
        for _ in pairs:
            for one, two in pairs:
                least = torch.minimum(alike[one], alike[two])
                alike[one], alike[two] = least, least
        return alike

    def _seen(
        self, dims: Sequence[Dim], grads: Mapping[str, Tensor | None], first: int, second: int
    ) -> tuple[list[Dim], list[Dim]]:
        """The dimensions with gradients, and those of them in which the twins are told apart.

        What differs, and is no more than rounding leaves of larger gradients, is none.
        """
        largest = {
            name: float(grad.abs().max()) if grad is not None and grad.numel() else 0.0
            for name, grad in grads.items()
        }
        seen = [dim for dim in dims if largest[dim.name] >= _SILENT]
        unequal = self._unequal(seen, grads, first, second)
        least = _ROUNDING * max(largest.values(), default=0.0)
        lost = [dim for dim in unequal if largest[dim.name] < least]
        return (
            [dim for dim in seen if dim not in lost],
            [dim for dim in unequal if dim not in lost],
        )

    def _unequal(
        self, dims: Sequence[Dim], grads: Mapping[str, Tensor | None], first: int, second: int
    ) -> list[Dim]:
        result = []
        for dim in dims:
            grad = grads[dim.name]
            if grad is None or not grad.numel():
                continue
            one, two = self._pair(dim, first, second)
            difference = grad.index_select(dim.dim, one) - grad.index_select(dim.dim, two)
            if float(difference.abs().max()) > _EQUAL * float(grad.abs().max()):
                result.append(dim)
        return result

    def _pair(self, dim: Dim, first: int, second: int) -> tuple[Tensor, Tensor]:
        device = self.parameters[dim.name].device
        return (
            torch.tensor(dim.layout.positions(first, self.units), device=device),
            torch.tensor(dim.layout.positions(second, self.units), device=device),
        )

    @contextmanager
    def _restored(self, dims: Sequence[Dim]) -> Iterator[None]:
        before = {name: self.parameters[name].data.clone() for name in {d.name for d in dims}}
        try:
            yield
        finally:
            for name, data in before.items():
                self.parameters[name].data.copy_(data)
