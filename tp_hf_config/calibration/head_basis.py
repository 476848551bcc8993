"""Choose a basis for each head, so that a smaller head dim loses little.

Queries and keys are only multiplied with each other. Where nothing comes in between, queries
``Q A`` and keys ``K C`` with ``A Cᵀ = 1`` have the same products as ``Q`` and ``K``. With the
singular values ``U S Vᵀ = Gq^½ Gk^½``, Gq and Gk the Gram matrices of Q and K,
``A = Gq^-½ U S^½`` and ``C = Gk^-½ V S^½``: no other basis keeps more of the products in its first
columns. For values, K is the weight that reads them; what it loses is refitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..graph.cut_list import Refit, RefitInPlace
from ..graph.sides import ConfigGroup, Side
from ..model.paging import in_file
from ..model.sharded import whole_tensor
from .batches import first_rows
from .linear_ops import Consumer, LinearOp
from .measured import MeasuredModel
from .passes import watched_pass
from .refit import StepRefits, solve

_Consumers = Mapping[tuple[str, int], Sequence[Consumer]]  # by parameter and dimension
_FLOOR = 1e-6  # of a Gram matrix's mean eigenvalue: added to all of them, so that there is a root


@dataclass(frozen=True, eq=False)
class _Factor:
    """The weight that computes queries, keys or values, or that reads values.

    Attributes:
        places: the dimension of its channels, and that of its bias.
        heads: these channels, shape ``(heads, head dim)``.
        reader: the weight, if it reads values.
    """

    places: tuple[tuple[str, int], ...]
    heads: Tensor
    reader: Consumer | None

    @property
    def weight(self) -> str:
        return self.places[0][0]


@dataclass
class HeadBases:
    """Other bases of heads.

    Attributes:
        whole: for a weight's outputs, what changes their basis and cuts nothing.
        cut: for a weight's outputs, what changes their basis and cuts what a step removes.
        whole_inputs: what makes a weight read inputs in another basis, nothing cut.
        refits: what makes a weight read inputs that are cut in another basis.
        edits: ``cut`` for parameters, biases included.
    """

    whole: dict[str, list[Refit]] = field(default_factory=dict)
    cut: dict[str, list[Refit]] = field(default_factory=dict)
    whole_inputs: dict[Consumer, Refit] = field(default_factory=dict)
    refits: dict[Consumer, Refit] = field(default_factory=dict)
    edits: dict[str, list[RefitInPlace]] = field(default_factory=dict)

    def run_whole(self, op: LinearOp) -> Any:
        """Run an operation in other bases, nothing cut."""
        refit, inputs = self.whole_inputs.get(op.consumer), None
        if refit is not None:
            rows = op.channels_last().index_select(1, refit.kept.to(op.inputs.device))
            inputs = op.shaped(refit.estimate(rows))
        return in_bases(op.run(inputs), op.axis, self.whole.get(op.consumer.parameter, ()))

    def write(self, factor: _Factor, basis: Tensor, kept: Tensor) -> None:
        """Add a basis of outputs, shape ``(channels, channels)``, with which of them are kept."""
        whole = _as_refit(factor, torch.ones_like(kept), basis.T)
        cut = _as_refit(factor, kept, basis[:, kept].T)
        self.whole.setdefault(factor.weight, []).append(whole)
        self.cut.setdefault(factor.weight, []).append(cut)
        for name, dim in factor.places:
            self.edits.setdefault(name, []).append(RefitInPlace(dim, None, cut))


def head_bases(step: StepRefits, groups: Iterable[ConfigGroup]) -> HeadBases:
    """Return bases for the heads that a step makes narrower.

    Only an experiment shows if the model's outputs are the same in whole bases, or if something
    (rotary embeddings, a norm) comes in between.
    """
    consumers = step.readings.by_place()
    weights = {name for name, _ in consumers}
    pairs = [(group, *pair) for group in groups for pair in _pairs_in(group, consumers, weights)]
    grams = _grams_of([factor for _, *pair in pairs for factor in pair], step.calibration)
    bases = HeadBases()
    for group, first, second in pairs:
        if first not in grams or second not in grams:
            continue  # no data reached them
        kept = _kept(group, len(first.heads))
        own, other = (_placed(basis, kept) for basis in _best_bases(grams[first], grams[second]))
        if not (own.isfinite().all() and other.isfinite().all()):
            continue  # a head of zeros
        kept = kept.flatten()
        if second.reader is None:
            bases.write(second, other, kept)
        else:
            refit = _refit_of(second, own[:, kept], other[:, kept].T, kept, step)
            if refit is None:
                continue
            bases.whole_inputs[second.reader] = _as_refit(second, torch.ones_like(kept), other.T)
            bases.refits[second.reader] = refit
        bases.write(first, own, kept)
    return bases


def in_bases(values: Tensor, axis: int, changes: Iterable[Refit]) -> Tensor:
    """Return a layer's outputs in other bases; those of their channels that are cut are zero."""
    for change in changes:
        kept, channels = (each.to(values.device) for each in (change.kept, change.targets))
        own = change.of(values, axis)
        values = values.index_fill(axis, channels, 0.0).index_copy(axis, kept, own)
    return values


