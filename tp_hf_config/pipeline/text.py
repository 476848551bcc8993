"""The text that a job runs its model on, and what the model is asked about it."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from ..calibration.batches import (
    TOKENS,
    Text,
    own_text,
    second_text,
    shipped_text,
    windows_of,
    with_held_out,
    writes_text,
)
from ..calibration.calibrate import Calibration, calibrate
from ..calibration.importance import Kind
from ..errors import (
    CalibrationWarning,
    PipelineError,
    TPHFConfigError,
    UnsupportedModelError,
    in_one_line,
)
from ..model.surroundings import raise_shortage
from .job import HELD_OUT, SECOND_TEXT, Importance, Job, show, track
from .source import is_large, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Origin = Literal["file", "shipped", "own"]
CALIBRATED = get_args(Kind)
_TOGETHER = 8  # windows per batch if a model may exceed memory: each batch reads its files
_LEARNING_RATE = 1e-4
_WARM_UP = 5  # updates
_NO_WINDOWS = torch.empty(0, 0, dtype=torch.long)
_WITHOUT_TEXT = "--importance magnitude or random with --no-refit"
_LEAVE_OUT = (
    f"Leave --calibration, --recover, --allocate and --drop-layers out, and use {_WITHOUT_TEXT}"
)


@dataclass(frozen=True)
class Choice:
    """How a job ranks channels, and which text it runs a model on."""

    importance: Importance
    origin: Origin | None = None  # None: the model is not run
    text: str = ""  # empty if the model writes it
    tokenizer: PreTrainedTokenizerBase | None = None  # None: not needed, or there is none
    refit: bool = False  # refit the weights that read pruned channels
    writes: bool = False  # the model is a causal language model

    @property
    def measures(self) -> bool:
        """True if what weights read is measured, for importances or refits."""
        return self.origin is not None and (self.refit or self.importance in CALIBRATED)

    def settings(self, job: Job) -> dict[str, Any]:
        text: str | None = "shipped text" if self.origin == "shipped" else self.origin
        if isinstance(job.calibration, Path):
            text = job.calibration.name
        dropped = "=".join(filter(None, (job.drop_from, str(job.drop_layers or ""))))
        widths = bool(job.widths) or not job.drop_layers
        own = {
            "drop_layers": dropped or None,
            "ranking": None if job.ranking == "local" else job.ranking,
            "allocate": job.allocate or None,
            "importance": self.importance if widths else None,
            "calibration": text,
            "tokens": job.tokens,
            "refit": self.refit if self.origin else None,
            "recover": job.recover or None,
            "device": job.device,
            "dtype": job.dtype,
            "seed": job.seed,
            "command": job.command or None,
        }
        return {name: value for name, value in {**job.widths, **own}.items() if value is not None}


def choose(
    job: Job, text: str | None, config: PreTrainedConfig, model_class: type[PreTrainedModel]
) -> Choice:
    """Return how a job ranks channels, and which text it uses.

    By default, a causal language model is calibrated on the shipped text; other models are ranked
    by magnitude unless there is a calibration file.
    """
    need = _need(job)
    asked = bool(need) or job.calibration is not None
    writes = class_writes_text(model_class, config)
    _check_text(job, need, model_class, writes)
    if not asked and not (writes and (job.refit or job.importance is None)):
        if writes and job.importance == "magnitude":
            warnings.warn(
                f"--importance magnitude ranks {model_class.__name__} by the size of its weights, "
                "which often removes what a language model needs most. Leave --importance out, or "
                "at least --no-refit",
                CalibrationWarning,
                stacklevel=3,
            )
        return Choice(job.importance or "magnitude")
    # gradients of a model larger than memory take too much of it
    importance = job.importance or ("activation" if is_large(job.source) else "auto")
    origin: Origin = "own" if job.calibration == "own" else "shipped" if text is None else "file"
    tokenizer = None
    try:
        tokenizer = tokenizer_of(job.source)
    except PipelineError as error:
        if origin != "own":
            raise PipelineError(f"{error}. To prune without a text, use {_WITHOUT_TEXT}") from error
    text = "" if origin == "own" else text or shipped_text()
    return Choice(importance, origin, text, tokenizer, job.refit, writes)


def _need(job: Job) -> str:
    if job.allocate:
        return "--allocate"
    if job.importance in CALIBRATED:
        return f"--importance {job.importance}"
    if job.drop_layers:
        return "--drop-layers"
    if job.recover:
        return "--recover"
    return "--tokens" if job.tokens else ""


def _check_text(job: Job, need: str, model_class: type[PreTrainedModel], writes: bool) -> None:
    name = model_class.__name__
    if job.allocate and job.importance not in (None, *CALIBRATED):
        raise PipelineError(
            "--allocate needs an importance that is measured by calibration, and --importance "
            f"{job.importance} is not: leave it out, or use one of {', '.join(CALIBRATED)}"
        )
    if not _takes_text(model_class) and (need or job.calibration is not None):
        raise UnsupportedModelError(
            f"{name} takes no text, so {need or '--calibration'} cannot be used. "
            f"{_LEAVE_OUT} (in Python: the hook, drop_layers and allocate take "
            "tp_hf_config.calibrate(model, batches))"
        )
    if job.calibration == "own" and not writes:
        raise PipelineError(
            f"--calibration own: {name} is not a causal language model and cannot write text. Use "
            "--calibration FILE (plain text: a few thousand words of the kind that the model reads)"
        )
    if need and job.calibration is None and not writes:
        raise PipelineError(
            f"{need} needs text to run {name} on (the shipped text is only for causal language "
            "models). Add --calibration FILE (plain text: a few thousand words of the kind that "
            "the model reads)"
            + (", or use --importance magnitude" if job.importance in CALIBRATED else "")
        )


def _takes_text(model_class: type[Any]) -> bool:
    return "input_ids" in inspect.signature(model_class.forward).parameters


def class_writes_text(model_class: type[Any], config: PreTrainedConfig) -> bool:
    """True for a causal language model that takes token ids; the class is not built."""
    known = SimpleNamespace(
        main_input_name=model_class.main_input_name,
        can_generate=model_class.can_generate,
        config=config,
    )
    return _takes_text(model_class) and writes_text(known)


def batch_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return the forward pass's arguments for windows of tokens ``(windows, tokens)``.

    An encoder gets the first half, its decoder the second.
    """
    arguments = inspect.signature(model.forward).parameters
    # an encoder on its own may have the config of an encoder-decoder
    if not model.config.is_encoder_decoder or "decoder_input_ids" not in arguments:
        return {"input_ids": ids}
    first, second = ids.tensor_split(2, dim=1)
    return {"input_ids": first, "decoder_input_ids": second}


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, together: int = 1) -> float | None:
    """Return a causal language model's; ``None`` if there are no windows, or it is not finite."""
    if not len(windows):
        return None
    losses = []
    for ids in torch.split(windows.to(model.device), together):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, -2)
        losses.append(cross_entropy(logits.float(), ids[:, 1:].flatten()) * len(ids))
    value = float((torch.stack(losses).sum() / len(windows)).exp())
    return value if math.isfinite(value) else None


