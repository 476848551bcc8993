"""Cut parameters: copy each one once, however many of its dimensions lose positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..model.tensors import select
from .edits import Edit, RefitInPlace, RefitNotRecorded, Selection
from .origins import note

ApplyRefit = Callable[
    [nn.Module, str, int, torch.Tensor], Iterable[RefitInPlace | RefitNotRecorded]
]
"""Changes a parameter, the first time that one of its dimensions is cut; yields each edit.

It takes the layer, the parameter's name in it, the dimension, and the positions that are about to
go, 1-D.
"""


@dataclass
class _Pending:
    """What will be left of one parameter or buffer.

    Attributes:
        owner: the layer that holds it.
        key: its name in the layer.
        kept: dimension -> the positions that stay.
        sizes: dimension -> the layer's attribute that holds its size (``out_features``).
        new: the smaller tensor, once it is made.
    """

    owner: nn.Module
    key: str
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    sizes: dict[int, str] = field(default_factory=dict)
    new: torch.Tensor | None = None

    @property
    def old(self) -> torch.Tensor:
        """The tensor that the layer has now."""
        tensor: torch.Tensor = getattr(self.owner, self.key)
        return tensor

    def loses_as(self, other: _Pending) -> bool:
        """True if this keeps the same positions of the same dimensions as ``other``."""
        return self.kept.keys() == other.kept.keys() and all(
            torch.equal(kept, other.kept[dim]) for dim, kept in self.kept.items()
        )

    def put(self, new: torch.Tensor) -> None:
        """Give the layer its new tensor and sizes; doing it twice does no harm."""
        if isinstance(new, nn.Parameter):
            self.owner._parameters[self.key] = new
        else:
            self.owner._buffers[self.key] = new
        for dim, name in self.sizes.items():
            size = new.shape[dim]
            setattr(self.owner, name, (size,) if name == "normalized_shape" else size)


class Cuts:
    """Collects which positions of parameters stay, and cuts each parameter once at the end.

    Attributes:
        apply_refit: changes what is about to be cut; ``None``: nothing is changed.
        log: every edit since somebody emptied this: the layer, the parameter's name in it, the
            edit.
    """

    def __init__(self) -> None:
        self.apply_refit: ApplyRefit | None = None
        self.log: list[tuple[nn.Module, str, Edit]] = []
        self._pending: dict[tuple[int, str], _Pending] = {}
        self._depth = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Apply cuts at the end of the outermost ``with`` block, also if it raises, not before."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.apply()

    def settle(self, owner: nn.Module, key: str, dim: int) -> None:
        """Apply all pending cuts if one is along this dimension.

        The next positions of the dimension count from what the first cut leaves.
        """
        pending = self._pending.get((id(owner), key))
        if pending is not None and dim in pending.kept:
            self.apply()

    def refit(self, owner: nn.Module, key: str, dim: int, gone: torch.Tensor) -> None:
        """Refit a parameter that is about to lose positions (1-D), where there is a refit."""
        if self.apply_refit is not None:
            for edit in self.apply_refit(owner, key, dim, gone):
                self.log.append((owner, key, edit))

    def keep(
        self, owner: nn.Module, key: str, dim: int, kept: torch.Tensor, size: str | None = None
    ) -> None:
        """Record which positions of one dimension stay, 1-D, for a parameter and its gradient.

        ``size`` names the layer's attribute that holds the dimension's size, if there is one.
        """
        pending = self._pending.setdefault((id(owner), key), _Pending(owner, key))
        pending.kept[dim] = kept
        if size is not None:
            pending.sizes[dim] = size

    def apply(self) -> None:
        """Apply all pending cuts; if interrupted, finish them and then raise."""
        try:
            self._apply()
        except BaseException:
            self._apply()  # what fails again stays pending
            raise

    def _apply(self) -> None:
        tied_to: dict[int, list[_Pending]] = {}
        for pending in self._pending.values():
            tied_to.setdefault(id(pending.old), []).append(pending)
        while self._pending:
            first = next(iter(self._pending.values()))
            tied = [entry for entry in tied_to[id(first.old)] if entry.loses_as(first)]
            if first.new is None:
                first.new = _smaller(first.old, first.kept)
            for entry in tied:  # tied: one Parameter under several names stays one
                entry.new = first.new
            for entry in tied:
                entry.put(first.new)
                self.log.append((entry.owner, entry.key, Selection(entry.kept)))
                del self._pending[id(entry.owner), entry.key]


def _smaller(old: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return the kept positions of a tensor; a Parameter stays one, and its gradient is cut too."""
    values = select(old.detach(), kept)
    if not isinstance(old, nn.Parameter):
        return values
    new = nn.Parameter(values, old.requires_grad)
    if old.grad is not None:
        new.grad = select(old.grad, kept)
    note(new, old, kept)
    return new
