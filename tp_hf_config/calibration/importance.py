"""Importances from what a model's weights read, with the interface of Torch-Pruning's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function

from ..errors import CalibrationError, CalibrationWarning, warn
from ..forward.observed_pass import hidden_in, hidden_out
from ..graph.sides import ParameterView
from ..model.tensors import is_matrix_stack
from .batches import Batch, writes_text
from .linear_ops import Consumer, Contribution
from .measured import InputStatistics, Readings
from .passes import ALONE, Ranks, watched_pass

if TYPE_CHECKING:
    from .measured import MeasuredModel


Kind = Literal["wanda", "activation", "flap", "obs"]
_READS = (function.prune_linear_in_channels, function.prune_conv_in_channels)
_RIDGE = 1e-2  # so that rounding does not decide the cost of a channel that others can replace
_AT_ONCE = 16  # channels removed between two updates; fewer gain nothing


@dataclass(frozen=True)
class _Reader:
    """A consumer of a group, and the root channels that its channels belong to."""

    consumer: Consumer
    statistics: InputStatistics
    weight: Tensor  # with the channels last, ``(outputs, channels)``
    channels: Tensor
    roots: Tensor  # root channel of the group for each of ``channels``


class CalibratedImportance(tp.importance.GroupMagnitudeImportance):  # type: ignore[misc]
    """Ranks any Torch-Pruning group.

    Whole experts are ranked by what they add to the outputs of their layer, whatever the kind. If
    that was not found, or no measured weight reads the group, it is ranked by magnitude, with a
    warning.
    """

    def __init__(
        self, calibration: MeasuredModel, kind: Kind = "wanda", normalizer: str | None = "mean"
    ):
        super().__init__(p=2, group_reduction="sum", normalizer=normalizer)
        self.calibration, self.kind = calibration, kind

    @torch.no_grad()
    def __call__(self, group: Any) -> Any:
        """Return one value per root channel; ``None``: the group has no weights."""
        roots = 1 + max(max(item.root_idxs) for item in group if len(item.root_idxs))
        first = sorted(set(group[0].root_idxs))
        scores = torch.zeros(roots)
        readings = self.calibration.current()
        for root, contribution in _experts_in(group, self.calibration.model, readings):
            scores[root] += contribution.score
        if scores.any():
            return self._normalize(scores[first], self.normalizer)
        readers = list(self._readers(group, readings))
        if not readers:
            self._warn_unread(group)
            return super().__call__(group)
        width = roots // len(group.units) if hasattr(group, "units") else 1  # channels of a head
        units = roots // max(1, width)
        scores = self._scores(readers, units, max(1, width))
        scores = scores.repeat_interleave(max(1, width))
        return self._normalize(scores[first], self.normalizer)

    def _scores(self, readers: list[_Reader], units: int, width: int) -> Tensor:
        """Return the score of each unit, of ``width`` root channels, shape ``(units,)``."""
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
        squares = reader.weight.float().square().sum(0).double().cpu()
        statistics = reader.statistics
        if self.kind == "activation":
            return statistics.norms
        if self.kind == "flap":
            return statistics.variances * squares
        return statistics.norms * squares.sqrt()

    def _greedy_scores(self, readers: list[_Reader], units: int, width: int) -> Tensor | None:
        """Return each unit's place in the elimination order; ``None`` without Gram matrices."""
        readings = self.calibration.readings  # current: `_readers` has measured again if needed
        leaders = [readings.leaders[reader.consumer] for reader in readers]
        if not all(map(readings.needs_gram, leaders)):
            return None
        if not self.calibration.require_all(leaders):
            warn(
                f"{readers[0].consumer.parameter} and other weights read the channels of one "
                'group, and their Gram matrices do not fit into max_memory together, so "obs" '
                'ranks this group like "wanda". Pass a larger max_memory= to calibrate()',
                CalibrationWarning,
            )
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

    def _readers(self, group: Any, readings: Readings) -> Iterator[_Reader]:
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
        why = "no measured weight reads the output of this group's layers"
        if holds_experts(group, self.calibration.model):
            why = "what each expert adds to its layer's output was not found"
        name = group[0].dep.target.name
        warn(f"{name}: {why}, so the group is ranked by magnitude", CalibrationWarning)


def holds_experts(group: Any, model: nn.Module) -> bool:
    """True if a group's units are whole matrices of a stack: experts."""
    return any(True for _ in _stacks_in(group, model))


