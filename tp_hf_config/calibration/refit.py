"""Refit weights in closed form, so that they compensate for the channels that are removed.

Let X be what a weight W reads (tokens x channels), K the kept channels and S the selection of K
among all channels. The refitted weight is ``W (S + B)ᵀ`` with ``B = (XKᵀXK + r)⁻¹ XKᵀ(X - XK S)``:
least squares for what the plain cut ``W Sᵀ`` misses. The ridge r pulls it towards the plain cut.
(Sources: FLAP, arXiv 2312.11983; OSSCAR, arXiv 2403.12983; GRAIL, arXiv 2602.23795.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.cut_list import Refit
from ..graph.sides import ConfigGroup, ParameterView, Side
from ..model.paging import in_file
from ..model.tensors import tensor
from .linear_ops import Consumer, LinearOp
from .measured import MeasuredModel, Readings, that_fit
from .passes import Ranks, memory_limit, shown, watched_pass
from .sources import Sources

# times the ridge, behind a norm: a cut of what the norm reads changes each of its outputs, and with
# the ridge of other weights, refits make text of another kind than the calibration's worse
# (docs/quality.md, "Four texts")
_BEHIND_NORMS = 3
_TRIES = 12  # the ridge grows tenfold until the solve succeeds


def refit_from_gram(gram: Tensor, kept: Tensor, ridge: float) -> Refit | None:
    """Return the refit of weights without a norm in front; ``None`` if the channels carry nothing.

    The ridge is relative to the mean square of the kept channels.
    """
    size = len(gram)
    stays = torch.zeros(size, dtype=torch.bool)
    stays[kept] = True
    gone = (~stays).nonzero().flatten()
    rows = gram[kept.to(gram.device)]
    own, cross = (rows[:, some.to(gram.device)].double() for some in (kept, gone))
    del rows
    share = solve(own, cross, ridge)
    return None if share is None else Refit(kept, gone, share.to(gram.dtype), size)


def refit_from_products(own: Tensor, cross: Tensor, kept: Tensor, ridge: float) -> Refit | None:
    """Return the refit of weights behind a norm.

    ``own``: products of its outputs from only the kept channels, ``(kept, kept)``; ``cross``: of
    these with its outputs from all channels, ``(kept, channels)``.
    """
    size = cross.shape[1]
    lost = cross.double().clone()
    lost[:, kept.to(lost.device)] -= own.double()
    share = solve(own.double(), lost, ridge)
    return None if share is None else Refit(kept, torch.arange(size), share.to(own.dtype), size)


def solve(own: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    """Return ``(own + ridge)⁻¹ cross`` in float64; ``None`` if there is nothing to solve."""
    mean = own.diagonal().mean() if len(own) else own.new_zeros(())
    if not mean > 0 or not torch.isfinite(mean):
        return None
    for attempt in range(_TRIES):
        amount = ridge * 10.0**attempt if ridge else (0.0 if not attempt else 1e-15 * 10**attempt)
        shifted = own.clone()
        shifted.diagonal().add_(amount * mean)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        del shifted
        if not int(failed):
            solved = torch.cholesky_solve(cross, factor)
            if torch.isfinite(solved).all():
                return solved
    return None


# leader -> layer -> its copy with only the kept channels
Copies = dict[Consumer, dict[str, nn.Module]]


class StepRefits:
    """The refits of one step, solved before anything is cut."""

    def __init__(self, calibration: MeasuredModel, groups: Sequence[ConfigGroup]):
        self.calibration = calibration
        self.readings = calibration.current()
        places = list(_places(calibration.model, groups))
        # consumer -> the channels that it keeps, 1-D, if it loses some
        self.kept = _kept_channels(places, self.readings)
        self.refits: dict[Consumer, Refit] = {}
        # consumer -> the first with the same inputs and refit
        self.alike: dict[Consumer, Consumer] = {}
        # parameters that lose inputs, though no measured operation multiplied them
        self.unseen = _unseen(places, {c.parameter for c in self.kept})
        # parameter -> output channels, 1-D, that it loses and no measured weight reads
        self.unread_outputs = _unread_outputs(places, self.readings)
        # weight -> the bases in which its outputs are cut
        self.bases: Mapping[str, Sequence[Refit]] = {}
        behind_norms: dict[Consumer, list[Consumer]] = {}
        plain: dict[Consumer, list[Consumer]] = {}
        for consumer in self.kept:
            if consumer.parameter not in self.readings.unread:
                leader = self.readings.leaders[consumer]
                some = behind_norms if leader in self.readings.chains else plain
                some.setdefault(leader, []).append(consumer)
        self._solve_plain(plain)
        kept = {of: len(self.kept[some[0]]) for of, some in behind_norms.items()}
        totals = {of: len(self.readings.statistics[of].squares) for of in kept}
        sizes = {of: 4 * count * (count + totals[of]) for of, count in kept.items()}
        limit = memory_limit(calibration.model, calibration.max_memory, calibration.ranks)
        while sizes:
            leaders = that_fit(sizes, limit)
            products = _Products(self, leaders)
            for leader in shown(leaders, "solving refits", "inputs"):
                self._add(behind_norms[leader], partial(products.refit, leader))
                del sizes[leader]

    def _solve_plain(self, consumers: dict[Consumer, list[Consumer]]) -> None:
        remaining = list(consumers)
        while remaining:
            ready = self.calibration.require(remaining)  # as many as memory has room for
            for leader in shown(ready, "solving refits", "inputs"):
                gram = self.readings.statistics[leader].gram
                assert gram is not None  # require() returns those that have one
                solve = partial(refit_from_gram, gram, ridge=self.ridge_of(leader))
                self._add(consumers[leader], solve)
            remaining = [leader for leader in remaining if leader not in ready] if ready else []

    def _add(self, consumers: Sequence[Consumer], solve: Callable[[Tensor], Refit | None]) -> None:
        first_with: dict[tuple[int, ...], Consumer] = {}
        for consumer in consumers:
            first = first_with.setdefault(tuple(self.kept[consumer].tolist()), consumer)
            refit = self.refits.get(first)
            if first == consumer:
                refit = solve(self.kept[consumer])
                refit = None if refit is None else replace(refit, share=in_file(refit.share))
            if refit is not None:
                self.refits[consumer] = refit
                self.alike[consumer] = first

    def ridge_of(self, leader: Consumer) -> float:
        """Return the ridge of what reads an input; the fewer tokens were seen, the stronger."""
        return self.calibration.ridge * self.readings.statistics[leader].shortage

    def sources(self, leaders: Iterable[Consumer]) -> Sources:
        chains = self.readings.chains
        names = {name for leader in leaders for name in chains.get(leader, ())}
        return Sources(self.calibration.model, names)

    def after_cut(self, op: LinearOp, sources: Sources, copies: Copies) -> Tensor | None:
        """Return what an operation reads after the cut, ``(tokens, kept)``.

        ``None``: it loses no channels, or other layers than those measured ran before it.
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
    """Products of norms' outputs with and without the removed channels, by another pass."""

    def __init__(self, step: StepRefits, leaders: Sequence[Consumer]):
        self._step, self._leaders = step, dict.fromkeys(leaders)
        self._copies: Copies = {}
        self._sources = step.sources(self._leaders)
        calibration = step.calibration
        self._sums: dict[Consumer, list[Tensor]] = {}
        watched_pass(
            calibration.model,
            calibration.train,
            self._visit,
            self._sources,
            what="refits behind norms",
            ranks=calibration.ranks,
        )
        if calibration.ranks.own_data:
            self._add_up(calibration.ranks)

    def _add_up(self, ranks: Ranks) -> None:
        """Add up all ranks' sums, in the order of the leaders."""
        seen = ranks.gathered({leader: sums[0].dtype for leader, sums in self._sums.items()})
        for leader in self._leaders:
            dtypes = [dtypes[leader] for dtypes in seen if leader in dtypes]
            if dtypes:
                kept = len(self._step.kept[leader])
                size = len(self._step.readings.statistics[leader].squares)
                zeros = torch.zeros(kept, kept + size, dtype=dtypes[0], device=ranks.device)
                own = self._sums.get(leader) or torch.split(zeros, [kept, size], 1)
                self._sums[leader] = [*map(ranks.summed, own)]

    def _visit(self, op: LinearOp) -> Any:
        if op.consumer in self._leaders:
            rows = self._step.after_cut(op, self._sources, self._copies)
            if rows is not None:
                exact = torch.promote_types(rows.dtype, torch.float32)
                rows, full = rows.to(exact), op.channels_last().to(exact)
                products = [rows.T @ rows, rows.T @ full]
                before = self._sums.get(op.consumer)
                if before is not None:
                    products = [b + a for a, b in zip(products, before, strict=True)]
                self._sums[op.consumer] = products
        return op.run()

    def refit(self, leader: Consumer, kept: Tensor) -> Refit | None:
        sums = self._sums.get(leader)
        if sums is None or len(sums[0]) != len(kept):  # None: other layers ran before it
            return None
        own, cross = sums
        ridge = _BEHIND_NORMS * self._step.ridge_of(leader)
        return refit_from_products(own, cross, kept, ridge)


