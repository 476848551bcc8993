"""Choose a basis for each head's queries and keys, so that a smaller head dim loses little.

Queries and keys are only multiplied with each other. Where nothing comes in between, queries
``Q A`` and keys ``K C`` with ``A Cᵀ = 1`` have the same products as ``Q`` and ``K``. With the
singular values ``U S Vᵀ = Gq^½ Gk^½``, Gq and Gk the Gram matrices of Q and K,
``A = Gq^-½ U S^½`` and ``C = Gk^-½ V S^½``: no other basis keeps more of the products in its first
columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..graph.cut_list import Refit, RefitInPlace
from ..graph.sides import ConfigGroup, Side
from ..model.paging import in_file
from ..twin.layout import TensorDim
from .batches import first_rows
from .linear_ops import LinearOp
from .measured import MeasuredModel
from .passes import watched_pass

_FLOOR = 1e-6  # of a Gram matrix's mean eigenvalue: added to all of them, so that there is a root


@dataclass(frozen=True, eq=False)
class _Written:
    """Queries or keys: the weight that computes them, and the channels of each head."""

    weight: str
    places: tuple[tuple[str, int], ...]  # parameters and dimensions: the weight and its bias
    heads: Tensor  # output channels, shape ``(heads, head dim)``


@dataclass
class HeadBases:
    """Other bases of queries and keys, by the weights that compute them.

    Attributes:
        whole: changes bases and cuts nothing.
        cut: changes bases and cuts what a step removes.
        edits: the same for parameters, biases included.
    """

    whole: dict[str, list[Refit]] = field(default_factory=dict)
    cut: dict[str, list[Refit]] = field(default_factory=dict)
    edits: dict[str, list[RefitInPlace]] = field(default_factory=dict)

    def add(self, written: _Written, basis: Tensor, kept: Tensor) -> None:
        """Add a basis, shape ``(heads, head dim, head dim)``, the most important columns first.

        ``kept``: the channels that remain, of the shape of ``written.heads``.
        """
        order = kept.int().argsort(stable=True, dim=1, descending=True)  # kept channels come first
        placed = torch.empty_like(basis).scatter_(2, order[:, None].expand_as(basis), basis)
        channels = written.heads.flatten()
        turned: Tensor = torch.block_diag(*placed)  # type: ignore[no-untyped-call]
        whole, cut = (
            _as_refit(turned, channels, some.flatten()) for some in (torch.ones_like(kept), kept)
        )
        self.whole.setdefault(written.weight, []).append(whole)
        self.cut.setdefault(written.weight, []).append(cut)
        for name, dim in written.places:
            self.edits.setdefault(name, []).append(RefitInPlace(dim, None, cut))


def _as_refit(turned: Tensor, channels: Tensor, kept: Tensor) -> Refit:
    """Return the refit that gives the kept channels their columns of a change of basis."""
    change = (turned - torch.eye(len(turned), dtype=turned.dtype))[:, kept]
    return Refit(channels[kept], channels, in_file(change.T.contiguous()), len(channels))


def with_bases(values: Tensor, axis: int, refits: Iterable[Refit]) -> Tensor:
    """Return what a layer writes in other bases; channels that they do not keep are unchanged."""
    for refit in refits:
        kept = refit.kept.to(values.device)
        values = values.index_copy(axis, kept, refit.of(values, axis))
    return values


def head_bases(
    calibration: MeasuredModel, groups: Iterable[ConfigGroup], unread: Collection[str]
) -> HeadBases:
    """Return bases for the queries and keys that a step cuts.

    ``unread``: weights whose outputs no weight reads. Only an experiment shows if the model's
    outputs are the same in a whole basis, or if rotary embeddings or norms come in between.
    """
    bases = HeadBases()
    cuts = [(group, pair) for group in groups if (pair := _pair_in(group, unread)) is not None]
    grams = _grams_of([written for _, pair in cuts for written in pair], calibration)
    for group, pair in cuts:
        if all(written in grams for written in pair):
            found = _best_bases(*(grams[written] for written in pair))
            if all(basis.isfinite().all() for basis in found):  # else a head writes zeros only
                for written, basis in zip(pair, found, strict=True):
                    bases.add(written, basis, _kept(group, len(written.heads)))
    return bases


def _pair_in(group: ConfigGroup, unread: Collection[str]) -> tuple[_Written, _Written] | None:
    """Return what writes queries and keys, if a group cuts nothing else."""
    layers: dict[str, list[Side]] = {}
    for side in group.graph_group.sides:
        layers.setdefault(side.layer, []).append(side)
    tables: list[tuple[tuple[TensorDim, ...], Tensor]] = []
    for sides in layers.values():
        dims = tuple({dim.place: dim for side in sides for dim in side.dims}.values())
        weights = [dim for dim in dims if dim.name in unread]
        table = sides[0].table
        alike = all(side.table.equal(table) for side in sides)
        if len(weights) != 1 or len(dims) > 2 or not alike:
            return None  # a norm of queries, for one
        tables.append((tuple(sorted(dims, key=lambda dim: dim.name not in unread)), table))
    if len(tables) == 1:  # one weight computes both
        ((dims, table),) = tables
        tables = [(dims, half) for half in table.tensor_split(2, 1)]
    if len(tables) != 2 or tables[0][1].shape != tables[1][1].shape:
        return None
    parts = group.graph_group.count.channel_groups
    first, second = (
        _Written(
            dims[0].name,
            tuple(dim.place for dim in dims),
            table.view(parts, -1, table.shape[1]).transpose(1, 2).flatten(0, 1),
        )
        for dims, table in tables
    )
    return first, second


def _kept(group: ConfigGroup, heads: int) -> Tensor:
    """Return which channels of each head remain, shape ``(heads, head dim)``."""
    stays = torch.ones(group.graph_group.units.count, dtype=torch.bool)
    stays[group.units] = False
    parts = group.graph_group.count.channel_groups
    return stays.view(parts, -1).repeat_interleave(heads // parts, 0)


def _grams_of(written: Sequence[_Written], calibration: MeasuredModel) -> dict[_Written, Tensor]:
    """Return the Gram matrices of what is written, shape ``(heads, head dim, head dim)``."""
    grams: dict[_Written, Tensor] = {}

    def visit(op: LinearOp) -> Any:
        result = op.run()
        for each in written:
            if each.weight == op.consumer.parameter and op.consumer.part is None:
                rows = result.movedim(op.axis, -1).flatten(0, -2)
                heads = rows[:, each.heads.to(rows.device)]
                heads = heads.to(torch.promote_types(rows.dtype, torch.float32))
                gram = torch.einsum("tha,thb->hab", heads, heads).cpu()
                grams[each] = grams.get(each, 0) + gram
        return result

    if written:
        batches = first_rows(calibration.train)
        watched_pass(calibration.model, batches, visit, what="bases of heads")
    return grams


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
