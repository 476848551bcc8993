"""Compute gradients for Taylor importance, and recover with a short distillation after a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ..errors import PipelineError
from .objective import Objective
from .progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GRADIENTS = 8  # windows
_LEARNING_RATE = 1e-4
_WARM_UP = 5  # updates


def accumulate_gradients(
    model: PreTrainedModel,
    objective: Objective,
    batches: Iterator[Tensor],
    progress: Progress,
    what: str,
) -> None:
    """Sum the gradients of a few windows in the parameters' ``grad``.

    Taylor importance is weight times gradient.

    Args:
        model: the model; its old gradients are dropped.
        objective: gives the loss of a window.
        batches: windows ``(1, tokens)``; eight are taken.
        progress: where to show how far this is.
        what: what to call it there.
    """
    model.zero_grad()
    for batch in progress.track(islice(batches, _GRADIENTS), _GRADIENTS, what):
        objective.loss(model, batch).backward()  # type: ignore[no-untyped-call]


def recover(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    objective: Objective,
    batches: Iterator[Tensor],
    updates: int,
    progress: Progress,
    what: str,
) -> None:
    """Distil the answers of the unpruned model into the pruned one.

    The target is the answers and not the text: training on the text would teach the text.

    Args:
        model: the pruned model; it is trained in place.
        teacher: the unpruned model.
        objective: gives the answers for a window.
        batches: windows ``(1, tokens)``; one is taken for each update.
        updates: the number of updates.
        progress: where to show how far this is.
        what: what to call it there.

    Raises:
        PipelineError: the loss is not finite.
    """
    # Pruning replaced the parameters, so every pruning step needs a new optimizer.
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / _WARM_UP, 1 - i / updates)
    )
    for batch in progress.track(islice(batches, updates), updates, what):
        with torch.no_grad():
            target = objective.logits(teacher, batch).float().log_softmax(-1)
        guess = objective.logits(model, batch).float().log_softmax(-1)
        loss = kl_div(guess, target, log_target=True, reduction="batchmean")
        if not math.isfinite(loss.item()):
            raise PipelineError(
                f"{what}: the loss is {loss.item()}. Load the model in float32 (--dtype float32), "
                "or prune less at a time (--steps)"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.zero_grad()
