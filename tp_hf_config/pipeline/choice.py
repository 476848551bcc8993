"""Choose how a job ranks channels, and which text it runs the model on, by the model's class."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..calibration.batches import shipped_text, writes_text
from ..calibration.importance import Kind
from ..errors import CalibrationWarning, PipelineError, UnsupportedModelError
from .job import Importance, Job
from .source import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Origin = Literal["file", "shipped", "own"]
CALIBRATED = get_args(Kind)
TEXTUAL = (*CALIBRATED, "taylor")


@dataclass(frozen=True)
class Choice:
    """What a job does with a model of one class.

    Attributes:
        importance: how channels are ranked.
        origin: the text to run the model on: ``file``: of the calibration file; ``shipped``: comes
            with the package; ``own``: the model writes it; ``None``: the model is not run.
        text: the text; empty if the model writes it.
        tokenizer: the model's tokenizer; ``None`` if it is not needed, or there is none.
        compensate: the weights that read pruned channels are refitted.
        drops: layers are dropped, by their influence on the text.
        asked: the user asked for something that takes a text; otherwise the job goes without where
            the model does not run on it.
        notes: what the user should know.
    """

    importance: Importance
    origin: Origin | None = None
    text: str = ""
    tokenizer: PreTrainedTokenizerBase | None = None
    compensate: bool = False
    drops: bool = False
    asked: bool = False
    notes: tuple[str, ...] = ()

    @property
    def calibrates(self) -> bool:
        """True if the model is run on the text for an importance, refits or influences."""
        return self.measures or (self.origin is not None and self.drops)

    @property
    def measures(self) -> bool:
        """True if what weights read of the text is measured, for an importance or refits."""
        return self.origin is not None and (self.compensate or self.importance in CALIBRATED)

    def without_text(self, reason: str) -> Choice:
        """Return what the job does where no text can be had; a note says why."""
        importance = "magnitude" if self.importance in CALIBRATED else self.importance
        note = f"channels are ranked by {importance}, and no weight is refitted: {reason}"
        return Choice(importance, notes=(*self.notes, note))

    def settings(self, job: Job) -> dict[str, Any]:
        """Return what was done, by name; leave out what is not set."""
        text: str | None = "shipped text" if self.origin == "shipped" else self.origin
        if isinstance(job.calibration, Path):
            text = job.calibration.name
        dropped = "=".join(filter(None, (job.drop_from, str(job.drop_layers or ""))))
        widths = bool(job.widths) or not job.drop_layers
        ranking = None if job.ranking == "local" else job.ranking
        own = {
            "drop_layers": dropped or None,
            "ranking": ranking,
            "allocate": job.allocate or None,
            "importance": self.importance if widths else None,
            "calibration": text,
            "tokens": job.tokens,
            "compensate": self.compensate if self.origin and widths else None,
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
    """Return how a job ranks channels, and which text it takes.

    A causal language model is calibrated on the shipped text where the user says nothing else;
    other models are ranked by magnitude, unless there is a calibration file.

    ``text``: what is in its calibration file; ``None`` if it has none.

    Raises:
        PipelineError: the user asked for something that takes a text, and there is none for this
            class, or no tokenizer.
        UnsupportedModelError: the same, and the class takes no text.
    """
    need = _need(job)
    if job.allocate and job.importance not in (None, *CALIBRATED):
        raise PipelineError(
            f"--allocate measures what layers carry on a text, --importance {job.importance} does "
            f"not: leave it out, or take one of {', '.join(CALIBRATED)}"
        )
    asked = bool(need) or job.calibration is not None
    writes = class_writes_text(model_class, config)
    if job.drop_layers and not takes_text(model_class):
        raise UnsupportedModelError(
            f"{model_class.__name__} takes no text that tells which of its layers change least. "
            "In Python: tp_hf_config.drop_layers(model, count=2, calibration="
            "tp_hf_config.calibrate(model, batches))"
        )
    if job.allocate and not takes_text(model_class):
        raise UnsupportedModelError(
            f"{model_class.__name__} takes no text on which --allocate could compare its layers. "
            "In Python: tp_hf_config.allocate(model, tp_hf_config.calibrate(model, batches), "
            "target_params=0.8)"
        )
    if asked and not takes_text(model_class):
        raise UnsupportedModelError(
            f"{model_class.__name__} takes no text, so {need or '--calibration'} is of no use to "
            "it. Leave --calibration and --recover out, and use --importance magnitude or random "
            "(in Python: tp_hf_config.calibrate(model, batches))"
        )
    if job.calibration == "own" and not writes:
        raise PipelineError(
            f"--calibration own: {model_class.__name__} is no causal language model, it writes no "
            "text. Say --calibration FILE (plain text, some thousand words of what the model is "
            "for)"
        )
    if need and job.calibration is None and not writes:
        raise PipelineError(
            f"{need} needs text to run {model_class.__name__} on (the shipped text is for causal "
            "language models alone). Add --calibration FILE (plain text, some thousand words of "
            "what the model is for)"
            + (", or use --importance magnitude" if job.importance in TEXTUAL else "")
        )
    if not asked and not (writes and (job.compensate or job.importance is None)):
        if writes and job.importance == "magnitude":
            warnings.warn(
                f"--importance magnitude ranks {model_class.__name__} by the size of its weights, "
                "which often takes what a language model needs most. Leave --importance out, or "
                "at least --no-compensate",
                CalibrationWarning,
                stacklevel=3,
            )
        return Choice(job.importance or "magnitude")
    choice = Choice(
        job.importance or "wanda",
        compensate=job.compensate,
        drops=bool(job.drop_layers),
        asked=asked,
    )
    try:
        tokenizer = tokenizer_of(job.source)
    except PipelineError as error:
        if job.calibration == "own":
            return replace(choice, origin="own")
        if asked:
            raise
        return choice.without_text(str(error))
    if job.calibration == "own":
        return replace(choice, origin="own", tokenizer=tokenizer)
    origin: Origin = "shipped" if text is None else "file"
    return replace(choice, origin=origin, text=text or shipped_text(), tokenizer=tokenizer)


def _need(job: Job) -> str:
    """Return the argument that takes a text; empty if there is none."""
    if job.allocate:
        return "--allocate"
    if job.importance in TEXTUAL:
        return f"--importance {job.importance}"
    if job.drop_layers:
        return "--drop-layers"
    if job.recover:
        return "--recover"
    return "--tokens" if job.tokens else ""


def takes_text(model_class: type[Any]) -> bool:
    """True if the forward pass of a class takes token ids."""
    return "input_ids" in inspect.signature(model_class.forward).parameters


def class_writes_text(model_class: type[Any], config: PreTrainedConfig) -> bool:
    """True for a causal language model that takes token ids; it need not be built for that."""
    known = SimpleNamespace(
        main_input_name=model_class.main_input_name,
        can_generate=model_class.can_generate,
        config=config,
    )
    return takes_text(model_class) and writes_text(known)
