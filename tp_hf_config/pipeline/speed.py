"""Measure how fast a model answers, on the device where it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import Count, check_arguments
from ..calibration.batches import positions_of
from ..errors import UnsupportedModelError, in_one_line
from ..model.surroundings import evaluating, quiet_transformers, raise_shortage
from ..reports import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT, _NEW_TOKENS, _RUNS = 128, 32, 5  # defaults
_STATUS, _PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


@dataclass(frozen=True)
class Spread:
    """Several measurements of one number."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the median and both ends of some values."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, repr=False)
class Speed(Report):
    """How fast a model runs; ``str`` gives a few lines of text."""

    model: str
    device: str
    dtype: str
    threads: int | None  # of torch on a CPU
    inputs: str
    runs: int  # measured; one more came before as a warm-up
    forward_seconds: Spread | None  # of a forward pass; None if the model generates
    first_token_seconds: Spread | None  # from the prompt to the first new token
    tokens_per_second: Spread | None  # new ones after the first; None: not given tokens
    memory: int | None  # bytes: the weights, and what a run takes beside them; None: unknown

    def title(self) -> str:
        """Return the model, the device and what it was given."""
        return (
            f"{self.model} in {self.dtype} on {self._where()}: {self.inputs}, median of "
            f"{self.runs} runs (lowest to highest)"
        )

    def lines(self) -> Iterator[str]:
        """Yield one line for each number that was measured."""
        for name, value, ends in self._measured():
            yield f"{name}: {value}{ends}"

    def then(self, other: Speed) -> str:
        """Return one line with each number before and after; the other was measured later."""
        after = {name: value for name, value, _ in other._measured()}
        changes = [
            f"{name} {value} -> {after[name]}"
            for name, value, _ in self._measured()
            if name in after
        ]
        return f"speed on {self._where()} ({self.inputs}): {', '.join(changes)}"

    def _where(self) -> str:
        return self.device if self.threads is None else f"{self.device}, {self.threads} threads"

    def _measured(self) -> Iterator[tuple[str, str, str]]:
        """Yield the name of each measured number, its value and between which ends it was."""
        for name, spread, factor in (
            ("time to the first token in ms", self.first_token_seconds, 1000),
            ("forward pass in ms", self.forward_seconds, 1000),
            ("tokens per second", self.tokens_per_second, 1),
        ):
            if spread is not None:
                middle, low, high = (f"{factor * v:,.1f}" for v in astuple(spread))
                yield name, middle, f" ({low} to {high})"
        if self.memory is not None:
            yield "peak memory in MiB", f"{self.memory / 2**20:,.1f}", ""


@check_arguments
def measure_speed(
    model: PreTrainedModel,
    *,
    batch: Count = 1,
    prompt: Count | None = None,
    new_tokens: Count = _NEW_TOKENS,
    runs: Count = _RUNS,
    inputs: Mapping[str, Any] | None = None,
) -> Speed:
    """Measure a model's speed and memory where it is: on its device, in its dtype.

    A model that generates gets random tokens as a prompt, and continues it greedily with its cache.
    Any other model that reads tokens runs on the prompt alone. The model is left as it was.

    Args:
        model: a loaded model.
        batch: sequences at a time.
        prompt: tokens of each; default: 128, or as many as the model has positions for.
        new_tokens: tokens to generate after each prompt, at least 2 to measure their rate.
        runs: measured runs, after one that warms up.
        inputs: arguments of the forward pass, for a model that does not read tokens alone (images,
            sound). Its forward pass is measured, without generating.

    Raises:
        UnsupportedModelError: the model does not run on tokens alone, and there are no ``inputs``.
        ValueError: prompt and new tokens are more than the model has positions for.
    """
    length, asked, given = 0, "given inputs", inputs
    if given is None:
        length = _fitting(model, prompt, new_tokens)
        asked = f"batch {batch}, prompt of {length} tokens"
        given = {"input_ids": _random_tokens(model, batch, length)}
    generates = inputs is None and model.can_generate()
    with evaluating(model), torch.inference_mode(), quiet_transformers():
        settings = _greedy(model, new_tokens) if generates else None
        taken = _peak(model.device, reset=True)
        try:
            _run(model, given, settings)
        except Exception as error:  # a class that reads images too may raise anything
            raise_shortage(error)
            what = "tokens alone" if inputs is None else "these inputs"
            advice = "" if inputs else ". Pass inputs=, the arguments of its forward pass"
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on {what} ({type(error).__name__}: "
                f"{in_one_line(error)}){advice}"
            ) from error
        times = [_run(model, given, settings) for _ in range(runs)]
        memory = None
        if taken is not None and (peak := _peak(model.device)) is not None:
            weights = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
            memory = weights + max(0, peak - taken)
    first = [marks[0] for marks in times]
    later = [marks[-1] - marks[0] for marks in times]
    rate = None
    if generates and new_tokens > 1:
        rate = Spread.of([batch * (new_tokens - 1) / seconds for seconds in later])
    elif length and not generates:
        rate = Spread.of([batch * length / seconds for seconds in first])
    return Speed(
        type(model).__name__,
        str(model.device),
        str(model.dtype).removeprefix("torch."),
        torch.get_num_threads() if model.device.type == "cpu" else None,
        f"{asked}, {new_tokens} new tokens" if generates else asked,
        runs,
        None if generates else Spread.of(first),
        Spread.of(first) if generates else None,
        rate,
        memory,
    )


def _fitting(model: PreTrainedModel, prompt: int | None, new_tokens: int) -> int:
    """Return a prompt's length for which the model has positions; raise if none was left to it."""
    positions = positions_of(model)
    beside = 0 if model.config.is_encoder_decoder or not model.can_generate() else new_tokens
    if positions is None:
        return prompt or _PROMPT
    if positions < beside + (prompt or 1):
        raise ValueError(
            f"prompt={prompt or 1} and new_tokens={new_tokens}: {type(model).__name__} has "
            f"{positions} positions"
        )
    return prompt or min(_PROMPT, positions - beside)


def _random_tokens(model: PreTrainedModel, batch: int, prompt: int) -> Tensor:
    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    entries = int(getattr(text, "vocab_size", 0) or 2)
    ids = torch.randint(entries // 2, entries, (batch, prompt), generator=generator)
    return ids.to(model.device)


def _greedy(model: PreTrainedModel, new_tokens: int) -> Any:
    """Return the model's settings for generating, changed to exactly so many tokens, greedily."""
    settings: Any = copy.deepcopy(model.generation_config)
    settings.update(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        temperature=None,  # with do_sample=False these three are warned about
        top_p=None,
        top_k=None,
        max_length=None,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0 if settings.pad_token_id is None else settings.pad_token_id,
    )
    return settings


def _run(model: Any, given: Mapping[str, Any], settings: Any) -> list[float]:
    """Generate, and return the seconds until each new token; without settings, run the model."""
    marks: list[float] = []

    def mark(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Note the time of a new token; generating goes on."""
        marks.append(_now(model) - started)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    started = _now(model)
    if settings is None:
        model(**given)
        return [_now(model) - started]
    model.generate(**given, generation_config=settings, stopping_criteria=[mark])
    return marks


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _peak(device: torch.device, reset: bool = False) -> int | None:
    """Return the most bytes that were taken, with ``reset`` those now; None: it is not known."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # another system than Linux does not tell
        if device.type == "cpu":
            if reset:
                _PEAK.write_text("5")  # man 5 proc
            return _resident("VmHWM")
    return None


def _resident(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
