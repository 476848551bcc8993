"""Where a pruned model's Parameters come from: which positions of which one are left.

Whatever prunes replaces Parameters by new, smaller ones.  Who holds something of the old one's
shape (an optimizer) needs to know what became of it.
"""

from __future__ import annotations

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
        parameter: the Parameter that there was when recording began.
        kept: of each dimension that lost positions those that are left, in its numbering.
    """

    parameter: nn.Parameter
    kept: Mapping[int, torch.Tensor]


class Lineage:
    """The origins of Parameters that are cut while it records."""

    def __init__(self) -> None:
        self._origins: Any = WeakIdKeyDictionary()  # holds no Parameter that is cut once more

    def note(self, new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, torch.Tensor]) -> None:
        """One Parameter was made of the kept positions of another one."""
        origin = self.origin_of(old)
        merged = dict(origin.kept)
        for dim, positions in kept.items():
            merged[dim] = merged[dim][positions] if dim in merged else positions
        self._origins[new] = Origin(origin.parameter, merged)

    def origin_of(self, parameter: nn.Parameter) -> Origin:
        """Where a Parameter comes from: itself, if it was not cut."""
        origin: Origin | None = self._origins.get(parameter)
        return Origin(parameter, {}) if origin is None else origin


_recording: list[Lineage] = []


def note(new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, torch.Tensor]) -> None:
    """Tell all that record; called by what cuts."""
    for lineage in _recording:
        lineage.note(new, old, kept)


@contextmanager
def recording() -> Iterator[Lineage]:
    """Record what is cut, by this library or by Torch-Pruning, which does it in one function."""
    original = BasePruningFunc._prune_parameter_and_grad
    lineage = Lineage()

    def pruning(self: Any, weight: Any, keep_idxs: Any, pruning_dim: int) -> Any:
        new = original(self, weight, keep_idxs, pruning_dim)
        lineage.note(new, weight, {pruning_dim % weight.ndim: torch.as_tensor(keep_idxs)})
        return new

    _recording.append(lineage)
    BasePruningFunc._prune_parameter_and_grad = pruning
    try:
        yield lineage
    finally:
        BasePruningFunc._prune_parameter_and_grad = original
        _recording.remove(lineage)