# group, side, first name of the parameter, and dimension
_Place = tuple[ConfigGroup, Side, str, int]


def _kept_channels(places: Iterable[_Place], readings: Readings) -> dict[Consumer, Tensor]:
    gone: dict[tuple[str, int], set[int]] = {}
    for group, side, name, dim in places:
        gone.setdefault((name, dim), set()).update(side.table[group.units].flatten().tolist())
    kept: dict[Consumer, Tensor] = {}
    consumers = readings.by_place()
    for place, lost in gone.items():
        for consumer in consumers.get(place, ()):
            size = len(readings.statistics[readings.leaders[consumer]].squares)
            stays = torch.ones(size, dtype=torch.bool)
            stays[list(lost)] = False
            kept[consumer] = stays.nonzero().flatten()
    return kept


def _unread_outputs(places: Sequence[_Place], readings: Readings) -> dict[str, Tensor]:
    consumers = readings.by_place()
    writers = {name for name, _ in consumers}
    read = {id(group) for group, _, name, dim in places if (name, dim) in consumers}
    gone: dict[str, set[int]] = {}
    for group, side, name, _ in places:
        if id(group) not in read and name in writers:  # queries and keys, not their biases
            gone.setdefault(name, set()).update(side.table[group.units].flatten().tolist())
    return {name: torch.tensor(sorted(channels)) for name, channels in gone.items()}


def _unseen(places: Iterable[_Place], seen: set[str]) -> list[str]:
    names = {
        name
        for _, side, name, _ in places
        if not side.out and not isinstance(side.module, ParameterView)
    }
    return sorted(names - seen)


def _places(model: nn.Module, groups: Iterable[ConfigGroup]) -> Iterator[_Place]:
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for side in group.graph_group.sides:
            for dim in side.dims:
                parameter = tensor(group._DG.pretrained, dim.name)
                yield group, side, first.get(id(parameter), dim.name), dim.dim
