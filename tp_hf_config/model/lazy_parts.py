"""Stacked and concatenated lazy tensors: what is taken of them is taken of their parts.

A checkpoint has the experts of a layer one by one, and the model has all in one parameter.  One
expert of it has to be read by itself: there may be hundreds, and each is written by itself again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

_aten = torch.ops.aten


@dataclass(frozen=True)
class Parts:
    """What a lazy tensor is made of.

    Attributes:
        tensors: the parts.
        dim: the dimension along which they lie.
        stacked: True if each is one position of that dimension; else they are concatenated.
    """

    tensors: tuple[Tensor, ...]
    dim: int
    stacked: bool

    def joined(self) -> Tensor:
        """Return the whole, of parts that may be lazy."""
        join: Any = torch.stack if self.stacked else torch.cat
        whole: Tensor = join(list(self.tensors), self.dim)
        return whole

    def of(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation on the whole, made of parts; ``None``: not possible.

        ``args``: its arguments; the first is the whole.
        """
        if func in (_aten._to_copy.default, _aten.clone.default):
            return self._each(lambda tensor: func(tensor, **kwargs)).joined()
        take = _TAKES.get(func)
        return None if take is None else take(self, *args[1:], **kwargs)

    def select(self, dim: int = 0, index: int = 0) -> Tensor | None:
        """Return one position of a dimension."""
        if dim != self.dim:
            along = self.dim - (dim < self.dim)
            each = [t.select(self._inner(dim), index) for t in self.tensors]
            return Parts(tuple(each), along, self.stacked).joined()
        if self.stacked:
            return self.tensors[index].detach()
        for start, end, tensor in self._spans():
            if start <= index < end:
                return tensor.select(dim, index - start)
        return None

    def index_select(self, dim: int, index: Tensor) -> Tensor | None:
        """Return some positions of a dimension, in the given order."""
        if dim != self.dim:
            inner = self._inner(dim)
            return self._each(lambda tensor: tensor.index_select(inner, index)).joined()
        if self.stacked:
            chosen = tuple(self.tensors[int(i)] for i in index)
            return Parts(chosen, dim, True).joined() if chosen else None
        if len(index) == 0 or bool((index[1:] < index[:-1]).any()):
            return None
        pieces = [
            tensor.index_select(dim, index[(index >= start) & (index < end)] - start)
            for start, end, tensor in self._spans()
        ]
        return Parts(tuple(p for p in pieces if p.shape[dim]), dim, False).joined()

    def slice(
        self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> Tensor | None:
        """Return a range of positions of a dimension."""
        if step != 1:
            return None
        if dim != self.dim:
            inner = self._inner(dim)
            return self._each(lambda t: _aten.slice.Tensor(t, inner, start, end)).joined()
        spans = list(self._spans())
        first, last, _ = slice(start, end).indices(spans[-1][1])
        if self.stacked:
            chosen = self.tensors[first:last]
            return Parts(chosen, dim, True).joined() if chosen else None
        pieces = [
            _aten.slice.Tensor(tensor, dim, max(first, begin) - begin, min(last, stop) - begin)
            for begin, stop, tensor in spans
            if min(last, stop) > max(first, begin)
        ]
        if len(pieces) == 1:
            only: Tensor = pieces[0]
            return only
        return Parts(tuple(pieces), dim, False).joined() if pieces else None

    def unbind(self, dim: int = 0) -> list[Tensor] | None:
        """Return all positions of a dimension, one by one."""
        return _all(self.select(dim, index) for index in range(self._size(dim)))

    def split(self, size: int, dim: int = 0) -> list[Tensor] | None:
        """Return ranges of so many positions."""
        total = self._size(dim)
        return _all(self.slice(dim, at, min(at + size, total)) for at in range(0, total, size))

    def _size(self, dim: int) -> int:
        """Return how many positions a dimension of the whole has."""
        if dim != self.dim:
            return self.tensors[0].shape[self._inner(dim)]
        return list(self._spans())[-1][1]

    def _inner(self, dim: int) -> int:
        """Return the dimension of a part that is this one of the whole."""
        return dim - (self.stacked and dim > self.dim)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Parts:
        return Parts(tuple(map(change, self.tensors)), self.dim, self.stacked)

    def _spans(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the first position of each part, the end, and the part."""
        sizes = [1 if self.stacked else tensor.shape[self.dim] for tensor in self.tensors]
        ends = list(accumulate(sizes))
        yield from zip([0, *ends[:-1]], ends, self.tensors, strict=True)


def _all(pieces: Iterable[Tensor | None]) -> list[Tensor] | None:
    """Return pieces as a list; ``None`` if one is missing."""
    taken = list(pieces)
    return None if any(piece is None for piece in taken) else cast("list[Tensor]", taken)


_TAKES: dict[Any, Callable[..., Any]] = {
    _aten.index_select.default: Parts.index_select,
    _aten.select.int: Parts.select,
    _aten.slice.Tensor: Parts.slice,
    _aten.split.Tensor: Parts.split,
    _aten.unbind.int: Parts.unbind,
}


def parts_of(func: Any, args: Sequence[Any], ndim: int) -> Parts | None:
    """Return the parts that an operation joins; ``None``: it joins none.

    ``ndim``: the number of dimensions of its result.
    """
    if func not in (_aten.stack.default, _aten.cat.default):
        return None
    dim = args[1] if len(args) > 1 else 0
    return Parts(tuple(args[0]), dim % ndim, func is _aten.stack.default)
