"""Run a model over batches, on one rank or several, and restore its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, in_one_line
from ..model.config_json import configs_of
from ..model.sharded import Passes, agree, behind, from_all_ranks, plain_class, summed
from ..model.surroundings import evaluating, free_memory, is_out_of_memory, same_random_state
from .batches import Batch, models_in, on_device
from .linear_ops import ExpertOutputs, LinearOp, WatchedOps
from .sources import Sources

_T = TypeVar("_T")
_Item = TypeVar("_Item")
# (items, their number, title, unit) -> the items, while a progress bar is shown
Track = Callable[[Sequence[Any], int, str, str], Iterator[Any]]
_track: ContextVar[Track | None] = ContextVar("track", default=None)
_SHORT = 2  # seconds; a shorter pass shows no progress bar


@dataclass(frozen=True)
class Ranks:
    """The ranks that measure one model; all of them call each method at the same point."""

    count: int = 1  # ranks that measure the model
    own_data: bool = False  # each rank has other data: sums are added up. Else each has all data
    device: torch.device | str = "cpu"  # where sums are added up
    # A sharded model's weights are gathered by all ranks together, so a rank without a batch left
    # runs this one; None: each rank has all weights.
    spare: Batch | None = None

    def gathered(self, value: _T) -> list[_T]:
        """Return each rank's value, in rank order; only this one's if all have the same data."""
        return from_all_ranks(value) if self.own_data else [value]

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, the same bits on each; may overwrite ``values``."""
        return summed(values, self.device) if self.own_data else values

    def sums(self, numbers: Sequence[float]) -> list[float]:
        return self.summed(torch.tensor(numbers, dtype=torch.float64)).tolist()


ALONE = Ranks()


def agreed_ranks(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: Any,
    distributed: bool,
    failure: Exception | None,
) -> Ranks:
    """Return the ranks that measure a model, once they agree on class and settings.

    If one rank has a ``failure``, all raise.
    """
    source = behind(model)
    if source is model and not distributed:
        if failure is not None:
            raise failure
        return ALONE
    what = (("the settings", f"{type(model).__name__} {settings!r}"),)
    agree(CalibrationError, "calibrate", what, failure)
    data = from_all_ranks((len(batches), _digest(batches)))
    if not any(count for count, _ in data):
        raise CalibrationError(
            "the calibration data is empty on every rank. Pass at least one batch on one of them"
        )
    spare = batches[0] if batches and source is not model else None
    if source is not model and not all(count for count, _ in data):
        spare = next(chain(*from_all_ranks(batches[:1])))
    return Ranks(len(data), len(set(data)) > 1, next(source.parameters()).device, spare)


def _digest(batches: Sequence[Batch]) -> str:
    """Return a hash that is equal on ranks with the same data."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            digest.update(f"{name} {getattr(value, 'shape', value)}".encode())
            if isinstance(value, Tensor):
                values = value.detach().cpu().flatten().contiguous()
                digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def memory_limit(model: nn.Module, max_memory: int | None, ranks: Ranks = ALONE) -> int:
    """Return ``max_memory``, or half of the free bytes on the model's device."""
    if max_memory is not None:
        return max_memory
    half = free_memory(next(behind(model).parameters()).device) // 2
    # ranks have to measure the same matrices
    return min(from_all_ranks(half)) if ranks.count > 1 else half


