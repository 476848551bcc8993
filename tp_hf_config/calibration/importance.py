"""Importances made of what a model's weights read, with Torch-Pruning's own interface."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function

from ..errors import CalibrationWarning
from ..graph.sides import ParameterView
from .batches import writes_text
from .greedy import Part, elimination_order
from .linear_ops import Consumer
from .readings import InputStatistics

if TYPE_CHECKING:
    from .measured import MeasuredModel

Kind = Literal["wanda", "activation", "flap", "obs"]
_READS = (function.prune_linear_in_channels, function.prune_conv_in_channels)


@dataclass(frozen=True)
class _Reader:
    """A consumer of a group, and which of its channels stand for which of the group's roots.

    Attributes:
        consumer: the consumer.
        statistics: what it reads.
        weight: its weight with the channels last, shape ``(outputs, channels)``.
        channels: some of its channels.
        roots: for each of them, the root channel of the group.
    """

    consumer: Consumer
    statistics: InputStatistics
    weight: Tensor
    channels: Tensor
    roots: Tensor


class CalibratedImportance(tp.importance.GroupMagnitudeImportance):  # type: ignore[misc]
    """Ranks a group's channels by what the weights that read them get; see ``importance``.

    It is called by pruners: with a group, of Torch-Pruning's own trace or of a config graph, it
    returns one value for each root channel. Groups that no measured weight reads are ranked by
    magnitude, and a warning says so.

    Args:
        calibration: the measured model.
        kind: how channels are ranked.
        normalizer: as for ``GroupMagnitudeImportance``.
    """

    def __init__(
        self, calibration: MeasuredModel, kind: Kind = "wanda", normalizer: str | None = "mean"
    ):
        super().__init__(p=2, group_reduction="sum", normalizer=normalizer)
        self.calibration, self.kind = calibration, kind

    @torch.no_grad()
    def __call__(self, group: Any) -> Any:
        """Return the importance of a group's root channels, 1-D; ``None``: it has no weights."""
        readers = list(self._readers(group))
        if not readers:
            self._warn_unread(group)
            return super().__call__(group)
        roots = 1 + max(max(item.root_idxs) for item in group if len(item.root_idxs))
        width = roots // len(group.units) if hasattr(group, "units") else 1  # channels of a head
        units = roots // max(1, width)
        scores = self._scores(readers, units, max(1, width))
        scores = scores.repeat_interleave(max(1, width))
        first = sorted(set(group[0].root_idxs))
        return self._normalize(scores[first], self.normalizer)

    def _scores(self, readers: list[_Reader], units: int, width: int) -> Tensor:
        """Return a score for every unit of so many root channels, shape ``(units,)``."""
        if self.kind == "obs":
            scores = self._greedy_scores(readers, units, width)
            if scores is not None:
                return scores
        total = torch.zeros(units, dtype=torch.float64)
        for reader in readers:
            channels = self._channel_scores(reader)[reader.channels].cpu()
            total.scatter_add_(0, reader.roots // width, channels)
        return total.float()

    def _channel_scores(self, reader: _Reader) -> Tensor:
        """Return the score of every channel that a consumer reads, float64."""
        squares = reader.weight.float().square().sum(0).double().cpu()
        statistics = reader.statistics
        if self.kind == "activation":
            return statistics.norms
        if self.kind == "flap":
            return statistics.variances * squares
        return statistics.norms * squares.sqrt()

    def _greedy_scores(self, readers: list[_Reader], units: int, width: int) -> Tensor | None:
        """Return when each unit goes, or ``None`` where no refit follows from Gram matrices."""
        readings = self.calibration.readings  # `_readers` has looked whether they hold
        leaders = [readings.leaders[reader.consumer] for reader in readers]
        if not all(map(readings.needs_gram, leaders)):
            return None
        if not self.calibration.require_all(leaders):
            _warn_of_memory(readers[0].consumer)
            return None
        parts: list[Part] = []
        for reader in readers:
            order = (reader.roots // width).argsort(stable=True)
            if len(order) % units:
                return None  # some units are wider than others
            assert reader.statistics.gram is not None
            table = reader.channels[order].view(units, -1)
            parts.append(Part(reader.statistics.gram, reader.weight, table))
        order = elimination_order(parts)
        scores = torch.empty(units)
        scores[order] = torch.arange(1, units + 1, dtype=torch.float32)
        return scores

    def _readers(self, group: Any) -> Iterator[_Reader]:
        """Yield the consumers of a group that were measured."""
        readings = self.calibration.current()
        names = {id(p): name for name, p in self.calibration.model.named_parameters()}
        places = readings.by_place()
        for item in group:
            place = _read_by(item.dep)
            if place is None or not len(item.idxs):
                continue
            parameter, dim = place
            channels = torch.tensor(list(item.idxs))
            roots = torch.tensor(list(item.root_idxs))
            for consumer in places.get((names.get(id(parameter), ""), dim), ()):
                statistics = readings.of(consumer)
                if statistics is not None and statistics.tokens:
                    values, at = consumer.matrix_of(parameter.detach())
                    weight = values.movedim(at, -1).flatten(0, -2)
                    yield _Reader(consumer, statistics, weight, channels, roots)

    def _warn_unread(self, group: Any) -> None:
        layer = group[0].dep.target.name
        warnings.warn(
            f"{layer}: no weight that was measured reads what this group's layers give, so it is "
            "ranked by magnitude",
            CalibrationWarning,
            stacklevel=3,
        )


def _warn_of_memory(reader: Consumer) -> None:
    """Warn that a group is ranked by another kind than was asked for."""
    warnings.warn(
        f"{reader.parameter} and others read the channels of a group, and memory has no room for "
        'all their Gram matrices together, so "obs" ranks the group as "wanda" does. Give '
        "calibrate() a larger max_memory=",
        CalibrationWarning,
        stacklevel=5,
    )


def _read_by(dep: Any) -> tuple[nn.Parameter, int] | None:
    """Return the parameter and the dimension along which an item of a group reads, or ``None``."""
    layer = dep.target.module
    if isinstance(layer, ParameterView):
        parameter = layer.parameter
        return (parameter, layer.dim) if isinstance(parameter, nn.Parameter) else None
    if dep.handler not in _READS:
        return None
    return layer.weight, 0 if getattr(layer, "transposed", False) else 1


def advice(importance: Any, model: Any) -> str | None:
    """Return what to do instead where a language model is ranked by the size of its weights."""
    sizes = (tp.importance.GroupMagnitudeImportance, tp.importance.MagnitudeImportance)
    if type(importance) not in sizes or not writes_text(model):
        return None
    return (
        f"{type(importance).__name__} ranks {type(model).__name__} by the size of its weights, "
        "which often takes what a language model needs most. Rank it by what its channels carry: "
        "calibration = tp_hf_config.calibrate(model), importance=calibration.importance(), "
        "hooks=[HFConfigSyncHook(compensate=calibration)]"
    )
