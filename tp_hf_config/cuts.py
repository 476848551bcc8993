"""Cut parameters: each is copied once, however many of its dimensions lose positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from .lineage import note

PIECE = 1 << 20  # bytes at a time: memory that stays in cache is not fetched from the system anew


@dataclass
class _Pending:
    """What is going to be left of one parameter or buffer; ``sizes``: the layer's words for it."""

    owner: nn.Module
    key: str
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    sizes: dict[int, str] = field(default_factory=dict)
    new: torch.Tensor | None = None

    @property
    def old(self) -> torch.Tensor:
        tensor: torch.Tensor = getattr(self.owner, self.key)
        return tensor

    def loses_as(self, other: _Pending) -> bool:
        """Whether it is left as another one is."""
        return self.kept.keys() == other.kept.keys() and all(
            torch.equal(kept, other.kept[dim]) for dim, kept in self.kept.items()
        )

    def put(self, new: torch.Tensor) -> None:
        """Give the layer its new parameter and sizes; doing it twice does no harm."""
        if isinstance(new, nn.Parameter):
            self.owner._parameters[self.key] = new
        else:
            self.owner._buffers[self.key] = new
        for dim, name in self.sizes.items():
            size = new.shape[dim]
            setattr(self.owner, name, (size,) if name == "normalized_shape" else size)


class Cuts:
    """The positions that are kept of parameters, from when they are known to when they are cut."""

    def __init__(self) -> None:
        self._pending: dict[tuple[int, str], _Pending] = {}
        self._depth = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Cut at the end of the outermost ``with``, by an exception too, not before."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.apply()

    def settle(self, owner: nn.Module, key: str, dim: int) -> None:
        """Cut now, if positions of this dimension are going to be counted anew."""
        pending = self._pending.get((id(owner), key))
        if pending is not None and dim in pending.kept:
            self.apply()

    def keep(
        self, owner: nn.Module, key: str, dim: int, kept: torch.Tensor, size: str | None = None
    ) -> None:
        """Keep some positions of one dimension, of the parameter and of its gradient.

        ``size``: the layer's attribute that counts them.
        """
        pending = self._pending.setdefault((id(owner), key), _Pending(owner, key))
        pending.kept[dim] = kept
        if size is not None:
            pending.sizes[dim] = size

    def apply(self) -> None:
        """Cut what is to be cut; an interrupt waits until all of it is."""
        try:
            self._apply()
        except BaseException:
            self._apply()  # what fails again stays for the next time
            raise

    def _apply(self) -> None:
        tied_to: dict[int, list[_Pending]] = {}
        for pending in self._pending.values():
            tied_to.setdefault(id(pending.old), []).append(pending)
        while self._pending:
            first = next(iter(self._pending.values()))
            tied = [one for one in tied_to[id(first.old)] if one.loses_as(first)]
            if first.new is None:
                first.new = _smaller(first.old, first.kept)
            for one in tied:  # one Parameter under several names stays one
                one.new = first.new
            for one in tied:
                one.put(first.new)
                del self._pending[id(one.owner), one.key]


def _smaller(old: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    values = select(old.detach(), kept)
    if not isinstance(old, nn.Parameter):
        return values
    new = nn.Parameter(values, old.requires_grad)
    if old.grad is not None:
        new.grad = select(old.grad, kept)
    note(new, old, kept)
    return new


def select(tensor: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The kept positions of some dimensions, in one copy.

    Dimension after dimension would need memory for what lies between; a few rows at a time, there
    is hardly any of it.
    """
    (dim, index), *others = sorted((d, i.to(tensor.device)) for d, i in kept.items())
    if not others:
        return tensor.index_select(dim, index)
    last, last_index = others[-1]
    shape = [len(kept[d]) if d in kept else size for d, size in enumerate(tensor.shape)]
    result = tensor.new_empty(shape)
    rows = max(1, PIECE * tensor.shape[dim] // max(1, tensor.nbytes))
    for start in range(0, len(index), rows):
        piece = tensor.index_select(dim, index[start : start + rows])
        for other, other_index in others[:-1]:
            piece = piece.index_select(other, other_index)
        target = result.narrow(dim, start, piece.shape[dim])
        torch.index_select(piece, last, last_index, out=target)
    return result
