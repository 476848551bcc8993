"""Importances from what a model's weights read, with the interface of Torch-Pruning's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_pruning.pruner import function

from ..errors import CalibrationError, CalibrationWarning, in_one_line, warn
from ..forward.observed_pass import hidden_in, hidden_out
from ..forward.output_tensors import tensors_in
from ..graph.sides import ParameterView
from ..model.tensors import is_matrix_stack
from .batches import Batch, first_rows, writes_text
from .linear_ops import Consumer, Contribution, LinearOp, WatchedOps
from .measured import InputStatistics, Readings
from .passes import ALONE, Ranks, class_logits, run, shown, undisturbed, watched_pass

if TYPE_CHECKING:
    from .measured import MeasuredModel


Kind = Literal["auto", "wanda", "activation", "curvature"]
_READS = (function.prune_linear_in_channels, function.prune_conv_in_channels)
_WRITES = (function.prune_linear_out_channels, function.prune_conv_out_channels)


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

    Whole experts are ranked by what they add to the outputs of their layer, whatever the kind. A
    group that no weight reads is ranked by the product of the norms of what its layers write, as
    of queries and keys. If that was not measured either, it is ranked by magnitude, with a warning.
    """

    def __init__(
        self, calibration: MeasuredModel, kind: Kind = "auto", normalizer: str | None = "mean"
    ):
        super().__init__(p=2, group_reduction="sum", normalizer=normalizer)
        self.calibration, self.kind = calibration, kind
        self.used: set[str] = set()  # what groups were ranked by so far
        self._has_gradients = True

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
            self.used.add("what experts add")
            return self._normalize(scores[first], self.normalizer)
        readers = list(self._readers(group, readings))
        if not readers:
            written = self._written_scores(group, readings, roots)
            if written is not None:
                self.used.add("activation")
                return self._normalize(written[first], self.normalizer)
            self._warn_unread(group)
            self.used.add("magnitude")
            return super().__call__(group)
        width = roots // len(group.units) if hasattr(group, "units") else 1  # channels of a head
        units = roots // max(1, width)
        scores = self._scores(readers, units, max(1, width))
        scores = scores.repeat_interleave(max(1, width))
        return self._normalize(scores[first], self.normalizer)

    def _scores(self, readers: list[_Reader], units: int, width: int) -> Tensor:
        """Return the score of each unit, of ``width`` root channels, shape ``(units,)``."""
        kind = self.kind
        if kind == "auto":
            curved = width > 1 and self.calibration.refits and self._has_gradients
            kind = "curvature" if curved else "activation"
        if kind == "curvature":
            scores = self._curvature_scores(readers, units, width)
            if scores is not None:
                self.used.add(kind)
                return scores
            kind = "activation"
        self.used.add(kind)
        total = torch.zeros(units, dtype=torch.float64)
        for reader in readers:
            channels = _channel_scores(reader, kind)[reader.channels].cpu()
            total.scatter_add_(0, reader.roots // width, channels)
        return total.float()

    def _has_grams(self, readers: list[_Reader]) -> bool:
        """True if the readers have Gram matrices now; they have none behind a norm."""
        readings = self.calibration.readings  # current: `_readers` has measured again if needed
        leaders = [readings.leaders[reader.consumer] for reader in readers]
        if not all(map(readings.needs_gram, leaders)):
            return False
        if self.calibration.require_all(leaders):
            return True
        warn(
            f"{readers[0].consumer.parameter} and other weights read the channels of one "
            "group, and their Gram matrices do not fit into max_memory together, so "
            'it is ranked by "activation", not by "curvature". Pass a larger max_memory= to '
            "calibrate()",
            CalibrationWarning,
        )
        return False

    def _curvature_scores(self, readers: list[_Reader], units: int, width: int) -> Tensor | None:
        """Return what the outputs lose with each unit; ``None`` without products of gradients."""
        if self.calibration.ranks.count > 1 or not self._has_grams(readers):
            return None
        try:
            gradients = self._gradients_of({reader.consumer for reader in readers})
        except (CalibrationError, RuntimeError) as error:
            if self.kind != "auto":
                raise
            warn(
                f"{type(self.calibration.model).__name__}: gradients cannot be measured "
                f'({in_one_line(error)}), so heads are ranked by "activation"',
                CalibrationWarning,
            )
            self._has_gradients = False
            return None
        total = torch.zeros(units, dtype=torch.float64)
        for reader in readers:
            table = _table(reader, units, width)
            if table is None:
                return None
            gram = reader.statistics.gram
            assert gram is not None
            table = table.to(gram.device)
            products = gram.double() * gradients[reader.consumer].to(gram.device)
            total += products[table[:, :, None], table[:, None, :]].sum((1, 2)).cpu()
        return total.float() if total.any() else None

    def _gradients_of(self, consumers: set[Consumer]) -> dict[Consumer, Tensor]:
        """Return products of gradients of consumers, measured with those of other layers."""
        calibration = self.calibration
        if not consumers <= calibration.gradients.keys():
            leaders = calibration.readings.leaders
            wanted = {other for one in consumers for other in _alike(one, leaders)}
            found = _gradient_products(calibration.model, calibration.train, wanted)
            # a new dict: copies of the model share the old one (on_copy)
            calibration.gradients = {**calibration.gradients, **found}
        return calibration.gradients

    def _written_scores(self, group: Any, readings: Readings, roots: int) -> Tensor | None:
        """Return the product over a group's layers of the norm of what they write to each root.

        ``None``: not all of them were seen to write, or there are several ranks.
        """
        if holds_experts(group, self.calibration.model) or self.calibration.ranks.count > 1:
            return None
        read = {consumer.parameter for consumer in readings.leaders}
        items = [(name, item) for name, _, _, item in self._items(group) if name in read]
        stacks = {consumer.parameter for consumer in readings.leaders if consumer.part is not None}
        if not items or stacks.intersection(dict(items)):
            return None
        squares = self._written(dict(items))
        if any(name not in squares for name, _ in items):
            return None
        scores = torch.ones(roots, dtype=torch.float64)
        for name, item in items:
            values = squares[name][list(item.idxs)]
            of_roots = torch.zeros(roots, dtype=torch.float64)
            scores *= of_roots.scatter_add_(0, torch.tensor(list(item.root_idxs)), values).sqrt()
        return scores.float()

    def _written(self, parameters: Collection[str]) -> dict[str, Tensor]:
        """Return the squares of each output channel, measured with those of other layers."""
        calibration = self.calibration
        if not calibration.written.keys() >= set(parameters):
            found: dict[str, Tensor] = {}
            alike = set(map(_without_numbers, parameters))

            def visit(op: LinearOp) -> Any:
                name, result = op.consumer.parameter, op.run()
                if _without_numbers(name) in alike:
                    rows = result.movedim(op.axis, -1).flatten(0, -2)
                    squares = rows.float().square().sum(0).double().cpu()
                    found[name] = found.get(name, 0) + squares
                return result

            batches = first_rows(calibration.train)
            watched_pass(calibration.model, batches, visit, what="queries and keys")
            calibration.written = {**calibration.written, **found}
        return calibration.written

    def _items(self, group: Any) -> Iterator[tuple[str, nn.Parameter, int, Any]]:
        """Yield name, parameter, dimension and item of the weights that a group reads or writes."""
        names = {id(p): name for name, p in self.calibration.model.named_parameters()}
        for item in group:
            place = _place_of(item.dep)
            if place is not None and len(item.idxs):
                yield names.get(id(place[0]), ""), *place, item

    def _readers(self, group: Any, readings: Readings) -> Iterator[_Reader]:
        places = readings.by_place()
        for name, parameter, dim, item in self._items(group):
            channels = torch.tensor(list(item.idxs))
            roots = torch.tensor(list(item.root_idxs))
            for consumer in places.get((name, dim), ()):
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


def _channel_scores(reader: _Reader, kind: Kind) -> Tensor:
    norms = reader.statistics.norms
    if kind == "activation":
        return norms
    return norms * reader.weight.float().square().sum(0).double().cpu().sqrt()


def _table(reader: _Reader, units: int, width: int) -> Tensor | None:
    """Return each unit's channels, ``(units, channels)``; ``None``: some are wider than others."""
    order = (reader.roots // width).argsort(stable=True)
    return None if len(order) % units else reader.channels[order].view(units, -1)


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


def _place_of(dep: Any) -> tuple[nn.Parameter, int] | None:
    """Return the weight and its dimension that an item of a group runs along, if any."""
    layer = dep.target.module
    if isinstance(layer, ParameterView):
        parameter = layer.parameter
        return (parameter, layer.dim) if isinstance(parameter, nn.Parameter) else None
    if dep.handler not in (*_READS, *_WRITES):
        return None
    transposed = getattr(layer, "transposed", False)
    return layer.weight, int((dep.handler in _READS) != transposed)


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


def _gradient_products(
    model: nn.Module, batches: Sequence[Batch], consumers: Collection[Consumer]
) -> dict[Consumer, Tensor]:
    """Return for each consumer the mean product of the gradients of what it reads.

    Shape ``(channels, channels)``, in float32; 0 if no output depends on it, or no token came.
    With the products of what it reads, they tell how much the outputs change without some channels
    (K-FAC, arXiv 1503.05671; LLM Surgeon, arXiv 2312.17244). Outputs are sampled, so no labels are
    needed.
    """
    products = dict.fromkeys(consumers, torch.zeros(()))
    tokens = dict.fromkeys(consumers, 0)
    read: list[tuple[LinearOp, Tensor]] = []  # in this batch, in a node of its own

    def visit(op: LinearOp) -> Any:
        if op.consumer not in consumers:
            return op.run()
        own = op.inputs.view_as(op.inputs) if op.inputs.requires_grad else op.inputs.detach()
        read.append((op, own.requires_grad_()))
        return op.run(own)

    generator = torch.Generator().manual_seed(0)
    with undisturbed(model), torch.enable_grad():
        for number, batch in enumerate(shown(first_rows(batches), "gradients for heads")):
            read.clear()
            result = run(model, number, batch, WatchedOps(model, visit))
            loss = _sampled_loss(result, generator)
            inputs = [own for _, own in read]
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
            for (op, _), gradient in zip(read, gradients, strict=True):
                if gradient is not None:
                    rows = gradient.movedim(op.axis, -1).flatten(0, -2).float()
                    products[op.consumer] = products[op.consumer] + rows.T @ rows
                    tokens[op.consumer] += len(rows)
    return {one: product / max(1, tokens[one]) for one, product in products.items()}


def _alike(consumer: Consumer, others: Collection[Consumer]) -> list[Consumer]:
    """Return the consumers that differ by numbers in their names only: those of other layers."""
    name = _without_numbers(consumer.parameter)
    return [
        other
        for other in others
        if _without_numbers(other.parameter) == name and other.dim == consumer.dim
    ]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _sampled_loss(result: Any, generator: torch.Generator) -> Tensor:
    """Return a loss whose gradient's square is the outputs' Fisher information, in expectation.

    Of logits of classes: the cross entropy with classes that they sample. Of other outputs: their
    sum with random signs.
    """
    logits = class_logits(result)
    if logits is not None:
        rows = logits.flatten(0, -2).float()
        chances = rows.detach().softmax(-1).cpu()
        sampled = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return cross_entropy(rows, sampled.to(rows.device), reduction="sum")
    outputs = [each for each in tensors_in(result) if each.requires_grad]
    if not outputs:
        raise CalibrationError("no output of the model depends on its weights")
    signs = [torch.randint(0, 2, each.shape, generator=generator) * 2 - 1 for each in outputs]
    products = (
        (each.float() * sign.to(each.device)).sum()
        for each, sign in zip(outputs, signs, strict=True)
    )
    return torch.stack([*products]).sum()


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
