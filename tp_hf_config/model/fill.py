"""Move weights from a model before a cut to the model after it, and remember where they came from.

This is the only place that takes positions out of parameters and gradients to prune them. A step
cuts the live model itself; ``apply_cuts`` fills a new build of the class.
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
        """The edits of each tensor that changes; a tied parameter has the first of its names."""

    def of(self, name: str, values: Tensor) -> Tensor:
        """Return a tensor's values after the cut."""

    def kept(self, name: str) -> dict[int, Tensor]:
        """Return dimension -> the positions that stay, for each dimension that is cut."""


def fill(new: nn.Module, old: nn.Module, values_of: Callable[[str, Tensor], Tensor]) -> None:
    """Give a build the parameters that are made of another model's; tied ones stay tied.

    Args:
        new: the build, whose parameters have no data.
        old: the model whose names, ties and ``requires_grad`` count.
        values_of: gets the first name of each parameter and its values, returns the new values.

    Raises:
        ConfigSyncError: the class builds another shape.
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
    """A cut of a live model: each parameter and its gradient is copied once, one at a time.

    Args:
        model: the model.
        cut: what is done to it; its shapes are proved.
    """

    def __init__(self, model: nn.Module, cut: Cut):
        self._model, self._cut = model, cut
        names = parameter_names(model).values()
        self._names = {name: [name] for name in cut.edits} | {n[0]: n for n in names}
        self._remaining = dict.fromkeys(cut.edits)

    @property
    def remaining(self) -> int:
        """How many tensors are not cut yet."""
        return len(self._remaining)

    def carry_out(self) -> None:
        """Cut what is not cut yet; if interrupted, finish first and then raise.

        What fails twice (memory) remains for the next call.
        """
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
    """What a Parameter was cut from.

    Attributes:
        parameter: the Parameter that existed when recording began.
        kept: dimension -> the positions of ``parameter`` that are left, if it lost some.
    """

    parameter: nn.Parameter
    kept: Mapping[int, Tensor]


class Lineage:
    """The origins of the Parameters that are cut while it records.

    Code that holds something of a Parameter's shape (an optimizer) needs them.
    """

    def __init__(self) -> None:
        self._origins: Any = WeakIdKeyDictionary()  # a Parameter that is cut again is freed
        self._successors: dict[nn.Module, nn.Module] = {}

    def note(self, new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, Tensor]) -> None:
        """Record that ``new`` holds the kept positions of ``old``."""
        origin = self.origin_of(old)
        merged = dict(origin.kept)
        for dim, positions in kept.items():
            merged[dim] = merged[dim][positions] if dim in merged else positions
        self._origins[new] = Origin(origin.parameter, merged)

    def note_successor(self, model: nn.Module, successor: nn.Module) -> None:
        """Record that another module holds what is left of a model's parameters."""
        self._successors[model] = successor

    def successor_of(self, model: nn.Module) -> nn.Module:
        """Return the module that holds what is left of a model's parameters, mostly itself."""
        while model in self._successors:
            model = self._successors[model]
        return model

    def origin_of(self, parameter: nn.Parameter) -> Origin:
        """Return where a Parameter comes from; one that was not cut comes from itself."""
        origin: Origin | None = self._origins.get(parameter)
        return Origin(parameter, {}) if origin is None else origin


_lock = threading.Lock()
_recording: list[Lineage] = []


def note(new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, Tensor]) -> None:
    """Tell every recording of a cut."""
    for lineage in _recording:
        lineage.note(new, old, kept)


def note_successor(model: nn.Module, successor: nn.Module) -> None:
    """Tell every recording which module holds what is left of a model's parameters."""
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
