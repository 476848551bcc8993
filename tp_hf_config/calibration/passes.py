"""Run a model over batches, on one rank or several, and leave it as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, in_one_line
from ..model.config_json import configs_of
from ..model.ranks import agree, gathered, summed
from ..model.sharded import Passes, behind, plain_class
from ..model.shortage import is_out_of_memory
from ..model.surroundings import evaluating, free_memory, same_random_state
from .batches import Batch, models_in, on_device
from .linear_ops import LinearOp, WatchedOps
from .sources import Sources

_T = TypeVar("_T")
_Item = TypeVar("_Item")
Track = Callable[[Sequence[Any], int, str, str], Iterator[Any]]
"""Yields items, so many of them, and shows how far they are: under a title, in a unit."""
_track: ContextVar[Track | None] = ContextVar("track", default=None)
_SHORT = 2  # seconds: what takes less is not shown


@dataclass(frozen=True)
class Ranks:
    """The ranks that measure one model; every rank has to call the methods at the same points.

    Attributes:
        count: how many ranks measure the model.
        own_data: True if each of them has data of its own, so that sums are added up; otherwise
            each has all of the data.
        device: where tensors are added up.
        spare: what a rank runs while only others have batches left, because all gather weights
            together; ``None``: each has a copy of them.
    """

    count: int = 1
    own_data: bool = False
    device: torch.device | str = "cpu"
    spare: Batch | None = None

    def gathered(self, value: _T) -> list[_T]:
        """Return what every rank has, in their order; the own value alone if data is not shared."""
        return gathered(value) if self.own_data else [value]

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, the same bits; ``values`` may be overwritten."""
        return summed(values, self.device) if self.own_data else values

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Return the sum of each number over all ranks."""
        return self.summed(torch.tensor(numbers, dtype=torch.float64)).tolist()


ALONE = Ranks()


def agreed_ranks(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: Any,
    distributed: bool,
    failure: Exception | None,
) -> Ranks:
    """Return the ranks that measure a model, once they have agreed on how.

    Args:
        model: the model, or the meta copy of a sharded one.
        batches: this rank's data.
        settings: what all ranks need alike.
        distributed: True if the ranks hold whole copies of the model.
        failure: why this rank cannot measure; all ranks raise then, this one its own error.

    Raises:
        CalibrationError: the ranks have other settings, one does not come or cannot, or none has
            data.
    """
    source = behind(model)
    if source is model and not distributed:
        if failure is not None:
            raise failure
        return ALONE
    what = (("the settings", f"{type(model).__name__} {settings!r}"),)
    agree(CalibrationError, "calibrate", what, failure)
    data = gathered((len(batches), _digest(batches)))
    if not any(count for count, _ in data):
        raise CalibrationError("the calibration data has no batch on any rank: pass some")
    spare = batches[0] if batches and source is not model else None
    if source is not model and not all(count for count, _ in data):
        spare = next(chain(*gathered(batches[:1])))
    return Ranks(len(data), len(set(data)) > 1, next(source.parameters()).device, spare)


def _digest(batches: Sequence[Batch]) -> str:
    """Return what is equal for ranks that have the same data."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            digest.update(f"{name} {getattr(value, 'shape', value)}".encode())
            if isinstance(value, Tensor):
                values = value.detach().cpu().flatten().contiguous()
                digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def memory_limit(model: nn.Module, max_memory: int | None, ranks: Ranks = ALONE) -> int:
    """Return ``max_memory``, or half of the bytes that are free where the model is.

    Of several ranks it is what each of them has: they have to measure alike.
    """
    if max_memory is not None:
        return max_memory
    half = free_memory(next(behind(model).parameters()).device) // 2
    return min(gathered(half)) if ranks.count > 1 else half


