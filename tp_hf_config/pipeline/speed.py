"""Measure how fast a model answers, on the device where it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

    def shown(self, factor: float = 1) -> str:
        """Return it as text, in another unit: ``factor`` of them are one of these."""
        median, lowest, highest = (
            f"{factor * value:,.1f}" for value in (self.median, self.lowest, self.highest)
        )
        return f"{median} ({lowest} to {highest})"


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
        for name, spread, factor in self._spreads():
            yield f"{name}: {spread.shown(factor)}"
        if self.memory is not None:
            yield f"peak memory in MiB: {self.memory / 2**20:,.1f}"

    def then(self, other: Speed) -> str:
        """Return one line with each number before and after; the other was measured later."""
        pairs = zip(self._spreads(), other._spreads(), strict=True)
        changes = [
            f"{name} {old.median * factor:,.1f} -> {new.median * factor:,.1f}"
            for (name, old, factor), (_, new, _) in pairs
        ]
        if self.memory is not None and other.memory is not None:
            changes.append(
                f"peak memory in MiB {self.memory / 2**20:,.1f} -> {other.memory / 2**20:,.1f}"
            )
        return f"speed on {self._where()} ({self.inputs}): {', '.join(changes)}"

    def _where(self) -> str:
        return self.device if self.threads is None else f"{self.device}, {self.threads} threads"

    def _spreads(self) -> Iterator[tuple[str, Spread, float]]:
        """Yield what each measured number is, the number, and how many of its units are one."""
        if self.first_token_seconds is not None:
            yield "time to the first token in ms", self.first_token_seconds, 1000
        if self.forward_seconds is not None:
            yield "forward pass in ms", self.forward_seconds, 1000
        if self.tokens_per_second is not None:
            yield "tokens per second", self.tokens_per_second, 1


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
        run = _generating(model, given, new_tokens) if generates else _running(model, given)
        memory = _Memory(model)
        try:
            run()
        except Exception as error:  # a class that reads images too may raise anything
            raise_shortage(error)
            what = "tokens alone" if inputs is None else "these inputs"
            advice = "" if inputs else ". Pass inputs=, the arguments of its forward pass"
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on {what} ({type(error).__name__}: "
                f"{in_one_line(error)}){advice}"
            ) from error
        times = [run() for _ in range(runs)]
        peak = memory.peak()
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
        peak,
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


def _running(model: PreTrainedModel, given: Mapping[str, Any]) -> Callable[[], list[float]]:
    """Return a function that runs the model once and returns its seconds."""

    def run() -> list[float]:
        started = _now(model)
        model(**given)
        return [_now(model) - started]

    return run


def _generating(
    model: PreTrainedModel, given: Mapping[str, Any], new_tokens: int
) -> Callable[[], list[float]]:
    """Return a function that generates once and returns the seconds until each new token."""
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

    def run() -> list[float]:
        marks: list[float] = []

        def mark(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            """Note the time of a new token; generating goes on."""
            marks.append(_now(model) - started)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        started = _now(model)
        model.generate(**given, generation_config=settings, stopping_criteria=[mark])  # type: ignore[operator]
        return marks

    return run


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


class _Memory:
    """The bytes of a model, and the most that is taken beside it from now on."""

    def __init__(self, model: PreTrainedModel):
        self._device = model.device
        tensors = (*model.parameters(), *model.buffers())
        self._weights = sum(one.numel() * one.element_size() for one in tensors)
        self._before: int | None = None
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "cpu":
            try:
                _PEAK.write_text("5")  # the peak is what is taken now; man 5 proc
                self._before = _resident("VmHWM")
            except OSError:
                pass  # another system does not tell

    def peak(self) -> int | None:
        """Return the weights and the growth of what is taken; None if the system does not tell."""
        if self._before is None:
            return None
        cuda = self._device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self._device) if cuda else _resident("VmHWM")
        return self._weights + max(0, most - self._before)


def _resident(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
