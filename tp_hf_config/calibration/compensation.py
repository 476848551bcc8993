"""Refits for one step of a pruner: tried on held-out data, handed to the cut, and reported."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import CalibrationError, listed
from ..graph.config_group import ConfigGroup
from ..graph.edits import RefitInPlace
from .difference import Difference
from .linear_ops import Consumer
from .measured import MeasuredModel
from .refits_of_step import StepRefits
from .trial import Errors, layer_errors, run_as_cut, run_held_out

NOTICEABLE, TOO_MUCH = 0.1, 0.5
"""KL divergences on held-out data, in nats: under the first, over the second (`in_words`)."""


@dataclass
class Refitted:
    """What a refit comes to for one weight, on held-out data.

    Attributes:
        weight: the parameter's name.
        part: the number of the expert, if the parameter stacks several.
        cut: the squared error of the layer's output without a refit, relative to the output.
        refit: the same with it.
        used: True if the weight is refitted: the refit is no worse than the plain cut.
    """

    weight: str
    part: int | None = None
    cut: float = 0.0
    refit: float = 0.0
    used: bool = True


@dataclass
class Compensation:
    """What the refits of one step come to; ``str`` gives a line or two.

    Attributes:
        layers: what each refit comes to.
        measure: what the changes of the whole model's output on held-out data are: ``"KL"`` of the
            logits, or a relative ``"squared error"``.
        cut: the change by the plain cut; ``None`` if nothing is held out.
        refit: the change with refits. Both are foretold before the cut, by running the model as if
            it were cut; products of queries and keys of fewer dimensions are not in them.
        after: the change that was measured after the cut; ``None`` also if the output is narrower,
            or if the pruned model does not take the held-out data (a note says so).
        seconds: how long solving and trying took.
        notes: what the user should know.
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
            text += f"; {self.measure} on held-out data {self.cut:.3g} cut, {self.refit:.3g}"
            text += " refitted"
        if self.after is not None:
            text += f", {self.after:.3g} measured after the cut"
        expected = self.expected
        meaning = [] if expected is None else [f"KL {expected:.3g}: {in_words(expected)}"]
        return "\n    ".join([text, *meaning, *self.notes])

    @property
    def expected(self) -> float | None:
        """The KL divergence by the cut with its refits; ``None``: it is not known."""
        return self.refit if self.measure == "KL" else None

    def to_dict(self) -> dict[str, Any]:
        """Return it for ``json.dumps``."""
        return asdict(self)


def in_words(change: float) -> str:
    """Return what a KL divergence on held-out data means for whoever uses the model."""
    if change < NOTICEABLE:
        return f"hardly noticeable (under {NOTICEABLE})"
    if change <= TOO_MUCH:
        return "noticeable, some training helps"
    return f"do not expect good answers without training (over {TOO_MUCH})"