def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return what a model predicts for windows, shape ``(predictions, classes)``."""
    logits: Tensor = model(**batch_of(model, ids.to(model.device))).logits
    return logits.flatten(0, -2).float().log_softmax(-1)


@dataclass(frozen=True)
class Material:
    """What a model is run on, and what that needs."""

    choice: Choice
    batches: Iterable[Tensor] = ()  # windows (1, tokens) for recovery, without end
    teacher: PreTrainedModel | None = None  # a copy of the unpruned model, for recovery
    # None: not needed. If layers are dropped, it is measured afterwards.
    calibration: Calibration | None = None
    # for perplexities, of causal language models alone
    held_out: Tensor = _NO_WINDOWS  # windows of the calibration file that decide nothing
    second: Tensor = _NO_WINDOWS  # windows of the second text
    together: int = 1  # windows per batch

    @property
    def refit(self) -> Calibration | None:
        return self.calibration if self.choice.refit else None

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        texts = {HELD_OUT: self.held_out, SECOND_TEXT: self.second}
        found = {name: perplexity(model, text, self.together) for name, text in texts.items()}
        return {name: value for name, value in found.items() if value is not None}


def gather(job: Job, choice: Choice, model: PreTrainedModel) -> Material:
    """Return what a job runs its model on; nothing, if it does not."""
    if choice.origin is None:
        return Material(choice)
    try:
        text = _windows(job, choice, model)
        window = text.train[:1].to(model.device)
        with torch.no_grad():
            logits = getattr(model(**batch_of(model, window)), "logits", None)
    except TPHFConfigError:
        raise
    except Exception as error:  # a class or a tokenizer for more than text may raise anything
        raise_shortage(error)
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be run on text alone ({type(error).__name__}: "
            f"{in_one_line(error)}). {_LEAVE_OUT}"
        ) from error
    if job.recover and logits is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no logits to recover: leave --recover out"
        )
    by_token = choice.writes and logits is not None and logits.shape[:-1] == window.shape
    held_out = text.held_out if by_token else _NO_WINDOWS
    second = _NO_WINDOWS
    if by_token and choice.tokenizer is not None:
        second = _all(windows_of(second_text(), choice.tokenizer, model))
    together = _TOGETHER if is_large(job.source) else 1
    calibrates = choice.measures or job.drop_layers
    return Material(
        choice,
        _shuffled(text.train, job.seed),
        copy.deepcopy(model) if job.recover else None,
        _calibration(job, model, text.train, together) if calibrates else None,
        held_out,
        second,
        together,
    )


def _windows(job: Job, choice: Choice, model: PreTrainedModel) -> Text:
    """Return the windows of the chosen text; only a file's text has held-out ones."""
    if choice.origin == "own":
        show("the model writes the text that it is calibrated on")
        text = own_text(model, with_held_out(job.tokens or TOKENS), job.seed, choice.tokenizer)
    else:
        assert choice.tokenizer is not None  # only the model's own text needs none
        text = windows_of(choice.text, choice.tokenizer, model)
    if choice.origin == "file":
        return text
    return Text(_all(text), text.held_out[:0])


