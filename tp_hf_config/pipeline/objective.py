"""What a model is asked about windows of a text, and how well it answers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import in_one_line
from ..model.build import Refusal
from ..model.shortage import raise_shortage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["next token", "masked token", "second half", "own answer", "nothing"]


def shuffled(windows: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield windows of shape ``(1, tokens)`` without end, in a new random order every round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for row in torch.randperm(len(windows), generator=generator):
            yield windows[row][None]


@dataclass(frozen=True)
class Objective:
    """What a model is asked about a window.

    Attributes:
        task: ``next token``: predict each token from those before it; ``masked token``: predict
            masked tokens; ``second half``: an encoder-decoder predicts the second half of the
            window from the first; ``own answer``: the model's own answers count as right;
            ``nothing``: it has no logits, it can only be run.
        mask_token: the id that replaces masked tokens; ``None`` for other tasks.
    """

    task: Task
    mask_token: int | None = None

    def logits(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Return the model's logits for windows ``(windows, tokens)``: ``(answers, classes)``."""
        ids = ids.to(model.device)
        asked = ids
        if self.task == "masked token":
            asked = ids.masked_fill(_masked(ids), self.mask_token or 0)
        logits: Tensor = model(**batch_of(model, asked)).logits
        if self.task == "masked token":
            return logits[_masked(ids)]
        if self.task != "own answer":
            logits = logits[:, :-1]
        return logits.flatten(0, -2)

    def loss(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Return the mean cross-entropy of the answers for windows ``(windows, tokens)``."""
        logits, ids = self.logits(model, ids).float(), ids.to(model.device)
        if self.task == "masked token":
            return cross_entropy(logits, ids[_masked(ids)])
        if self.task == "own answer":
            return cross_entropy(logits, logits.detach().argmax(-1))
        text = ids.tensor_split(2, dim=1)[1] if self.task == "second half" else ids
        return cross_entropy(logits, text[:, 1:].flatten())

    @torch.no_grad()
    def perplexity(
        self, model: PreTrainedModel, windows: Tensor, together: int = 1
    ) -> float | None:
        """Return exp of the mean loss over the windows ``(windows, tokens)``.

        ``together``: so many windows go through the model at a time.

        Return ``None`` if there are no windows, if no answer is right or wrong (``own answer``,
        ``nothing``), or if the result is not finite.
        """
        if not len(windows) or self.task in ("own answer", "nothing"):
            return None
        losses = [self.loss(model, rows) * len(rows) for rows in torch.split(windows, together)]
        value = float((torch.stack(losses).sum() / len(windows)).exp())
        return value if math.isfinite(value) else None


def _masked(ids: Tensor) -> Tensor:
    """Return a mask of the shape of ``ids``, ``(1, tokens)``, that is true at every seventh token.

    It is the same each time, so that two models are asked the same.
    """
    positions = torch.arange(ids.shape[1], device=ids.device) % 7 == 3
    return positions.expand_as(ids)


def batch_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return the forward pass's arguments for windows ``(windows, tokens)``.

    An encoder-decoder's encoder gets the first half, its decoder the second.
    """
    arguments = inspect.signature(model.forward).parameters
    # an encoder that was taken out of an encoder-decoder has the config of one
    if not model.config.is_encoder_decoder or "decoder_input_ids" not in arguments:
        return {"input_ids": ids}
    first, second = ids.tensor_split(2, dim=1)
    return {"input_ids": first, "decoder_input_ids": second}


@torch.no_grad()
def objective_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, window: Tensor
) -> Objective | Refusal:
    """Return what a model can be asked about a text, judged by its outputs for one window.

    Args:
        model: the model.
        tokenizer: its tokenizer; ``None`` if it has none.
        window: token ids, ``(1, tokens)``.

    Returns:
        The objective, or why the model does not run on text alone.
    """
    given = batch_of(model, window.to(model.device))
    try:
        logits = getattr(model(**given), "logits", None)
    except Exception as error:  # a class that needs an image too may raise anything
        raise_shortage(error)
        return Refusal(
            f"{type(model).__name__} does not run on text alone ({type(error).__name__}: "
            f"{in_one_line(error)})"
        )
    if logits is None:
        return Objective("nothing")
    *_, answered = given.values()
    if logits.shape[:-1] != answered.shape:
        return Objective("own answer")  # it classifies the whole text; a text file has no label
    if "decoder_input_ids" in given:
        return Objective("second half")
    if model.can_generate():
        return Objective("next token")
    mask_token = None if tokenizer is None else tokenizer.mask_token_id
    if mask_token is not None and logits.shape[-1] > int(mask_token):
        return Objective("masked token", int(mask_token))
    return Objective("own answer")