def watched_pass(
    model: nn.Module,
    batches: Sequence[Batch],
    visit: Callable[[LinearOp], Any] | None = None,
    sources: Sources | None = None,
    after_batch: Callable[[int, Any], None] | None = None,
    what: str = "",
    ranks: Ranks = ALONE,
) -> None:
    """Run a model over batches while every linear operation on its parameters is watched.

    Args:
        model: the model, or the meta copy of a sharded one, which is run then.
        batches: the batches.
        visit: gets every operation, and returns what it is to return; ``None``: none is watched.
        sources: watches the layers in front of weights.
        after_batch: gets the number of each batch and the model's result.
        what: the title of the progress bar; empty: there is none.
        ranks: the ranks that run the model, each over batches of its own.

    Raises:
        CalibrationError: the model does not run on a batch, on this rank or on another.
    """
    model = behind(model)
    after = after_batch or (lambda number, result: None)
    selected = None if sources is None else sources.note_selection
    ops = None if visit is None else WatchedOps(model, visit, selected)
    passes = Passes(model, lambda part: None if ops is None else ops.locate(part))

    def run(number: int, batch: Batch) -> None:
        after(number, _run(model, number, batch, ops or nullcontext(), sources))

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(passes.watched())
        if sources is not None:
            stack.enter_context(sources.watching())
        if ranks.count > 1:
            _run_together(model, batches, run, passes, what, ranks)
        else:
            for number, batch in enumerate(shown(batches, what)):
                run(number, batch)


def _run_together(
    model: nn.Module,
    batches: Sequence[Batch],
    run: Callable[[int, Batch], None],
    passes: Passes,
    what: str,
    ranks: Ranks,
) -> None:
    """Run every rank's batches, as many passes on each rank; if one cannot go on, all raise."""
    when = what or "a pass over held-out data"
    agree(CalibrationError, f"the start of {when}")
    failure: BaseException | None = None
    rest = max(gathered(len(batches))) - len(batches)
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
            if any(gathered(failure is not None)):
                break
        except RuntimeError as error:
            raise CalibrationError(
                f"this rank lost the others in {when}: {in_one_line(error)}. Read their logs"
            ) from error
    agree(CalibrationError, f"the end of {when}", failure=failure)


def _run(
    model: nn.Module, number: int, batch: Batch, ops: AbstractContextManager[Any], sources: Any
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
                f"{name} ran out of memory on {what}. Pass smaller batches, or "
                "calibrate(..., max_memory=) less than the default, half of what is free, or "
                "refits=False, which needs no Gram matrices for importances"
            ) from error
        raise CalibrationError(
            f"{name} does not run on {what}. Pass batches that the model takes: model(**batch)"
        ) from error
    finally:
        if sources is not None:
            sources.forget()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without gradients and caches, with plain experts; then restore it.

    A cache copies what some weights read (latent attention), so that no norm would be seen there.
    """
    models = models_in(model)
    experts = [(each, how) for each in models if (how := _experts_of(each))]
    holders: list[nn.Module] = [*models] or [model]
    configs = (config for each in holders for config in configs_of(each))
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
    """Return how a model of Transformers runs experts, if that can be set and is not eager."""
    get = getattr(model, "get_experts_implementation", None)
    if get is None:
        return None
    current = get()
    return current if any(value not in (None, "eager") for value in current.values()) else None


@contextmanager
def shown_by(track: Track) -> Iterator[None]:
    """Show inside the block how far passes are by this function instead of Transformers' bars."""
    token = _track.set(track)
    try:
        yield
    finally:
        _track.reset(token)


def shown(items: Sequence[_Item], what: str, unit: str = "windows") -> Iterator[_Item]:
    """Yield items under a progress bar of Transformers, which its users can switch off."""
    from transformers.utils import logging

    track = _track.get()
    if not what:
        yield from items
    elif track is not None:
        yield from track(items, len(items), what, unit)
    else:
        yield from logging.tqdm(  # type: ignore[no-untyped-call]
            items, desc=what, leave=False, delay=_SHORT
        )
