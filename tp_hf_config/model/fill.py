"""Move weights from a model to its pruned successor.

Only this file removes positions from parameters and gradients. A pruning step cuts the live model
in place; ``apply_cuts`` fills a new build of the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigSyncError
from .tensors import owner, parameter_names, put_parameter, select


class Cut(Protocol):
    """What a cut does to each tensor (:class:`~tp_hf_config.graph.cut_list.CutList`)."""

    @property
    def edits(self) -> Mapping[str, Any]:
        """Tensor name -> its edits; a tied parameter is under its first name."""

    def of(self, name: str, values: Tensor) -> Tensor: ...

    def kept(self, name: str) -> dict[int, Tensor]:
        """Dimension -> remaining positions, for each dimension that is cut."""


def fill(new: nn.Module, old: nn.Module, values_of: Callable[[str, Tensor], Tensor]) -> None:
    """Give a build, whose parameters have no data, parameters made from another model's.

    Names, ties and ``requires_grad`` are those of ``old``. ``values_of`` gets the first name of
    each parameter and its old values. Raises ConfigSyncError if the build has another shape.
    """
    built = dict(new.named_parameters(remove_duplicate=False))
    for names in parameter_names(old).values():
        parameter = old.get_parameter(names[0])
        made = nn.Parameter(values_of(names[0], parameter.detach()), parameter.requires_grad)
        for name in names:
            if name not in built or built[name].shape != made.shape:
                shape = list(built[name].shape) if name in built else "no such parameter"
                raise ConfigSyncError(f"{name} has {list(made.shape)}, the class builds {shape}")
        put_parameter(new, names, made)


class LiveCut:
    """A cut of a live model in place, one tensor at a time; the resulting shapes are proved."""

    def __init__(self, model: nn.Module, cut: Cut):
        self._model, self._cut = model, cut
        names = parameter_names(model).values()
        self._names = {name: [name] for name in cut.edits} | {n[0]: n for n in names}
        self._remaining = dict.fromkeys(cut.edits)

    @property
    def remaining(self) -> int:
        return len(self._remaining)

    def carry_out(self) -> None:
        """Cut what remains, and raise an interrupt only then; what fails twice (memory) remains."""
        try:
            self._carry_out()
        except BaseException:
            self._carry_out()
            raise

    @torch.no_grad()
    def _carry_out(self) -> None:
        while self._remaining:
            name = next(iter(self._remaining))
            module, key = owner(self._model, name)
            if key in module._parameters:
                put_parameter(self._model, self._names[name], self._smaller(name))
            else:
                module._buffers[key] = self._cut.of(name, module._buffers[key])  # type: ignore[arg-type]
            del self._remaining[name]

    def _smaller(self, name: str) -> nn.Parameter:
        old = self._model.get_parameter(name)
        new = nn.Parameter(self._cut.of(name, old.detach()), old.requires_grad)
        kept = self._cut.kept(name)
        if old.grad is not None:
            new.grad = select(old.grad, kept) if kept else old.grad
        tell(new, old, kept)
        return new


# told of each Parameter that is cut: the new one, the old one, and dimension -> remaining positions
Follow = Callable[[nn.Parameter, nn.Parameter, Mapping[int, Tensor]], None]
_told: list[Follow] = []


def tell(new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, Tensor]) -> None:
    for follow in tuple(_told):
        follow(new, old, kept)


@contextmanager
def told_of_cuts(follow: Follow) -> Iterator[None]:
    """Call ``follow`` for each Parameter that this library cuts inside ``with``."""
    _told.append(follow)
    try:
        yield
    finally:
        _told.remove(follow)
