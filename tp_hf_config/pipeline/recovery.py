"""Compute gradients for Taylor importance, and recover with a short distillation after a step."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import kl_div

from ..errors import PipelineError
from .material import Material
from .progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GRADIENTS = 8  # windows
_LEARNING_RATE = 1e-4
_WARM_UP = 5  # updates


def accumulate_gradients(
    model: PreTrainedModel, material: Material, progress: Progress, what: str
) -> None:
    """Sum the gradients of eight windows in the parameters' ``grad``; old ones are dropped.

    Taylor importance is weight times gradient. ``what``: what to call it in the progress.
    """
    model.zero_grad()
    for batch in progress.track(islice(material.batches, _GRADIENTS), _GRADIENTS, what):
        material.objective.loss(model, batch).backward()  # type: ignore[no-untyped-call]


def recover(
    model: PreTrainedModel, material: Material, updates: int, progress: Progress, what: str
) -> None:
    """Distil the answers of the unpruned model into the pruned one, in place; a window an update.

    The target is the answers and not the text: training on the text would teach the text.
    ``what``: what to call it in the progress.

    Raises:
        PipelineError: the loss, or a weight afterwards, is not finite.
    """
    objective, teacher = material.objective, material.teacher
    assert teacher is not None  # only then does a job recover
    # Pruning replaced the parameters, so every pruning step needs a new optimizer.
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / _WARM_UP, 1 - i / updates)
    )
    for batch in progress.track(islice(material.batches, updates), updates, what):
        with torch.no_grad():
            target = objective.logits(teacher, batch).float().log_softmax(-1)
        guess = objective.logits(model, batch).float().log_softmax(-1)
        loss = kl_div(guess, target, log_target=True, reduction="batchmean")
        if not math.isfinite(loss.item()):
            raise _diverged(what, f"the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():  # by the last update, which no loss has seen
            raise _diverged(what, f"{name} is not finite")
    model.zero_grad()


def _diverged(what: str, how: str) -> PipelineError:
    return PipelineError(
        f"{what}: {how}. Load the model in float32 (--dtype float32), or prune less at a time "
        "(--steps)"
    )
