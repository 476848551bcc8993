"""Refit a step's weights, where held-out data shows that it helps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, listed
from ..forward.output_tensors import tensors_in
from ..graph.cut_list import RefitInPlace, plain_cut
from ..graph.sides import ConfigGroup
from ..reports import fields_as_json
from .head_basis import HeadBases, head_bases, in_bases
from .linear_ops import Consumer, LinearOp
from .measured import MeasuredModel
from .passes import ALONE, Ranks, class_logits, logits_of, watched_pass
from .refit import Copies, StepRefits
from .sources import Sources

# KL divergences on held-out data, in nats; `in_words` says what they mean
NOTICEABLE, TOO_MUCH = 0.1, 0.5
_RELATIVE = "squared error"
_ROUNDING = 1e-2  # of the change by a cut: so much may rounding change outputs
_AT_ONCE = 16  # tokens; avoids a float32 copy of all logits
_KEPT = 2**30  # bytes of outputs; of more, rows (tokens) at equal distances are kept


class Difference:
    """Compares a model's outputs with those that it kept, of so many batches, batch by batch."""

    def __init__(self, batches: int = 1, ranks: Ranks = ALONE) -> None:
        self._ranks, self._room = ranks, _KEPT // max(1, batches)
        # "KL": of logits of several classes, for each input or token; else "squared error"
        self.measure = "KL"
        self._outputs: list[tuple[torch.Size, Tensor]] = []  # whole shape, and kept rows
        self._sums: list[float] = []

    def note(self, number: int, result: Any) -> None:
        """Keep a batch's output, on the CPU, in its dtype; raise if it holds NaN or inf."""
        output = _output_of(result)
        if not bool((output < math.inf).all()):  # false for NaN; -inf may mask a class
            raise CalibrationError(
                f"the model's output on held-out batch {number + 1} of the calibration data is NaN "
                "or infinite. Load the model in float32 or bfloat16, and check that it runs on "
                "this data"
            )
        if class_logits(result) is None:
            self.measure = _RELATIVE
        self._outputs.append((output.shape, self._rows_of(output)))

    def begin(self) -> None:
        self._sums = []

    def compare(self, number: int, result: Any) -> None:
        (shape, before), output = self._outputs[number], _output_of(result)
        if shape != output.shape:
            self._sums.append(math.nan)  # the pruning narrowed the output
            return
        now = self._rows_of(output)
        if self.measure == "KL":
            self._sums.append(_divergence(before, now))
        else:
            before, now = before.float(), now.float()
            scale = float(before.square().sum()) or 1.0
            self._sums.append(float((now - before).square().sum()) / scale)

    def _rows_of(self, output: Tensor) -> Tensor:
        rows = output.detach().reshape(-1, output.shape[-1] if output.ndim else 1)
        fit = max(1, self._room // max(1, rows[:1].nbytes))
        if len(rows) > fit:
            rows = rows[torch.linspace(0, len(rows) - 1, fit, device=rows.device).long()]
        return rows.cpu()

    def mean(self) -> float:
        """Return the mean over all batches; NaN if an output changed its shape.

        All ranks call this.
        """
        if _RELATIVE in self._ranks.gathered(self.measure):
            self.measure = _RELATIVE  # a rank without batches does not know
        total, batches = self._ranks.sums([sum(self._sums), len(self._sums)])
        return total / max(1, batches)


def _divergence(before: Tensor, now: Tensor) -> float:
    """Return the mean KL divergence of logits, shape ``(tokens, classes)``."""
    total = 0.0
    parts = (torch.split(one, _AT_ONCE) for one in (before, now))
    for some, same in zip(*parts, strict=True):
        wanted, found = some.float().log_softmax(-1), same.float().log_softmax(-1)
        total += float((wanted.exp() * (wanted - found)).sum())
    return total / max(1, len(before))


def _output_of(result: Any) -> Tensor:
    logits = logits_of(result)
    output = next(tensors_in(result), None) if logits is None else logits
    if output is None:
        raise CalibrationError(
            f"the model returns a {type(result).__name__} without tensors, so its outputs on "
            "held-out data cannot be compared. Its forward pass has to return a tensor, a tuple or "
            "a dict"
        )
    return output


@dataclass
class Errors:
    """Squared errors of a layer's output over the held-out data."""

    cut: float = 0.0
    refit: float = 0.0
    output: float = 0.0  # the squared output itself


def run_as_cut(
    step: StepRefits,
    using: Collection[Consumer],
    after_batch: Callable[[int, Any], None],
    what: str = "",
) -> None:
    """Run the model on held-out data, with each weight reading its inputs as the step leaves them.

    Only consumers in ``using`` are refitted, tied heads also where they embed tokens. Operations
    without a weight run as in the whole model: products of queries and keys get zeros for removed
    channels, and keep the scale of the whole model.
    """
    heads = {each.parameter: step.refits[each] for each in using if each.dim == 1}
    sources, copies = step.sources(_leaders(step)), Copies()
    latest: tuple[Any, Tensor, Tensor] | None = None

    def visit(op: LinearOp) -> Any:
        result, name = read_as_cut(op), op.consumer.parameter
        if op.consumer.part is not None:
            return result
        if name in step.bases:
            return in_bases(result, op.axis, step.bases[name])
        gone = step.unread_outputs.get(name)
        return result if gone is None else result.index_fill(op.axis, gone.to(result.device), 0.0)

    def read_as_cut(op: LinearOp) -> Any:
        nonlocal latest
        used = op.consumer in using
        alike = step.alike.get(op.consumer, op.consumer), used
        values = op.inputs
        if latest is None or latest[0] != alike or not _same(values, latest[1]):
            rows = step.after_cut(op, sources, copies)
            if rows is None:
                return op.run()
            refit = step.refits[op.consumer] if used else None
            latest = alike, values, _cut(op, rows, step) if refit is None else refit.estimate(rows)
        return op.run(op.shaped(latest[2]))

    def embedded(name: str, values: Tensor) -> Tensor:
        refit = heads.get(name)
        if refit is None:
            return values
        return values.index_copy(-1, refit.kept.to(values.device), refit.of(values, -1))

    run_held_out(step.calibration, after_batch, what, visit, sources, embedded)


def layer_errors(
    step: StepRefits, after_batch: Callable[[int, Any], None]
) -> tuple[dict[Consumer, Errors], set[Consumer]]:
    """Run the whole model on held-out data; return each refit's errors there, over all ranks.

    Also the refits of weights in which inputs were looked up (tied heads).
    """
    errors = {consumer: Errors() for consumer in step.refits}
    tables: set[str] = set()
    sources, copies = step.sources(_leaders(step)), Copies()

    def visit(op: LinearOp) -> Any:
        whole, refit = op.run(), step.refits.get(op.consumer)
        rows = None if refit is None else step.after_cut(op, sources, copies)
        if refit is not None and rows is not None:
            found = errors[op.consumer]
            found.cut += _squares(op.run(op.shaped(_cut(op, rows, step))) - whole)
            found.refit += _squares(op.run(op.shaped(refit.estimate(rows))) - whole)
            found.output += _squares(whole)
        return whole

    def embedded(name: str, values: Tensor) -> Tensor:
        tables.add(name)
        return values

    what, ranks = "held-out data, unpruned", step.calibration.ranks
    run_held_out(step.calibration, after_batch, what, visit, sources, embedded)
    own = [value for each in errors.values() for value in astuple(each)]
    sums = iter(ranks.sums(own))
    tables = set[str]().union(*ranks.gathered(tables))
    tied = {consumer for consumer in errors if consumer.parameter in tables}
    return {consumer: Errors(*islice(sums, 3)) for consumer in errors}, tied


def run_held_out(
    calibration: MeasuredModel,
    after_batch: Callable[[int, Any], None],
    what: str = "",
    visit: Callable[[LinearOp], Any] | None = None,
    sources: Sources | None = None,
    embedded: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    model, batches, ranks = calibration.model, calibration.held_out, calibration.ranks
    watched_pass(model, batches, visit, sources, after_batch, what, ranks, embedded=embedded)


def _cut(op: LinearOp, rows: Tensor, step: StepRefits) -> Tensor:
    return plain_cut(rows, step.kept[op.consumer], op.inputs.shape[op.axis])


def _leaders(step: StepRefits) -> set[Consumer]:
    return {step.readings.leaders[consumer] for consumer in step.kept}


def _same(values: Tensor, others: Tensor) -> bool:
    """True if two tensors are the same memory, not written to in between."""
    places = (
        (each.data_ptr(), each.shape, each.stride(), each._version) for each in (values, others)
    )
    return next(places) == next(places)


def _squares(values: Tensor) -> float:
    return float(
        torch.linalg.vector_norm(
            values, dtype=torch.promote_types(values.dtype, torch.float32)
        ).double()
        ** 2
    )


@dataclass
class Refitted:
    """The effect of a refit on one weight, on held-out data.

    Attributes:
        weight: the parameter's name.
        part: index of the expert, if the parameter stacks several.
        cut: squared error of the layer's output without the refit, relative to the output.
        refit: the same with the refit.
        used: True if the refit is used: its error is not greater than the plain cut's.
    """

    weight: str
    part: int | None = None
    cut: float = 0.0
    refit: float = 0.0
    used: bool = True


@dataclass
class Refits:
    """The effect of the refits of one step; ``str`` gives a line or two.

    Attributes:
        layers: the effect on each weight.
        measure: how the model's outputs on held-out data are compared: ``"KL"`` of the logits, or a
            relative ``"squared error"``.
        cut: the change by the plain cut; ``None`` if nothing is held out. Estimated before the cut
            by running the model as if it were cut, except that products of shorter queries and keys
            keep their scale.
        refit: the change with refits, estimated in the same way.
        after: the change measured after the cut; ``None`` also if the output is narrower, or if the
            pruned model does not run on the held-out data (a note says so).
        seconds: time to solve and compare.
        notes: notes for the user.
    """

    layers: list[Refitted] = field(default_factory=list)
    measure: str = ""
    cut: float | None = None
    refit: float | None = None
    after: float | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        used = sum(layer.used for layer in self.layers)
        text = f"{used} of {len(self.layers)} weights refitted in {self.seconds:.1f} s"
        if self.cut is not None and self.refit is not None:
            text += (
                f"; {self.measure} on held-out data {self.cut:.3g} without refits, {self.refit:.3g}"
            )
            text += " with refits"
        if self.after is not None:
            text += f", {self.after:.3g} measured after pruning"
        expected = self.expected
        meaning = [] if expected is None else [f"KL {expected:.3g}: {in_words(expected)}"]
        return "\n    ".join([text, *meaning, *self.notes])

    @property
    def expected(self) -> float | None:
        """The KL divergence after the cut with its refits; ``None``: unknown."""
        return self.refit if self.measure == "KL" else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for ``json.dumps``."""
        return fields_as_json(self)


def in_words(change: float) -> str:
    """Say what a KL divergence on held-out data means for a user of the model."""
    if change < NOTICEABLE:
        return f"hardly noticeable (under {NOTICEABLE})"
    if change <= TOO_MUCH:
        return "noticeable, some training helps"
    return f"do not expect good answers without training (over {TOO_MUCH})"


class Refitting:
    """Refits one step: solves and compares before the cut, edits in it, measures afterwards."""

    def __init__(self, calibration: MeasuredModel, groups: Sequence[ConfigGroup]):
        started = time.perf_counter()
        self._step = StepRefits(calibration, groups)
        self._outputs = Difference(len(calibration.held_out), calibration.ranks)
        self.result = Refits()
        using = self._worth_it()
        self._note_unfitted()
        self.edits: dict[str, list[RefitInPlace]] = {}
        if self.result.cut is not None and calibration.ranks.count == 1:
            using |= self._change_bases(groups, using)
        for consumer, refit in self._step.refits.items():
            if consumer in using:
                edit = RefitInPlace(consumer.dim, consumer.part, refit)
                self.edits.setdefault(consumer.parameter, []).append(edit)
        self.result.seconds = time.perf_counter() - started

    def _worth_it(self) -> set[Consumer]:
        """Return the consumers whose refits are no worse on held-out data than the plain cut.

        Without held-out data: those that were measured on enough tokens.
        """
        step, result, outputs = self._step, self.result, self._outputs
        if not step.refits:
            return set()
        holds_out = step.calibration.holds_out()
        errors, tied = layer_errors(step, outputs.note) if holds_out else ({}, set())
        using: set[Consumer] = set()
        unjudged = 0
        for consumer in step.refits:
            sums = errors.get(consumer, Errors())
            scale = sums.output or 1.0
            used = sums.refit <= sums.cut
            if not sums.output:  # no held-out data, or an expert that none of it reaches
                statistics = step.readings.of(consumer)
                used = statistics is not None and statistics.is_enough
                unjudged += not used
            result.layers.append(
                Refitted(
                    consumer.parameter, consumer.part, sums.cut / scale, sums.refit / scale, used
                )
            )
            using |= {consumer} if used else set()
        if unjudged:
            why = "no held-out token reaches them" if holds_out else "no data is held out"
            result.notes.append(
                f"{unjudged} weights are not refitted: {why}, so their refits cannot be compared, "
                "and they were measured on fewer than 8 tokens a channel. Pass more batches"
            )
        if not holds_out:
            return using
        result.cut = self._change(step, set(), "cut")
        result.refit = self._change(step, using, "refitted")
        result.measure = outputs.measure
        if tied & using:  # their embeddings change too, which no error of a layer shows
            change = self._change(step, using - tied, "refitted but for tied heads")
            if not result.refit <= change:
                names = listed(sorted({consumer.parameter for consumer in tied & using}))
                result.notes.append(
                    f"not refitted, because it embeds tokens too, and with other embeddings the "
                    f"whole model changes more ({result.measure} {result.refit:.3g} instead of "
                    f"{change:.3g}): {names}"
                )
                result.refit, using = change, using - tied
        if result.refit <= result.cut:
            self._mark(using)
            return using
        result.notes.append(
            "no weight is refitted: without these channels the model's output on held-out data is "
            "NaN. Prune less, or load the model in float32"
            if math.isnan(result.refit)
            else "no weight is refitted: on held-out data the whole model changes more with refits "
            f"({result.measure} {result.refit:.3g}) than without ({result.cut:.3g}). More "
            "calibration data may help"
        )
        result.refit = result.cut
        self._mark(set())
        return set()

    def _change_bases(self, groups: Sequence[ConfigGroup], using: set[Consumer]) -> set[Consumer]:
        """Cut heads in other bases, if the whole model changes less so; return what reads them."""
        step, result = self._step, self.result
        assert result.cut is not None  # the caller looked
        assert result.refit is not None
        bases = head_bases(step, groups)
        if not bases.whole or not self._are_exact(bases, result.cut):
            return set()
        refits = step.refits
        step.bases, step.refits = bases.cut, {**refits, **bases.refits}
        change = self._change(step, using | bases.refits.keys(), "heads in other bases")
        if not change < result.refit:
            step.bases, step.refits = {}, refits
            return set()
        result.notes.append(
            f"{len(bases.whole)} weights that compute queries, keys or values are cut in another "
            f"basis ({result.measure} {change:.3g} instead of {result.refit:.3g})"
        )
        result.refit, self.edits = change, bases.edits
        return set(bases.refits)

    def _are_exact(self, bases: HeadBases, cut: float) -> bool:
        """True if the model has the same outputs in whole bases, nothing cut."""
        self._outputs.begin()
        what = "held-out data, whole bases of heads"
        compare = self._outputs.compare
        run_held_out(self._step.calibration, compare, what, bases.run_whole)
        return self._outputs.mean() <= _ROUNDING * cut

    def _change(self, step: StepRefits, using: set[Consumer], how: str) -> float:
        self._outputs.begin()
        run_as_cut(step, using, self._outputs.compare, f"held-out data, {how}")
        return self._outputs.mean()

    def _mark(self, using: set[Consumer]) -> None:
        for consumer, layer in zip(self._step.refits, self.result.layers, strict=True):
            layer.used = consumer in using

    def _note_unfitted(self) -> None:
        step, unread = self._step, self._step.readings.unread
        lost = {c.parameter for c in step.kept if c not in step.refits}
        reasons = {
            "it also embeds tokens, and the data has none": lost & unread,
            "no calibration data reached it": lost - unread,
            "it was not measured": set(step.unseen) - unread,
        }
        self.result.notes += [
            f"not refitted, because {why}: {listed(sorted(names))}"
            for why, names in reasons.items()
            if names
        ]

    def expected_of(self, groups: Sequence[ConfigGroup]) -> float:
        """Estimate the change by cutting other groups, with refits; nothing is pruned."""
        other = StepRefits(self._step.calibration, groups)
        return self._change(other, set(other.refits), "another cut")

    def finished(self, synced: bool) -> Refits:
        """Return the effect of the refits."""
        if synced and self.result.cut is not None:  # synced: a config describes the model
            self._measure_after()
        return self.result

    def _measure_after(self) -> None:
        self._outputs.begin()
        try:
            run_held_out(self._step.calibration, self._outputs.compare, "held-out data, pruned")
        except CalibrationError as error:  # inputs as wide as a pruned width
            self.result.notes.append(f"not measured after pruning: {error}")
            return
        after = self._outputs.mean()
        self.result.after = None if math.isnan(after) else after
