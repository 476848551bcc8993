"""Move weights from a model to its pruned successor, and record where they came from.

Only this file removes positions from parameters and gradients. A pruning step cuts the live model
in place; ``apply_cuts`` fills a new build of the class.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

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
        note(new, old, kept)
        return new


@dataclass(frozen=True)
class Origin:
    parameter: nn.Parameter  # as it was when recording began
    kept: Mapping[int, Tensor]  # dimension -> remaining positions; cut dimensions only


class Lineage:
    """Origins of Parameters cut while it records; an optimizer's state has their shapes."""

    def __init__(self) -> None:
        self._origins: Any = WeakIdKeyDictionary()  # weak: a Parameter that is cut again is freed
        self._successors: dict[nn.Module, nn.Module] = {}

    def note(self, new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, Tensor]) -> None:
        origin = self.origin_of(old)
        merged = dict(origin.kept)
        for dim, positions in kept.items():
            merged[dim] = merged[dim][positions] if dim in merged else positions
        self._origins[new] = Origin(origin.parameter, merged)

    def note_successor(self, model: nn.Module, successor: nn.Module) -> None:
        self._successors[model] = successor

    def successor_of(self, model: nn.Module) -> nn.Module:
        while model in self._successors:
            model = self._successors[model]
        return model

    def origin_of(self, parameter: nn.Parameter) -> Origin:
        """The origin of a Parameter; one that was not cut is its own origin."""
        origin: Origin | None = self._origins.get(parameter)
        return Origin(parameter, {}) if origin is None else origin


_lock = threading.Lock()
_recording: list[Lineage] = []


def note(new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, Tensor]) -> None:
    for lineage in _recording:
        lineage.note(new, old, kept)


def note_successor(model: nn.Module, successor: nn.Module) -> None:
    for lineage in _recording:
        lineage.note_successor(model, successor)


@contextmanager
def recording_origins() -> Iterator[Lineage]:
    """Record what this library cuts inside ``with``; recordings may overlap."""
    lineage = Lineage()
    with _lock:
        _recording.append(lineage)
    try:
        yield lineage
    finally:
        with _lock:
            _recording.remove(lineage)
