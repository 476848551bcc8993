"""Plain text for a model: windows of tokens, and what the model can be asked about them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import PipelineError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WINDOW = 256
_LEAST = 8
_HELD_OUT = 8
_MOST_HELD_OUT = 8

Task = Literal["next token", "masked token", "second half", "own answer"]


@dataclass(frozen=True)
class Text:
    """Windows of token ids, ``(windows, tokens)``: to learn from, and to measure on alone."""

    train: Tensor
    held_out: Tensor


def windows_of(text: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Text:
    """Tokenise a text; every eighth window is held out where there are that many.

    Raises:
        PipelineError: too few tokens, or tokens that the model does not have.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < _LEAST:
        raise PipelineError(
            f"the calibration text has {len(ids)} tokens, at least {_LEAST} are needed (some "
            "thousands make a good choice of what to prune)"
        )
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if int(ids.max()) >= rows:
        raise PipelineError(
            f"the tokenizer makes token {int(ids.max())}, but the model has {rows}: they do not "
            "belong together"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    size = min(_WINDOW, len(ids), (positions or _WINDOW + 2) - 2)  # RoBERTa's first two are none
    windows = ids[: len(ids) // size * size].view(-1, size)
    kept = torch.arange(len(windows)) % _HELD_OUT != _HELD_OUT - 1
    return Text(windows[kept], windows[~kept][:_MOST_HELD_OUT])


def shuffled(windows: Tensor, seed: int) -> Iterator[Tensor]:
    """One window ``(1, tokens)`` after the other, without end, in a new order every round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for row in torch.randperm(len(windows), generator=generator):
            yield windows[row][None]


@dataclass(frozen=True)
class Objective:
    """What a model is asked about a window: which token comes next, which is masked, ...

    Attributes:
        task: what it is asked.
        mask_token: the token in place of those that are masked.
    """

    task: Task
    mask_token: int | None = None

    def logits(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """The model's answers, ``(answers, classes)``."""
        ids = ids.to(model.device)
        given: dict[str, Any] = {"input_ids": ids}
        if self.task == "masked token":
            given = {"input_ids": ids.masked_fill(_masked(ids), self.mask_token or 0)}
        elif self.task == "second half":
            first, second = ids.tensor_split(2, dim=1)
            given = {"input_ids": first, "decoder_input_ids": second}
        logits: Tensor = model(**given).logits
        if self.task == "masked token":
            return logits[_masked(ids)]
        if self.task != "own answer":
            logits = logits[:, :-1]
        return logits.flatten(0, -2)

    def loss(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Cross-entropy of the answers with the text."""
        logits, ids = self.logits(model, ids).float(), ids.to(model.device)
        if self.task == "masked token":
            return cross_entropy(logits, ids[_masked(ids)])
        if self.task == "own answer":
            return cross_entropy(logits, logits.detach().argmax(-1))
        text = ids.tensor_split(2, dim=1)[1] if self.task == "second half" else ids
        return cross_entropy(logits, text[:, 1:].flatten())

    @torch.no_grad()
    def perplexity(self, model: PreTrainedModel, windows: Tensor) -> float | None:
        """Exp of the mean loss; ``None``: nothing held out, no right answer, or no end to it."""
        if not len(windows) or self.task == "own answer":
            return None
        losses = [self.loss(model, row[None]) for row in windows]
        found = float(torch.stack(losses).mean().exp())
        return found if math.isfinite(found) else None


def _masked(ids: Tensor) -> Tensor:
    """Every seventh token: the same ones each time, so that two models are asked the same."""
    places = torch.arange(ids.shape[1], device=ids.device) % 7 == 3
    return places.expand_as(ids)


def takes_text(model_class: type[Any]) -> bool:
    """Whether a class takes token ids."""
    return "input_ids" in inspect.signature(model_class.forward).parameters


@torch.no_grad()
def objective_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: Tensor
) -> Objective:
    """What a model can be asked about a text, seen in what it answers.

    Raises:
        UnsupportedModelError: it answers nothing that tells how well it does.
    """
    if model.config.is_encoder_decoder:
        return Objective("second half")
    ids = window.to(model.device)
    try:
        logits = getattr(model(input_ids=ids), "logits", None)
    except Exception as error:  # whatever a class that needs an image too raises
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on text alone ({type(error).__name__}: {error}): "
            "leave --recover out, and use --importance magnitude or random"
        ) from error
    if logits is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no logits, so a text cannot tell how well it does: leave "
            "--recover out, and use --importance magnitude or random"
        )
    if logits.shape[:-1] != ids.shape:
        return Objective("own answer")  # a class for the whole text, which no text file says
    if model.can_generate():
        return Objective("next token")
    if tokenizer.mask_token_id is not None and logits.shape[-1] > int(tokenizer.mask_token_id):
        return Objective("masked token", int(tokenizer.mask_token_id))
    return Objective("own answer")
