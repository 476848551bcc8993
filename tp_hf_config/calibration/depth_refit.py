"""Refit the weight in front of dropped layers, so that it makes up for them.

The layer before the dropped ones ends with a weight W whose result is added to the hidden states.
Let A be what W reads (tokens x channels), and D what the dropped layers add to the states. The
refitted weight is ``W + Dᵀ N A (Aᵀ N A + r)⁻¹``: least squares for D, with a ridge r. N weighs each
token by 1 / |its states after the dropped layers|², because a norm follows, and so that the first
token, whose states are often very large, does not decide everything.
(Source: ReplaceMe, arXiv 2505.02819.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import listed
from ..forward.observed_pass import hidden_in, hidden_out
from ..model.config_json import runs
from ..model.tensors import parameter_names
from .batches import Batch
from .linear_ops import Consumer, LinearOp, WatchedOps
from .measured import MeasuredModel
from .passes import Ranks, undisturbed, watched_pass
from .refit import solve

_RIDGE = 1e-1  # relative to the mean square of the channels; docs/quality.md
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-9}  # relative rounding errors, by dtype
_ROUGH = 5e-2  # of other dtypes


@dataclass(frozen=True)
class DepthRefit:
    """The refit of one weight, for the dropped layers behind it."""

    parameter: str
    change: Tensor  # to add to the parameter
    # R² on held-out data: the share of what the dropped layers add to the states that it explains
    explained: float


@dataclass
class _Sums:
    """Products over tokens of what a weight reads and of what the dropped layers add."""

    gram: Tensor | None = None  # of what it reads, (channels, channels)
    cross: Tensor | None = None  # of that and what they add, (channels, hidden)
    square: float = 0.0  # of what they add

    def add(self, rows: Tensor, before: Tensor, after: Tensor) -> None:
        exact = torch.promote_types(rows.dtype, torch.float32)
        rows, before, after = (values.to(exact) for values in (rows, before, after))
        norms = after.norm(dim=1, keepdim=True).clamp_min(torch.finfo(exact).tiny)
        rows, added = rows / norms, (after - before) / norms
        gram, cross = rows.T @ rows, rows.T @ added
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.cross = cross if self.cross is None else self.cross.add_(cross)
        self.square += float(added.double().square().sum())

    def over(self, ranks: Ranks) -> None:
        if ranks.own_data and self.gram is not None and self.cross is not None:
            self.gram, self.cross = ranks.summed(self.gram), ranks.summed(self.cross)
            (self.square,) = ranks.sums([self.square])

    def explained(self, change: Tensor) -> float:
        """Return the R² of a change ``(channels, hidden)`` of the weight."""
        assert self.gram is not None
        assert self.cross is not None
        change, gram, cross = (value.double() for value in (change, self.gram, self.cross))
        rest = self.square - 2 * (change * cross).sum() + (change * (gram @ change)).sum()
        return 1 - float(rest) / max(self.square, 1e-300)


@dataclass
class _Run:
    """Neighbouring layers that are dropped, and the weight in front of them."""

    layers: Sequence[nn.Module]
    writer: Consumer
    scale: float  # of the weight's result where it is added to the hidden states
    sums: _Sums = field(default_factory=_Sums)
    rows: Tensor | None = None  # what the weight read in this pass
    before: Tensor | None = None  # the hidden states that the first of the layers got

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Add up the sums of every pass while open."""

        def begin(layer: nn.Module, args: Any, kwargs: Any) -> None:
            self.before = hidden_in(args, kwargs)

        def end(layer: nn.Module, args: Any, output: Any) -> None:
            rows, before, after = self.rows, self.before, hidden_out(output)
            if rows is not None and before is not None and after is not None:
                before, after = before.flatten(0, -2), after.flatten(0, -2)
                if before.shape == after.shape and len(before) == len(rows):
                    self.sums.add(rows, before, after)
            self.rows = self.before = None

        first, last = self.layers[0], self.layers[-1]
        with ExitStack() as stack:
            handle = first.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            stack.callback(last.register_forward_hook(end).remove)
            yield


def depth_refits(
    calibration: MeasuredModel, layers: Sequence[nn.Module], dropped: Iterable[int]
) -> tuple[list[DepthRefit], list[str]]:
    """Return the refits for dropped layers of a list, and why some of them have none."""
    refits: list[DepthRefit] = []
    notes: list[str] = []
    found: list[_Run] = []
    together = runs(sorted(dropped))
    # the layer in front of the dropped ones, and the first of these
    fronts = [(layers[n - 1], layers[n]) if n else None for n, *_ in together]
    calls = _first_calls(calibration, [layer for front in fronts if front for layer in front])
    for numbers, front in zip(together, fronts, strict=True):
        writer = None if front is None else _writer(calibration.model, calls, *front)
        if writer is None:
            several = len(numbers) > 1
            notes.append(
                f"layer{'s' * several} {listed(numbers)} {'have' if several else 'has'} no refit: "
                f"no weight in front of {'them' if several else 'it'} writes to the hidden states "
                "last"
            )
        else:
            found.append(_Run([layers[number] for number in numbers], *writer))
    for run, train, held_out in zip(found, *_measured(calibration, found), strict=True):
        refit = _refit(calibration.model, run, train, held_out)
        if refit is None:
            notes.append(f"{run.writer.parameter} is not refitted: it changes held-out data more")
        else:
            refits.append(refit)
    return refits, notes