def _all(text: Text) -> Tensor:
    return torch.cat([text.train, text.held_out])


def _shuffled(windows: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield windows ``(1, tokens)`` without end, in a new random order every round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for row in torch.randperm(len(windows), generator=generator):
            yield windows[row][None]


def _calibration(job: Job, model: PreTrainedModel, windows: Tensor, together: int) -> Calibration:
    chosen = windows[: with_held_out(max(1, (job.tokens or TOKENS) // windows.shape[1]))]
    batches = [batch_of(model, rows) for rows in torch.split(chosen, together)]
    calibration = calibrate(model, batches, measure=False, refits=job.refit)
    if not job.drop_layers:  # else it is measured once they are dropped
        measure(calibration)
    return calibration


def measure(calibration: Calibration) -> None:
    windows = len(calibration.train) + len(calibration.held_out)
    show(f"calibrating: {windows} windows")
    calibration.measure()
    show(str(calibration))


def recover(model: PreTrainedModel, material: Material, updates: int, what: str) -> None:
    """Distil the unpruned model's outputs into the pruned one, in place; one window per update."""
    teacher = material.teacher
    if teacher is None or not updates:
        return
    # Pruning replaced the parameters, so every pruning step needs a new optimizer.
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / _WARM_UP, 1 - i / updates)
    )
    for batch in track(islice(material.batches, updates), updates, what):
        with torch.no_grad():
            # not the text: training on the text would teach the text
            target = _log_probabilities(teacher, batch)
        guess = _log_probabilities(model, batch)
        loss = kl_div(guess, target, log_target=True, reduction="batchmean")
        if not math.isfinite(loss.item()):
            raise _diverged(what, f"the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():  # after the last update there was no loss to check
            raise _diverged(what, f"{name} is not finite")
    model.zero_grad()


def _diverged(what: str, how: str) -> PipelineError:
    return PipelineError(
        f"{what}: {how}. Load the model in float32 (--dtype float32), or prune less at a time "
        "(--steps)"
    )