def _pairs_in(
    group: ConfigGroup, consumers: _Consumers, weights: Set[str]
) -> list[tuple[_Factor, _Factor]]:
    """Return the factors of each product of heads that a group makes narrower."""
    if group.graph_group.heads:
        return []  # whole heads are cut
    by_layer: dict[str, list[Side]] = {}
    for side in group.graph_group.sides:
        by_layer.setdefault(side.layer, []).append(side)
    found = [_places_of(sides, consumers, weights) for sides in by_layer.values()]
    layers = [layer for layer in found if layer is not None]
    columns = {table.shape[1] for _, table, _ in layers}
    width, parts = min(columns, default=0), group.graph_group.count.channel_groups
    if len(layers) < len(found) or width * parts < 2 or any(each % width for each in columns):
        return []  # of one head: an activation comes in between, most of all
    factors = [
        _Factor(places, some.view(parts, -1, width).transpose(1, 2).flatten(0, 1), reader)
        for places, table, reader in layers
        for some in torch.split(table, width, 1)  # a weight may compute queries, keys and values
    ]
    written = [factor for factor in factors if factor.reader is None]
    match written, [factor for factor in factors if factor.reader is not None]:
        case ([queries, keys], []):
            return [(queries, keys)]
        case ([values], [output]):
            return [(values, output)]
        case ([queries, keys, values], [output]):
            return [(queries, keys), (values, output)]
    return []


def _places_of(
    sides: Sequence[Side], consumers: _Consumers, weights: Set[str]
) -> tuple[tuple[tuple[str, int], ...], Tensor, Consumer | None] | None:
    """Return where a layer has a group's channels, which ones, and the layer if it reads them.

    ``None``: it has more than a weight and a bias (a norm, for one), or stacks experts.
    """
    places = {dim.place: None for side in sides for dim in side.dims}
    first, *others = sorted(places, key=lambda place: place[0] not in weights)
    readers = consumers.get(first, [])
    alike = all(side.table.equal(sides[0].table) for side in sides)
    if first[0] not in weights or len(others) > 1 or not alike or weights & {n for n, _ in others}:
        return None
    if readers and (others or len(readers) > 1 or readers[0].part is not None):
        return None
    return (first, *others), sides[0].table, readers[0] if readers else None


def _kept(group: ConfigGroup, heads: int) -> Tensor:
    """Return which channels of each head remain, shape ``(heads, head dim)``."""
    stays = torch.ones(group.graph_group.units.count, dtype=torch.bool)
    stays[group.units] = False
    parts = group.graph_group.count.channel_groups
    return stays.view(parts, -1).repeat_interleave(heads // parts, 0)


def _grams_of(factors: Sequence[_Factor], calibration: MeasuredModel) -> dict[_Factor, Tensor]:
    """Return the Gram matrix of each head, shape ``(heads, head dim, head dim)``."""
    grams: dict[_Factor, Tensor] = {}
    written: dict[str, list[_Factor]] = {}
    for factor in factors:
        if factor.reader is None:
            written.setdefault(factor.weight, []).append(factor)
        else:
            weight = whole_tensor(calibration.model, factor.weight)
            rows = weight.movedim(factor.places[0][1], -1).flatten(0, -2)
            grams[factor] = _gram_of(rows, factor)

    def visit(op: LinearOp) -> Any:
        result = op.run()
        for factor in written.get(op.consumer.parameter, ()):
            rows = result.movedim(op.axis, -1).flatten(0, -2)
            grams[factor] = grams.get(factor, 0) + _gram_of(rows, factor)
        return result

    if written:
        batches = first_rows(calibration.train)
        watched_pass(calibration.model, batches, visit, what="bases of heads")
    return grams


def _gram_of(rows: Tensor, factor: _Factor) -> Tensor:
    heads = rows[:, factor.heads.to(rows.device)]
    heads = heads.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.einsum("tha,thb->hab", heads, heads).cpu()


def _best_bases(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bases for two Gram matrices, the most important columns first."""
    (root, inverse), (other_root, other_inverse) = map(_roots_of, (first.double(), second.double()))
    left, values, right = torch.linalg.svd(root @ other_root)
    scale = values.sqrt()[:, None]
    return (inverse @ left * scale).to(first), (other_inverse @ right.mT * scale).to(second)


def _roots_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return a Gram matrix's square root, and that root's inverse."""
    values, vectors = torch.linalg.eigh(gram)
    floor = _FLOOR * values.mean(1, keepdim=True)
    values = (values.clamp(min=0) + floor)[:, None]
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


def _placed(basis: Tensor, kept: Tensor) -> Tensor:
    """Return a basis of all heads' channels, whose kept ones get the first columns of each head."""
    order = kept.int().argsort(stable=True, dim=1, descending=True)
    columns = torch.empty_like(basis).scatter_(2, order[:, None].expand_as(basis), basis)
    placed: Tensor = torch.block_diag(*columns)  # type: ignore[no-untyped-call]
    return placed


def _refit_of(
    factor: _Factor, basis: Tensor, plain: Tensor, kept: Tensor, step: StepRefits
) -> Refit | None:
    """Return the refit of a weight that reads values in the kept columns of their basis.

    ``plain``: what it reads of each channel without a refit, ``(kept, channels)``.
    """
    consumer, channels = factor.reader, factor.heads.flatten()
    assert consumer is not None
    leader = step.readings.leaders[consumer]
    gram = step.readings.statistics[leader].gram
    stays = channels[kept].sort().values
    if gram is None or len(gram) != len(channels) or consumer not in step.refits:
        return None
    if not step.kept[consumer].equal(stays):
        return None  # whole heads are cut too
    products = basis.double().T @ gram.cpu().double()[channels][:, channels]
    own = products @ basis.double()
    found = solve(own, products - own @ plain.double(), step.ridge_of(leader))
    return None if found is None else _as_refit(factor, kept, plain + found.to(plain))


def _as_refit(factor: _Factor, kept: Tensor, values: Tensor) -> Refit:
    """Return the refit that makes the kept channels of all channels, ``(kept, channels)``."""
    channels = factor.heads.flatten()
    share = values - torch.eye(len(channels), dtype=values.dtype)[kept]
    order = channels[kept].argsort()
    return Refit(channels[kept][order], channels, in_file(share[order]), len(channels))