def _measured(calibration: MeasuredModel, found: Sequence[_Run]) -> tuple[list[_Sums], list[_Sums]]:
    """Return the sums of every run, on the calibration data and on held-out data."""
    by_consumer = {run.writer: run for run in found}

    def visit(op: LinearOp) -> Any:
        run = by_consumer.get(op.consumer)
        if run is not None:
            run.rows = op.channels_last().detach()
        return op.run()

    def over(batches: Sequence[Batch], what: str) -> list[_Sums]:
        for run in found:
            run.sums = _Sums()
        with ExitStack() as stack:
            for run in found:
                stack.enter_context(run.watched())
            watched_pass(calibration.model, batches, visit, what=what, ranks=calibration.ranks)
        for run in found:
            run.sums.over(calibration.ranks)
        return [run.sums for run in found]

    if not found:
        return [], []
    train = over(calibration.train, "refits of dropped layers")
    return train, over(calibration.held_out, "")


def _refit(model: nn.Module, run: _Run, train: _Sums, held_out: _Sums) -> DepthRefit | None:
    if train.gram is None or train.cross is None:
        return None
    change = solve(train.gram.double(), train.cross.double(), _RIDGE)
    if change is None:
        return None
    explained = (train if held_out.gram is None else held_out).explained(change)
    if not explained > 0:
        return None
    weight = model.get_parameter(run.writer.parameter)
    change = change / run.scale  # (channels, hidden)
    change = change if run.writer.dim == 0 else change.T
    return DepthRefit(run.writer.parameter, change.float().to(weight.device), explained)


_Calls = dict[nn.Module, tuple[Any, Any]]  # layer -> its arguments and keyword arguments


def _first_calls(calibration: MeasuredModel, layers: Sequence[nn.Module]) -> _Calls:
    """Run the model on one batch; return the first call of each layer that runs."""
    calls: _Calls = {}

    def catch(layer: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(layer, (args, kwargs))

    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
            stack.callback(handle.remove)
        if layers:
            watched_pass(calibration.model, calibration.train[:1], ranks=calibration.ranks)
    return calls


def _writer(
    model: nn.Module, calls: _Calls, layer: nn.Module, following: nn.Module
) -> tuple[Consumer, float] | None:
    """Return the weight whose result is added last to the states that leave a layer, and its scale.

    Found by experiment: noise is added to the result of each linear operation of the layer. Where
    the layer's output changes by just that noise, times a number, nothing comes after it.
    """
    if layer not in calls or following not in calls:
        return None  # one of them does not run on this data
    args, kwargs = calls[layer]
    own = {id(parameter) for parameter in layer.parameters()}
    # not a weight that other layers have too
    alone = {
        names[0]
        for parameter, names in parameter_names(model).items()
        if id(parameter) in own and len(names) == 1
    }
    seen: list[tuple[Consumer, torch.Size]] = []

    def output(noisy: int | None = None, noise: Tensor | None = None) -> Tensor | None:
        """Run the layer, with noise added to the result of the operation of this number."""
        seen.clear()

        def visit(op: LinearOp) -> Any:
            result, number = op.run(), len(seen)
            seen.append((op.consumer, result.shape))
            return result if noise is None or number != noisy else result + noise.view(result.shape)

        with undisturbed(model), WatchedOps(model, visit):
            return hidden_out(layer(*args, **kwargs))

    plain, states = output(), hidden_in(*calls[following])
    if plain is None or states is None or plain.shape != states.shape:
        return None
    close = _CLOSE.get(plain.dtype, _ROUGH)
    if _apart(states, plain) > close:
        return None  # the next layer reads something else
    operations = list(seen)
    for number, (consumer, shape) in reversed(list(enumerate(operations))):
        once = sum(other == consumer for other, _ in operations) == 1
        fits = shape.numel() == plain.numel() and shape[-1] == plain.shape[-1]
        if not once or not fits or consumer.part is not None or consumer.parameter not in alone:
            continue
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(plain.shape, generator=generator).to(plain) * plain.std()
        changed = output(number, noise)
        if changed is None:
            continue
        moved, noise = changed.double() - plain.double(), noise.double()
        scale = float((moved * noise).sum() / noise.square().sum())
        if scale and _apart(moved, scale * noise) <= close:
            return consumer, scale
    return None


def _apart(values: Tensor, others: Tensor) -> float:
    values, others = values.double(), others.double()
    return float((values - others).norm() / values.norm().clamp_min(1e-300))


@contextmanager
def refitted(model: nn.Module, refits: Iterable[DepthRefit]) -> Iterator[None]:
    """Change the weights; if the block raises, they are as before."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for refit in refits:
            parameter = model.get_parameter(refit.parameter)
            before.append((parameter, parameter.data))
            exact = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = (parameter.data.to(exact) + refit.change).to(parameter.dtype)
        yield
    except BaseException:
        for parameter, values in before:
            parameter.data = values
        raise
