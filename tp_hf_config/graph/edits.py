"""The edits that a cut makes to one parameter: select positions, or refit a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.paging import in_file
from ..model.tensors import select


@dataclass(frozen=True)
class Selection:
    """Keeps some positions along some dimensions."""

    positions: Mapping[int, Tensor]  # dimension -> kept positions, 1-D

    def of(self, values: Tensor) -> Tensor:
        return select(values, self.positions)

    def then(self, other: Selection) -> Selection:
        """Combine this selection with a later one, whose positions index this one's result."""
        positions = dict(self.positions)
        for dim, kept in other.positions.items():
            positions[dim] = positions[dim][kept] if dim in positions else kept
        return Selection(positions)


@dataclass(frozen=True)
class Refit:
    """How a weight that reads channels makes up for the removed ones."""

    kept: Tensor  # kept channels, 1-D
    targets: Tensor  # channels that are estimated from the kept ones, 1-D
    share: Tensor  # weight of each kept channel in each target, ``(kept, targets)``
    size: int  # number of channels before the cut

    def estimate(self, rows: Tensor) -> Tensor:
        """Estimate all channels from the kept ones: ``(tokens, kept)`` -> ``(tokens, size)``."""
        full = plain_cut(rows, self.kept, self.size)
        share = self.share.to(rows)
        full.index_add_(1, self.targets.to(rows.device), rows @ share)
        return full

    def of(self, weight: Tensor, dim: int) -> Tensor:
        """Return the refitted weight, which reads the kept channels along ``dim`` only."""
        last = weight.movedim(dim, -1)
        exact = torch.promote_types(weight.dtype, torch.float32)
        kept = last.index_select(-1, self.kept.to(weight.device)).to(exact)
        gone = last.index_select(-1, self.targets.to(weight.device)).to(exact)
        kept = kept + gone @ self.share.to(kept).T
        return kept.to(weight.dtype).movedim(-1, dim).contiguous()


def plain_cut(rows: Tensor, kept: Tensor, size: int) -> Tensor:
    """Set the removed channels to zero: ``(tokens, kept)`` -> ``(tokens, size)``."""
    full = rows.new_zeros(len(rows), size)
    full[:, kept.to(rows.device)] = rows
    return full


@dataclass(frozen=True)
class RefitInPlace:
    """Writes refitted weights to the kept channels; the parameter's shape does not change."""

    dim: int  # dimension of the channels
    part: int | None  # index of the matrix in a stack (an expert); None: no stack
    refit: Refit

    def apply(self, values: Tensor) -> None:
        matrix, dim = matrix_of(values, self.dim, self.part)
        kept = self.refit.kept.to(values.device)
        matrix.index_copy_(dim, kept, self.refit.of(matrix, dim))


@dataclass(frozen=True)
class NotKept:
    """Marks a refit whose values are not stored, because they are as large as the weight."""

    def of(self, values: Tensor) -> Tensor:
        raise ValueError(REFITTED)


REFITTED = (
    "weights were refitted, but a cut list stores only which channels were removed. Save the "
    "pruned model (save_pretrained), or prune without refit= if you need a cut list"
)
Edit = Selection | RefitInPlace | NotKept


def edited(values: Tensor, edits: Iterable[Edit]) -> Tensor:
    own = False  # a stack is copied once for all of its matrices
    for edit in edits:
        if isinstance(edit, RefitInPlace):
            values = values if own else _copy(values)
            edit.apply(values)
        else:
            values = edit.of(values)
        own = True
    return values


def _copy(values: Tensor) -> Tensor:
    paged = in_file(values)  # a new file-backed tensor while paging, else ``values`` itself
    return values.clone() if paged is values else paged


def matrix_of(values: Tensor, dim: int, part: int | None) -> tuple[Tensor, int]:
    """Return a view of one matrix of a stack, and the channel dimension in that matrix."""
    if part is None:
        return values, dim
    stacked = stack_dim(values, dim)
    return values.select(stacked, part), dim - (stacked < dim)


def stack_dim(values: Tensor, dim: int) -> int:
    """Return the stacking dimension of a stack whose matrices have their channels along ``dim``."""
    return next(d for d in range(values.ndim) if d != dim)
