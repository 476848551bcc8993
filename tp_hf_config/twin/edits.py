"""Change tensors in place for an experiment, and put back what was there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from .layout import TensorDim


class Edits:
    """The changes that an experiment makes to some tensors, until it ends.

    Only the positions that change are kept: a copy of every tensor takes longer than a pass.

    Args:
        tensors: the tensors by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._before: list[tuple[TensorDim, Tensor, Tensor]] = []

    @property
    def names(self) -> set[str]:
        """The names of the tensors that are changed now."""
        return {dim.name for dim, _, _ in self._before}

    def write(self, dim: TensorDim, positions: Tensor, values: Tensor) -> None:
        """Give different positions along a tensor dim these values, in place."""
        data = self._tensors[dim.name].data
        self._before.append((dim, positions, data.index_select(dim.dim, positions)))
        data.index_copy_(dim.dim, positions, values)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """At the end of the context, put back what was written in it."""
        start = len(self._before)
        try:
            yield
        finally:
            for dim, positions, values in reversed(self._before[start:]):
                self._tensors[dim.name].data.index_copy_(dim.dim, positions, values)
            del self._before[start:]
