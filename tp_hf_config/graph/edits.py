"""What a cut does to one parameter, as functions of the parameter: select positions, refit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.paging import in_file
from ..model.tensors import select


@dataclass(frozen=True)
class Selection:
    """Some positions of some dimensions stay.

    Attributes:
        positions: dimension -> the positions that stay, 1-D.
    """

    positions: Mapping[int, Tensor]

    def of(self, values: Tensor) -> Tensor:
        """Return a copy of a parameter's values with only what stays."""
        return select(values, self.positions)

    def then(self, other: Selection) -> Selection:
        """Return what stays after this and another selection, of what this one leaves."""
        positions = dict(self.positions)
        for dim, kept in other.positions.items():
            positions[dim] = positions[dim][kept] if dim in positions else kept
        return Selection(positions)


@dataclass(frozen=True)
class Refit:
    """How a weight makes up for channels that it no longer reads.

    Attributes:
        kept: the channels that stay, 1-D.
        targets: the channels whose values are estimated from them, 1-D.
        share: how much each target gets of each kept channel, shape ``(kept, targets)``.
        size: how many channels there were.
    """

    kept: Tensor
    targets: Tensor
    share: Tensor
    size: int

    def estimate(self, rows: Tensor) -> Tensor:
        """Return all channels, made of the kept ones: ``(tokens, kept)`` -> ``(tokens, size)``."""
        full = plain_cut(rows, self.kept, self.size)
        share = self.share.to(rows)
        full.index_add_(1, self.targets.to(rows.device), rows @ share)
        return full

    def errors(self, rows: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far the targets are from what they were, by the plain cut and estimated.

        Args:
            rows: the kept channels after the cut, shape ``(tokens, kept)``.
            whole: all channels before, ``(tokens, size)``; for both results ``(tokens, targets)``.
        """
        exact = torch.promote_types(rows.dtype, torch.float32)
        rows, whole = rows.to(exact), whole.to(exact)
        if len(self.targets) == self.size:  # behind a norm, the kept ones change too
            cut = whole - plain_cut(rows, self.kept, self.size)
        else:
            cut = whole.index_select(1, self.targets.to(whole.device))
        return cut, cut - rows @ self.share.to(rows)

    def of(self, weight: Tensor, dim: int) -> Tensor:
        """Return a weight that reads the kept channels alone.

        Args:
            weight: the whole weight, of any shape.
            dim: its dimension of channels.
        """
        last = weight.movedim(dim, -1)
        exact = torch.promote_types(weight.dtype, torch.float32)
        kept = last.index_select(-1, self.kept.to(weight.device)).to(exact)
        gone = last.index_select(-1, self.targets.to(weight.device)).to(exact)
        kept = kept + gone @ self.share.to(kept).T
        return kept.to(weight.dtype).movedim(-1, dim).contiguous()


def plain_cut(rows: Tensor, kept: Tensor, size: int) -> Tensor:
    """Return ``(tokens, kept)`` with zeros for the other channels: ``(tokens, size)``."""
    full = rows.new_zeros(len(rows), size)
    full[:, kept.to(rows.device)] = rows
    return full


@dataclass(frozen=True)
class RefitInPlace:
    """The channels that stay get their refitted weights; the shape is as before.

    Attributes:
        dim: the parameter's dimension of channels.
        part: the number of the matrix in a stack (an expert); ``None``: the parameter is no stack.
        refit: the refit.
    """

    dim: int
    part: int | None
    refit: Refit

    def apply(self, values: Tensor) -> None:
        """Change a parameter's values in place."""
        matrix, dim = matrix_of(values, self.dim, self.part)
        kept = self.refit.kept.to(values.device)
        matrix.index_copy_(dim, kept, self.refit.of(matrix, dim))


@dataclass(frozen=True)
class NotKept:
    """The channels that stay got refitted weights, and how is not kept: it is as large as they."""

    def of(self, values: Tensor) -> Tensor:
        """Raise, for whoever has not asked the cut list."""
        raise ValueError(REFITTED)


REFITTED = (
    "weights were refitted, and a cut list says what was cut alone. Save the pruned model "
    "(save_pretrained), or prune without refit= where a cut list is to be carried out elsewhere"
)
Edit = Selection | RefitInPlace | NotKept


def edited(values: Tensor, edits: Iterable[Edit]) -> Tensor:
    """Return a parameter's values after all edits, in order."""
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
    """Return a copy of a parameter's values; while files are paged, in a file."""
    paged = in_file(values)
    return values.clone() if paged is values else paged


def matrix_of(values: Tensor, dim: int, part: int | None) -> tuple[Tensor, int]:
    """Return a view of one matrix in a stack, and the dimension in it.

    Args:
        values: the stack; a plain weight if ``part`` is ``None``.
        dim: the dimension of channels, in the stack.
        part: the number of the matrix.
    """
    if part is None:
        return values, dim
    stacked = stack_dim(values, dim)
    return values.select(stacked, part), dim - (stacked < dim)


def stack_dim(values: Tensor, dim: int) -> int:
    """Return the dimension of the parts of a stack whose matrices are read along ``dim``."""
    return next(d for d in range(values.ndim) if d != dim)