class Compensating:
    """Refits one step of a pruner: solve and try now, apply in the cut, measure afterwards.

    Args:
        calibration: the measured model.
        groups: the groups that the step prunes; nothing of them is cut yet.

    Attributes:
        result: what the refits come to.
        edits: the refits of each weight, by the first of its names; for the cut.
    """

    def __init__(self, calibration: MeasuredModel, groups: Sequence[ConfigGroup]):
        started = time.perf_counter()
        self._step = StepRefits(calibration, groups)
        self._outputs = Difference(calibration.ranks)
        self.result = Compensation()
        using = self._worth_it() if calibration.holds_out() else self._told_enough()
        self._note_unfitted()
        self.edits: dict[str, list[RefitInPlace]] = {}
        for consumer, refit in self._step.refits.items():
            if consumer in using:
                edit = RefitInPlace(consumer.dim, consumer.part, refit)
                self.edits.setdefault(consumer.parameter, []).append(edit)
        self.result.seconds = time.perf_counter() - started

    def _worth_it(self) -> set[Consumer]:
        """Return the consumers whose refits are no worse than the plain cut on held-out data."""
        step, result, outputs = self._step, self.result, self._outputs
        if not step.refits:
            return set()
        errors = layer_errors(step, outputs.note)
        using: set[Consumer] = set()
        unjudged = 0
        for consumer in step.refits:
            sums = errors.get(consumer, Errors())
            scale = sums.output or 1.0
            used = sums.refit <= sums.cut
            if not sums.output:  # an expert that no held-out token reaches
                used = self._is_enough(consumer)
                unjudged += not used
            result.layers.append(
                Refitted(
                    consumer.parameter, consumer.part, sums.cut / scale, sums.refit / scale, used
                )
            )
            using |= {consumer} if used else set()
        self._note_unjudged(unjudged, "no held-out token reaches them to")
        changes: list[float] = []
        for some, how in ((set[Consumer](), "cut"), (using, "refitted")):
            outputs.begin()
            run_as_cut(step, some, outputs.compare, f"held-out data, {how}")
            changes.append(outputs.mean())
        result.measure, (result.cut, result.refit) = outputs.measure, changes
        if result.refit <= result.cut:
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
        for layer in result.layers:
            layer.used = False
        return set()

    def _told_enough(self) -> set[Consumer]:
        """Return the consumers that got enough tokens for a refit that nothing can judge."""
        step, result = self._step, self.result
        using: set[Consumer] = set()
        for consumer in step.refits:
            used = self._is_enough(consumer)
            using |= {consumer} if used else set()
            result.layers.append(Refitted(consumer.parameter, consumer.part, used=used))
        self._note_unjudged(len(step.refits) - len(using), "nothing is held out to")
        return using

    def _is_enough(self, consumer: Consumer) -> bool:
        """True if a consumer got enough tokens for a refit that nothing can judge."""
        statistics = self._step.readings.of(consumer)
        return statistics is not None and statistics.is_enough

    def _note_unjudged(self, count: int, why: str) -> None:
        if count:
            self.result.notes.append(
                f"{count} weights are not refitted: {why} judge their refits, and they got fewer "
                "than 8 tokens a channel. Pass more batches"
            )

    def _note_unfitted(self) -> None:
        """Note which weights lose channels and are cut as ever."""
        step = self._step
        lost = {c.parameter for c in step.kept if c not in step.refits}
        tables = sorted(lost & step.readings.tables)
        others = sorted(lost - step.readings.tables)
        if tables:
            self.result.notes.append(
                f"not refitted, for it is the table of embeddings too: {listed(tables)}"
            )
        if others:
            self.result.notes.append(f"not refitted, for it read nothing: {listed(others)}")
        unseen = [name for name in step.unseen if name not in step.readings.tables]
        if unseen:
            self.result.notes.append(f"not refitted, for it was not measured: {listed(unseen)}")

    def expected_of(self, groups: Sequence[ConfigGroup]) -> float:
        """Return the change of the model by other groups with their refits; they are not pruned."""
        other = StepRefits(self._step.calibration, groups)
        self._outputs.begin()
        run_as_cut(other, set(other.refits), self._outputs.compare, "held-out data, another cut")
        return self._outputs.mean()

    def finished(self, synced: bool) -> Compensation:
        """Return what the refits came to, once the step is over.

        ``synced``: True if a config describes what is left. It is run on held-out data then.
        """
        if synced and self.result.cut is not None:
            self._measure_after()
        return self.result

    def _measure_after(self) -> None:
        """Measure how much the pruned model's outputs on held-out data have changed."""
        self._outputs.begin()
        try:
            run_held_out(self._step.calibration, self._outputs.compare, "held-out data, pruned")
        except CalibrationError as error:  # inputs as wide as what was pruned
            self.result.notes.append(f"not measured after the cut: {error}")
            return
        after = self._outputs.mean()
        self.result.after = None if math.isnan(after) else after