def _stacks_in(group: Any, model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each stack whose matrices are a group's units: its name, and the group's item."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for item in group:
        view = item.dep.target.module
        if isinstance(view, ParameterView) and view.dim == 0:
            name = names.get(id(view.parameter))
            if name is not None and is_matrix_stack(model, name):
                yield name, item


def _experts_in(
    group: Any, model: nn.Module, readings: Readings
) -> Iterator[tuple[int, Contribution]]:
    """Yield root channel and contribution of each expert that is a group's unit."""
    measured: dict[str, dict[int | None, Contribution]] = {}
    for consumer, contribution in readings.experts.items():
        measured.setdefault(consumer.parameter, {})[consumer.part] = contribution
    items = dict(_stacks_in(group, model)) if measured else {}
    # of several stacks in a module, the last one: others compute what it reads (JetMoE's queries)
    last = {name.rpartition(".")[0].rpartition(".")[0]: name for name in measured if name in items}
    for name in last.values():
        for root, number in zip(items[name].root_idxs, items[name].idxs, strict=True):
            yield root, measured[name].get(number, Contribution())


def _read_by(dep: Any) -> tuple[nn.Parameter, int] | None:
    """Return the parameter, and its dimension along which an item of a group reads, if any."""
    layer = dep.target.module
    if isinstance(layer, ParameterView):
        parameter = layer.parameter
        return (parameter, layer.dim) if isinstance(parameter, nn.Parameter) else None
    if dep.handler not in _READS:
        return None
    return layer.weight, 0 if getattr(layer, "transposed", False) else 1


def advice(importance: Any, model: Any) -> str | None:
    """Return what to do instead, if a language model is ranked by the size of its weights."""
    sizes = (tp.importance.GroupMagnitudeImportance, tp.importance.MagnitudeImportance)
    if type(importance) not in sizes or not writes_text(model):
        return None
    return (
        f"{type(importance).__name__} ranks {type(model).__name__} by the size of its weights, "
        "which often removes the channels that a language model needs most. Rank the channels by "
        "their activations on data: calibration = tp_hf_config.calibrate(model), "
        "importance=calibration.importance(), hooks=[HFConfigSyncHook(refit=calibration)]"
    )


@dataclass(frozen=True)
class Part:
    """What one consumer reads of the units."""

    gram: Tensor  # ``(channels, channels)``
    weight: Tensor  # ``(outputs, channels)``
    table: Tensor  # each unit's channels, ``(units, channels of a unit)``


class _Remaining:
    """A part from which units are removed: its inverse Gram matrix and its refitted weight."""

    def __init__(self, part: Part, ridge: float):
        gram = part.gram.double()
        mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.inverse = torch.linalg.inv(gram + max(ridge, 1e-8) * mean * eye)
        self.weight = part.weight.to(gram)
        self.table = part.table.to(gram.device)

    def costs(self, units: Tensor) -> Tensor:
        """Return the squared error of removing each unit by itself, shape ``(units,)``."""
        table = self.table[units]
        if table.shape[1] == 1:
            channels = table[:, 0]
            squares: Tensor = self.weight[:, channels].square().sum(0)
            cost: Tensor = squares / self.inverse.diagonal()[channels]
            return cost
        blocks = self.inverse[table[:, :, None], table[:, None, :]]
        weights = self.weight[:, table].permute(1, 0, 2)
        solved: Tensor = torch.linalg.solve(blocks, weights.mT)
        return (weights.mT * solved).sum((1, 2))

    def remove(self, units: Tensor) -> None:
        """Remove units: refit the weight, and update the inverse."""
        gone = self.table[units].flatten()
        block = self.inverse[gone][:, gone]
        rows = torch.linalg.solve(block, self.inverse[gone])
        self.weight = self.weight - self.weight[:, gone] @ rows
        self.inverse = self.inverse - self.inverse[:, gone] @ rows


def elimination_order(parts: Sequence[Part], ridge: float = _RIDGE) -> Tensor:
    """Return the units in the order of removal, 1-D: always a block of the cheapest.

    The cost is the squared error of all outputs after the remaining weights are refitted.
    """
    remaining = [_Remaining(part, ridge) for part in parts]
    width = max(part.table.shape[1] for part in parts)
    at_once = max(1, _AT_ONCE // width)
    units = torch.arange(len(parts[0].table))
    order: list[Tensor] = []
    while len(units):
        costs = torch.stack([part.costs(units).cpu() for part in remaining]).sum(0)
        leaving = costs.argsort()[: min(at_once, len(units))]
        order.append(units[leaving])
        for part in remaining:
            part.remove(units[leaving])
        stays = torch.ones(len(units), dtype=torch.bool)
        stays[leaving] = False
        units = units[stays]
    return torch.cat(order)


def layer_influence(
    model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Batch], ranks: Ranks = ALONE
) -> tuple[float, ...]:
    """Return each layer's block influence (ShortGPT, arXiv 2403.03853); 0 changes nothing.

    It is the mean of 1 - cosine(input, output) over all tokens.
    """
    sums, tokens = [0.0] * len(layers), [0.0] * len(layers)

    def watch(number: int) -> Any:
        def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = hidden_in(args, kwargs), hidden_out(output)
            if before is not None and after is not None and before.shape == after.shape:
                axis = _channel_axis(layer, before.shape)
                cosines = torch.cosine_similarity(before.double(), after.double(), dim=axis)
                sums[number] += float((1 - cosines).sum())
                tokens[number] += cosines.numel()

        return note

    handles = [
        layer.register_forward_hook(watch(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    try:
        watched_pass(model, batches, what="influence of layers", ranks=ranks)
    finally:
        for handle in handles:
            handle.remove()
    sums, tokens = ranks.sums(sums), ranks.sums(tokens)
    unseen = [number for number, count in enumerate(tokens) if count == 0]
    if unseen:
        raise CalibrationError(
            f"{type(layers[unseen[0]]).__name__} {unseen[0]} outputs no hidden states on the "
            "calibration data, so its influence cannot be measured. Name the layers to drop: "
            "drop_layers(model, layers=[...])"
        )
    return tuple(total / count for total, count in zip(sums, tokens, strict=True))


def _channel_axis(layer: nn.Module, shape: torch.Size) -> int:
    """Return the axis of the channels: 1 for (batch, channels, height, width), else the last."""
    if len(shape) != 4:
        return -1
    # the first parameter as long as axis 1 or the last decides
    for parameter in layer.parameters():
        if shape[1] in parameter.shape:
            return 1
        if shape[-1] in parameter.shape:
            return -1
    return 1