def watched_pass(
    model: nn.Module,
    batches: Sequence[Batch],
    visit: Callable[[LinearOp], Any] | None = None,
    sources: Sources | None = None,
    after_batch: Callable[[int, Any], None] | None = None,
    what: str = "",
    ranks: Ranks = ALONE,
    experts: ExpertOutputs | None = None,
    embedded: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Run a model over batches, calling ``visit`` instead of each linear operation on a parameter.

    ``visit`` returns the operation's result. ``after_batch`` gets each batch's number and the
    model's output. ``what`` is the progress bar's title; empty: no bar. If a rank fails, all ranks
    raise.
    """
    model = behind(model)  # a meta copy's sharded model
    after = after_batch or (lambda number, result: None)
    selected = None if sources is None else sources.note_selection
    ops = None if visit is None else WatchedOps(model, visit, selected, experts, embedded)
    passes = Passes(model, lambda part: None if ops is None else ops.locate(part))

    def run_one(number: int, batch: Batch) -> None:
        after(number, run(model, number, batch, ops or nullcontext(), sources))

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(passes.watched())
        if sources is not None:
            stack.enter_context(sources.watching())
        if ranks.count > 1:
            _run_together(model, batches, run_one, passes, what, ranks)
        else:
            for number, batch in enumerate(shown(batches, what)):
                run_one(number, batch)


def _run_together(
    model: nn.Module,
    batches: Sequence[Batch],
    run: Callable[[int, Batch], None],
    passes: Passes,
    what: str,
    ranks: Ranks,
) -> None:
    """Run every rank's batches, with as many passes on each rank; if one fails, all raise."""
    when = what or "a pass over held-out data"
    agree(CalibrationError, f"the start of {when}")
    failure: BaseException | None = None
    rest = max(from_all_ranks(len(batches))) - len(batches)
    for number, batch in enumerate(shown([*batches, *[ranks.spare] * rest], what)):
        passes.begin()
        try:
            if number < len(batches):
                run(number, batches[number])
            elif batch is not None:
                model(**on_device(batch, model))
        except BaseException as error:
            failure = error
        try:
            if failure is not None:
                passes.give_up()
            if any(from_all_ranks(failure is not None)):
                break
        except RuntimeError as error:
            raise CalibrationError(
                f"this rank lost the connection to the other ranks in {when}: "
                f"{in_one_line(error)}. Read the logs of the other ranks"
            ) from error
    agree(CalibrationError, f"the end of {when}", failure=failure)


def run(
    model: nn.Module,
    number: int,
    batch: Batch,
    ops: AbstractContextManager[Any],
    sources: Sources | None = None,
) -> Any:
    try:
        with ops:
            return model(**on_device(batch, model))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, MemoryError) as error:
        shapes = {k: list(v.shape) for k, v in batch.items() if hasattr(v, "shape")}
        what = f"batch {number + 1} of the calibration data, {shapes}: {type(error).__name__}: "
        what += in_one_line(error).rstrip(".")
        name = plain_class(type(model)).__name__
        if is_out_of_memory(error):
            raise CalibrationError(
                f"{name} ran out of memory on {what}. Pass smaller batches, or a smaller "
                "max_memory= to calibrate() (the default is half of the free memory), or "
                "refits=False, so that importances need no Gram matrices"
            ) from error
        raise CalibrationError(
            f"{name} does not run on {what}. Pass batches that the model takes: model(**batch)"
        ) from error
    finally:
        if sources is not None:
            sources.forget()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without gradients, caches and fused experts; then restore it."""
    models = models_in(model)
    experts = [(each, how) for each in models if (how := _experts_of(each))]
    holders: list[nn.Module] = [*models] or [model]
    configs = (config for each in holders for config in configs_of(each))
    # a cache copies what some weights read (latent attention) and hides the norm before them
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        for each, _ in experts:
            each.set_experts_implementation("eager")
        with evaluating(model), torch.inference_mode(False), torch.no_grad(), same_random_state():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for each, how in experts:
            each.set_experts_implementation(how)


def _experts_of(model: nn.Module) -> Any:
    get = getattr(model, "get_experts_implementation", None)
    if get is None:
        return None
    current = get()
    return current if any(value not in (None, "eager") for value in current.values()) else None


@contextmanager
def shown_by(track: Track) -> Iterator[None]:
    token = _track.set(track)
    try:
        yield
    finally:
        _track.reset(token)


def logits_of(result: Any) -> Tensor | None:
    logits = result.get("logits") if isinstance(result, Mapping) else None
    return logits if isinstance(logits, Tensor) else None


def class_logits(result: Any) -> Tensor | None:
    """Return logits of several classes along the last axis (images have them along axis 1)."""
    logits = logits_of(result)
    # a softmax of one logit is always 1
    return logits if logits is not None and 2 <= logits.ndim <= 3 and logits.shape[-1] > 1 else None


def shown(items: Sequence[_Item], what: str, unit: str = "windows") -> Iterator[_Item]:
    from transformers.utils import logging

    track = _track.get()
    if not what:
        yield from items
    elif track is not None:
        yield from track(items, len(items), what, unit)
    else:
        # users can switch it off
        yield from logging.tqdm(  # type: ignore[no-untyped-call]
            items, desc=what, leave=False, delay=_SHORT
        )
