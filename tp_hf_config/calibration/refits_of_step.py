"""Solve the refits of one step of a pruner, before anything is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.scratch import free_on_disk, on_disk
from ..graph.config_group import ConfigGroup
from ..graph.edits import Refit
from ..graph.sides import ParameterView, Side
from ..model.lazy_tensor import LazyTensor, is_lazy, values_of
from ..model.tensors import tensor
from .linear_ops import Consumer, LinearOp
from .measured import MeasuredModel
from .over_ranks import Ranks
from .passes import Together, is_streamed, sums_limit, together_on, watched_pass
from .readings import Readings
from .refit import refit_from_gram, refit_from_products
from .sources import Sources

Copies = dict[Consumer, dict[str, nn.Module]]
"""Leader -> layer -> its copy with the kept channels alone."""


class StepRefits:
    """The refits of one step.

    ``groups``: the groups that the step prunes; nothing of them is cut yet.

    Attributes:
        kept: consumer -> the channels that stay, for all consumers that lose some.
        refits: consumer -> its refit, where there is one.
        unseen: parameters that lose inputs, and that no measured operation multiplied.
    """

    def __init__(self, calibration: MeasuredModel, groups: Sequence[ConfigGroup]):
        self.calibration = calibration
        self._lazy = is_lazy(calibration.model)  # then refits are not in memory either
        self.readings = calibration.current()
        self.kept = _kept_channels(calibration.model, groups, self.readings)
        self.refits: dict[Consumer, Refit] = {}
        self.unseen = _unseen(calibration.model, groups, {c.parameter for c in self.kept})
        behind_norms: dict[Consumer, list[Consumer]] = {}
        plain: dict[Consumer, list[Consumer]] = {}
        for consumer in self.kept:
            if consumer.parameter not in self.readings.tables:
                leader = self.readings.leaders[consumer]
                some = behind_norms if leader in self.readings.chains else plain
                some.setdefault(leader, []).append(consumer)
        self._solve_plain(plain)
        for leaders in self._of_one_pass(behind_norms):
            products = _Products(self, leaders)
            for leader in leaders:
                self._add(behind_norms[leader], partial(products.refit, leader))

    def _solve_plain(self, consumers: dict[Consumer, list[Consumer]]) -> None:
        """Solve those without a norm in front, as many at a time as have their Gram matrices."""
        remaining = list(consumers)
        while remaining:
            ready = self.calibration.require(remaining)
            for leader in ready:
                gram = self.readings.statistics[leader].gram
                assert gram is not None  # require() returns those that have one
                ridge = self.calibration.ridge
                solve = partial(refit_from_gram, values_of(gram), ridge=ridge)
                self._add(consumers[leader], solve)
            remaining = [leader for leader in remaining if leader not in ready] if ready else []

    def _of_one_pass(
        self, consumers: Mapping[Consumer, Sequence[Consumer]]
    ) -> Iterator[list[Consumer]]:
        """Yield leaders behind norms, as many at a time as there is room for their products."""
        calibration = self.calibration
        model = calibration.model
        limit = sums_limit(model, calibration.max_memory, calibration.ranks)
        if self.readings.in_lockstep and is_streamed(model):
            limit = max(limit, free_on_disk() // 2)  # those of one layer are in memory
        leaders: list[Consumer] = []
        used = 0
        for leader, (consumer, *_) in consumers.items():
            kept, size = len(self.kept[consumer]), len(self.readings.statistics[leader].total)
            needed = 4 * kept * (kept + size)
            if leaders and used + needed > limit:
                yield leaders
                leaders, used = [], 0
            leaders.append(leader)
            used += needed
        if leaders:
            yield leaders

    def _add(self, consumers: Sequence[Consumer], solve: Callable[[Tensor], Refit | None]) -> None:
        """Add the refits of consumers that read the same values."""
        solved: dict[tuple[int, ...], Refit | None] = {}
        for consumer in consumers:
            key = tuple(self.kept[consumer].tolist())
            if key not in solved:
                refit = solve(self.kept[consumer])
                solved[key] = refit.on_disk() if refit is not None and self._lazy else refit
            refit = solved[key]
            if refit is not None:
                self.refits[consumer] = refit

    def together(self, stage_done: Callable[[], None] = lambda: None) -> Together | None:
        """Return how batches go through the model together; ``None``: one after the other."""
        if not self.readings.in_lockstep:
            return None
        used = [refit.share for refit in self.refits.values()]
        return together_on(self.calibration.model, self.calibration.max_memory, used, stage_done)

    def sources(self, leaders: Iterable[Consumer]) -> Sources:
        """Return what watches the layers from norms to leaders."""
        chains = self.readings.chains
        names = {name for leader in leaders for name in chains.get(leader, ())}
        return Sources(self.calibration.model, names)

    def after_cut(self, op: LinearOp, sources: Sources, copies: Copies) -> Tensor | None:
        """Return what an operation reads once channels are cut, shape ``(tokens, kept)``.

        ``None``: it loses no channels, or other layers than measured are in front of it this time.
        """
        kept = self.kept.get(op.consumer)
        if kept is None:
            return None
        leader = self.readings.leaders[op.consumer]
        chain = self.readings.chains.get(leader)
        if chain is None:
            return op.channels_last().index_select(1, kept.to(op.inputs.device))
        size = op.inputs.shape[op.axis]
        return sources.after_cut(op.inputs, size, chain, kept, copies.setdefault(leader, {}))


class _Products:
    """Products of what norms give with and without the channels that go, by another pass."""

    def __init__(self, step: StepRefits, leaders: Iterable[Consumer]):
        self._step, self._leaders = step, dict.fromkeys(leaders)
        self._own: dict[Consumer, Tensor] = {}
        self._cross: dict[Consumer, Tensor] = {}
        self._copies: Copies = {}
        self._sources = step.sources(self._leaders)
        calibration = step.calibration
        together = step.together(self._to_disk)
        limit = sums_limit(calibration.model, calibration.max_memory, calibration.ranks)
        self._limit = None if together is None else limit  # else all of them have room
        watched_pass(
            calibration.model,
            calibration.train,
            self._visit,
            self._sources,
            what="behind norms",
            together=together,
            ranks=calibration.ranks,
        )
        if calibration.ranks.own_data:
            self._add_up(calibration.ranks)

    def _add_up(self, ranks: Ranks) -> None:
        """Add up the products of all ranks."""
        seen = ranks.gathered({leader: own.dtype for leader, own in self._own.items()})
        for leader in self._leaders:
            dtypes = [dtypes[leader] for dtypes in seen if leader in dtypes]
            if not dtypes:
                continue
            kept = len(self._step.kept[leader])
            size = len(self._step.readings.statistics[leader].total)
            for sums, length in ((self._own, kept), (self._cross, size)):
                if leader not in sums:
                    sums[leader] = torch.zeros(kept, length, dtype=dtypes[0], device=ranks.device)
                sums[leader] = ranks.summed(sums[leader])

    def _visit(self, op: LinearOp) -> Any:
        leader = op.consumer
        if leader in self._leaders:
            rows = self._step.after_cut(op, self._sources, self._copies)
            if rows is not None:
                exact = torch.promote_types(rows.dtype, torch.float32)
                rows, full = rows.to(exact), op.channels_last().to(exact)
                kept, size = rows.shape[1], full.shape[1]
                self._make_room(leader, exact.itemsize * kept * (kept + size))
                for sums, product in ((self._own, rows.T @ rows), (self._cross, rows.T @ full)):
                    sums[leader] = sums[leader] + product if leader in sums else product
        return op.run()

    def _make_room(self, leader: Consumer, size: int) -> None:
        """Put what is in memory into temporary files if a leader's products have no room beside it.

        One layer may have hundreds of experts.
        """
        own = self._own.get(leader)
        if self._limit is None or (own is not None and not isinstance(own, LazyTensor)):
            return
        sums = (*self._own.values(), *self._cross.values())
        used = sum(each.nbytes for each in sums if not isinstance(each, LazyTensor))
        if used + size > self._limit:
            self._to_disk()

    def _to_disk(self) -> None:
        """Put products into temporary files, once a layer is done or where others need memory."""
        for sums in (self._own, self._cross):
            for leader, values in sums.items():
                if not isinstance(values, LazyTensor):
                    sums[leader] = on_disk(values)

    def refit(self, leader: Consumer, kept: Tensor) -> Refit | None:
        """Return the refit of what a leader reads; ``None``: it was not read as before."""
        own = self._own.get(leader)
        if own is None or len(own) != len(kept):
            return None
        cross, ridge = self._cross[leader], self._step.calibration.ridge
        return refit_from_products(values_of(own), values_of(cross), kept, ridge)


def _kept_channels(
    model: nn.Module, groups: Iterable[ConfigGroup], readings: Readings
) -> dict[Consumer, Tensor]:
    """Return the channels that stay of every consumer that loses some, 1-D."""
    gone: dict[tuple[str, int], set[int]] = {}
    for group, side, name, dim in _places(model, groups):
        gone.setdefault((name, dim), set()).update(side.table[group.units].flatten().tolist())
    kept: dict[Consumer, Tensor] = {}
    places = readings.by_place()
    for place, lost in gone.items():
        for consumer in places.get(place, ()):
            size = len(readings.statistics[readings.leaders[consumer]].total)
            stays = torch.ones(size, dtype=torch.bool)
            stays[list(lost)] = False
            kept[consumer] = stays.nonzero().flatten()
    return kept


def _unseen(model: nn.Module, groups: Iterable[ConfigGroup], seen: set[str]) -> list[str]:
    """Return the parameters of layers that lose inputs, but for those that were seen."""
    names = {
        name
        for _, side, name, _ in _places(model, groups)
        if not side.out and not isinstance(side.module, ParameterView)
    }
    return sorted(names - seen)


def _places(
    model: nn.Module, groups: Iterable[ConfigGroup]
) -> Iterator[tuple[ConfigGroup, Side, str, int]]:
    """Yield each tensor dim of groups: its group and side, the parameter's first name, the dim."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for side in group.graph_group.sides:
            for dim in side.dims:
                parameter = tensor(group._DG.pretrained, dim.name)
                yield group, side, first.get(id(parameter), dim.name), dim.dim
