"""Gather what a job runs its model on: windows of text, the unpruned model, a calibration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.batches import HELD_OUT, TOKENS, Text, own_text, second_text, windows_of
from ..calibration.calibrate import Calibration, calibrate
from ..errors import TPHFConfigError, UnsupportedModelError, in_one_line
from ..model.build import Refusal
from ..model.shortage import raise_shortage
from .choice import Choice
from .job import Job
from .objective import Objective, batch_of, objective_of, shuffled
from .progress import Progress
from .streaming import is_large

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOGETHER = 8  # windows, if a model may be larger than memory: its files are read for each batch


@dataclass(frozen=True)
class Material:
    """What a model is run on, and what is needed for that.

    Attributes:
        objective: what the model is asked.
        batches: windows ``(1, tokens)`` for gradients and recovery, without end.
        teacher: a copy of the unpruned model; ``None`` without recovery.
        calibration: what the model's weights read; ``None`` if nothing is made of it. Where layers
            are dropped it is not measured yet: they go before.
        held_out: windows ``(windows, tokens)`` of the calibration file that decide nothing.
        second: windows of the second text; none if the model is no causal language model.
        together: how many windows go through the model at a time.
    """

    objective: Objective
    batches: Iterator[Tensor]
    teacher: PreTrainedModel | None
    calibration: Calibration | None
    held_out: Tensor
    second: Tensor
    together: int = 1

    def perplexities(self, model: PreTrainedModel) -> tuple[float | None, float | None]:
        """Return the perplexity on the held-out windows, and that on the second text."""
        texts = self.held_out, self.second
        held_out, second = (self.objective.perplexity(model, t, self.together) for t in texts)
        return held_out, second


@dataclass
class Run:
    """A job under way.

    Attributes:
        job: the job.
        model: the model; it is pruned on the way.
        choice: what the job does with it.
        progress: where to show how far this is.
        material: what the model is run on; ``None``: nothing.
    """

    job: Job
    model: PreTrainedModel
    choice: Choice
    progress: Progress
    material: Material | None = None

    def perplexities(self) -> tuple[float | None, float | None]:
        """Return the perplexities of the model as it is now; see :class:`Material`."""
        return (None, None) if self.material is None else self.material.perplexities(self.model)


def gather(
    job: Job, choice: Choice, model: PreTrainedModel, progress: Progress
) -> Material | Refusal:
    """Return what a job runs its model on, or why the model does not run on text alone.

    Args:
        job: the job.
        choice: what it does; it has a text.
        model: the unpruned model.
        progress: where to show how far this is.

    Raises:
        CalibrationError: the text or the tokenizer does not fit the model, or what its layers give
            is not finite.
        UnsupportedModelError: the model has no logits, which the job needs.
    """
    try:
        text = _windows(job, choice, model, progress)
    except TPHFConfigError:
        raise
    except Exception as error:  # a class or a tokenizer for more than text may raise anything
        raise_shortage(error)
        return Refusal(
            f"{type(model).__name__} cannot be run on windows of text alone "
            f"({type(error).__name__}: {in_one_line(error)})"
        )
    objective = objective_of(model, choice.tokenizer, text.train[:1])
    if isinstance(objective, Refusal):
        return objective
    if objective.task == "nothing" and (job.recover or choice.importance == "taylor"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no logits, so a text cannot tell how well it does: leave "
            "--recover out, and use another --importance than taylor"
        )
    second = text.held_out[:0]
    if objective.task == "next token" and choice.tokenizer is not None:
        second = _all(windows_of(second_text(), choice.tokenizer, model))
    together = _TOGETHER if is_large(job.source) else 1
    return Material(
        objective,
        shuffled(text.train, job.seed),
        copy.deepcopy(model) if job.recover else None,
        _calibration(job, model, text.train, progress, together) if choice.calibrates else None,
        text.held_out,
        second,
        together,
    )


def _windows(job: Job, choice: Choice, model: PreTrainedModel, progress: Progress) -> Text:
    """Return the windows of the chosen text; only those of a file are held out of it."""
    if choice.origin == "own":
        progress.say("the model writes the text that it is calibrated on")
        text = own_text(model, (job.tokens or TOKENS) * HELD_OUT // (HELD_OUT - 1), job.seed)
    else:
        assert choice.tokenizer is not None  # only the model's own text needs none
        text = windows_of(choice.text, choice.tokenizer, model)
    if choice.origin == "file":
        return text
    return Text(_all(text), text.held_out[:0])


def _all(text: Text) -> Tensor:
    return torch.cat([text.train, text.held_out])


def _calibration(
    job: Job, model: PreTrainedModel, windows: Tensor, progress: Progress, together: int
) -> Calibration:
    """Measure a model on the first of the windows ``(windows, tokens)``; as many as the job says.

    Where layers are dropped nothing is measured, the calibration only holds the windows.
    """
    measured = max(1, (job.tokens or TOKENS) // windows.shape[1])
    chosen = windows[: measured * HELD_OUT // (HELD_OUT - 1)]
    batches = [batch_of(model, rows) for rows in torch.split(chosen, together)]
    calibration = calibrate(model, batches, measure=False, refits=job.compensate)
    if not job.drop_layers:
        measure(calibration, progress)
    return calibration


def measure(calibration: Calibration, progress: Progress) -> None:
    """Measure what a model's weights read, and say so."""
    windows = len(calibration.train) + len(calibration.held_out)
    progress.say(f"calibrating: {windows} windows")
    calibration.measure()
    progress.say(str(calibration))
