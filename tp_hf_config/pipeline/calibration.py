"""Split plain text into windows of tokens, and ask a model about them."""

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

_WINDOW = 256  # tokens
_LEAST = 8  # tokens
_HELD_OUT = 8  # one window in so many is held out
_MOST_HELD_OUT = 8  # windows
Task = Literal["next token", "masked token", "second half", "own answer"]


@dataclass(frozen=True)
class Text:
    """Windows of token ids, each ``(windows, tokens)``.

    Attributes:
        train: windows for gradients and recovery.
        held_out: windows for measuring only.
    """

    train: Tensor
    held_out: Tensor


def windows_of(text: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Text:
    """Tokenise a text and split it into windows.

    Every eighth window is held out, eight at most; with fewer than eight windows, none is.

    Args:
        text: the text.
        tokenizer: the model's tokenizer.
        model: the model; windows are no longer than its positions, and 256 tokens at most.

    Raises:
        PipelineError: the text has too few tokens, or tokens that the model does not have.
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
    # RoBERTa's first two positions stand for no token.
    size = min(_WINDOW, len(ids), (positions or _WINDOW + 2) - 2)
    windows = ids[: len(ids) // size * size].view(-1, size)
    in_train = torch.arange(len(windows)) % _HELD_OUT != _HELD_OUT - 1
    return Text(windows[in_train], windows[~in_train][:_MOST_HELD_OUT])


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
            window from the first; ``own answer``: the model's own answers count as right.
        mask_token: the id that replaces masked tokens; ``None`` for other tasks.
    """

    task: Task
    mask_token: int | None = None

    def logits(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Return the model's logits for one window ``(1, tokens)``, as ``(answers, classes)``."""
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
        """Return the mean cross-entropy of the answers for one window ``(1, tokens)``."""
        logits, ids = self.logits(model, ids).float(), ids.to(model.device)
        if self.task == "masked token":
            return cross_entropy(logits, ids[_masked(ids)])
        if self.task == "own answer":
            return cross_entropy(logits, logits.detach().argmax(-1))
        text = ids.tensor_split(2, dim=1)[1] if self.task == "second half" else ids
        return cross_entropy(logits, text[:, 1:].flatten())

    @torch.no_grad()
    def perplexity(self, model: PreTrainedModel, windows: Tensor) -> float | None:
        """Return exp of the mean loss over the windows ``(windows, tokens)``.

        Return ``None`` if there are no windows, if no answer is right or wrong (``own answer``),
        or if the result is not finite.
        """
        if not len(windows) or self.task == "own answer":
            return None
        losses = [self.loss(model, row[None]) for row in windows]
        value = float(torch.stack(losses).mean().exp())
        return value if math.isfinite(value) else None


def _masked(ids: Tensor) -> Tensor:
    """Return a mask of the shape of ``ids``, ``(1, tokens)``, that is true at every seventh token.

    It is the same each time, so that two models are asked the same.
    """
    positions = torch.arange(ids.shape[1], device=ids.device) % 7 == 3
    return positions.expand_as(ids)


def takes_text(model_class: type[Any]) -> bool:
    """True if the forward pass of a class takes token ids."""
    return "input_ids" in inspect.signature(model_class.forward).parameters


@torch.no_grad()
def objective_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: Tensor
) -> Objective:
    """Return what a model can be asked about a text, judged by its outputs for one window.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        window: token ids, ``(1, tokens)``.

    Raises:
        UnsupportedModelError: the model does not run on text alone, or returns no logits.
    """
    if model.config.is_encoder_decoder:
        return Objective("second half")
    ids = window.to(model.device)
    try:
        logits = getattr(model(input_ids=ids), "logits", None)
    except Exception as error:  # a class that needs an image too may raise anything
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
        return Objective("own answer")  # it classifies the whole text; a text file has no label
    if model.can_generate():
        return Objective("next token")
    if tokenizer.mask_token_id is not None and logits.shape[-1] > int(tokenizer.mask_token_id):
        return Objective("masked token", int(tokenizer.mask_token_id))
    return Objective("own answer")
