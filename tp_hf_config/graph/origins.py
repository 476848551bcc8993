"""Record where a pruned model's Parameters come from: which positions of which old Parameter.

Whatever prunes replaces Parameters by new, smaller ones. Code that holds something of the old
one's shape (an optimizer) needs to know what became of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from torch_pruning.pruner.function import BasePruningFunc


@dataclass(frozen=True)
class Origin:
    """What a Parameter was cut from.

    Attributes:
        parameter: the Parameter that existed when recording began.
        kept: dimension -> the positions of ``parameter`` that are left, if it lost some.
    """

    parameter: nn.Parameter
    kept: Mapping[int, torch.Tensor]


class Lineage:
    """The origins of the Parameters that are cut while it records."""

    def __init__(self) -> None:
        self._origins: Any = WeakIdKeyDictionary()  # a Parameter that is cut again is freed
        self._successors: dict[nn.Module, nn.Module] = {}

    def note(self, new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, torch.Tensor]) -> None:
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
_cut = BasePruningFunc._prune_parameter_and_grad


def note(new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, torch.Tensor]) -> None:
    """Tell every recording of a cut; the code that cuts calls this."""
    for lineage in _recording:
        lineage.note(new, old, kept)


def note_successor(model: nn.Module, successor: nn.Module) -> None:
    """Tell every recording which module holds what is left of a model's parameters."""
    for lineage in _recording:
        lineage.note_successor(model, successor)


@contextmanager
def recording_origins() -> Iterator[Lineage]:
    """Record what is cut inside ``with``, by this library or by Torch-Pruning.

    Torch-Pruning cuts in one function, which is patched as long as any recording is open: they may
    overlap, and end in any order.
    """
    lineage = Lineage()
    with _lock:
        if not _recording:
            BasePruningFunc._prune_parameter_and_grad = _noting(_cut)
        _recording.append(lineage)
    try:
        yield lineage
    finally:
        with _lock:
            _recording.remove(lineage)
            if not _recording:
                BasePruningFunc._prune_parameter_and_grad = _cut


def _noting(cut: Any) -> Any:
    """Return Torch-Pruning's function that cuts a Parameter, followed by :func:`note`."""

    def pruning(self: Any, weight: Any, keep_idxs: Any, pruning_dim: int) -> Any:
        new = cut(self, weight, keep_idxs, pruning_dim)
        note(new, weight, {pruning_dim % weight.ndim: torch.as_tensor(keep_idxs)})
        return new

    return pruning
