"""Run a model over batches, and leave it as it was: mode, gradients, random numbers, no hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import CalibrationError, in_one_line
from ..model.config_json import configs_of
from ..model.ranks import smallest
from ..model.shortage import is_out_of_memory
from ..model.surroundings import evaluating, free_memory, same_random_state
from .batches import Batch, on_device
from .inner_models import models_in
from .linear_ops import LinearOp, WatchedOps
from .over_ranks import ALONE, Ranks, in_step
from .sources import Sources

_Item = TypeVar("_Item")
Track = Callable[[Sequence[Any], int, str, str], Iterator[Any]]
"""Yields items, so many of them, and shows how far they are: under a title, in a unit."""
_track: ContextVar[Track | None] = ContextVar("track", default=None)
_SHORT = 2  # seconds: what takes less is not shown


def memory_limit(model: nn.Module, max_memory: int | None, ranks: Ranks = ALONE) -> int:
    """Return ``max_memory``, or half of the bytes that are free where the model is.

    Of several ranks it is what each of them has: they have to measure alike.
    """
    if max_memory is not None:
        return max_memory
    half = free_memory(next(model.parameters()).device) // 2
    return smallest(half) if ranks.count > 1 else half


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
        model: the model.
        batches: the batches.
        visit: gets every operation, and returns what it is to return; ``None``: none is watched.
        sources: watches the layers in front of weights.
        after_batch: gets the number of each batch and the model's result.
        what: the title of the progress bar; empty: there is none.
        ranks: the ranks that run the model, each over batches of its own.

    Raises:
        CalibrationError: the model does not run on a batch, on this rank or on another.
    """
    after = after_batch or (lambda number, result: None)
    selected = None if sources is None else sources.note_selection
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        if sources is not None:
            stack.enter_context(sources.watching())
        begin = stack.enter_context(in_step(model, ranks, what or "a pass over held-out data"))
        ops = nullcontext() if visit is None else WatchedOps(model, visit, selected)
        for number, batch in enumerate(shown(batches, what)):
            begin(number)
            after(number, _run(model, number, batch, ops, sources))


def _run(
    model: nn.Module, number: int, batch: Batch, ops: AbstractContextManager[Any], sources: Any
) -> Any:
    """Return what a model makes of a batch."""
    try:
        with ops:
            return model(**on_device(batch, model))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, MemoryError) as error:
        shapes = {k: list(v.shape) for k, v in batch.items() if hasattr(v, "shape")}
        what = f"batch {number + 1} of the calibration data, {shapes}: {type(error).__name__}: "
        what += in_one_line(error).rstrip(".")
        if is_out_of_memory(error):
            raise CalibrationError(
                f"{type(model).__name__} ran out of memory on {what}. Pass smaller batches, or "
                "calibrate(..., max_memory=) less than the default, half of what is free, or "
                "refits=False, which needs no Gram matrices for importances"
            ) from error
        raise CalibrationError(
            f"{type(model).__name__} does not run on {what}. Pass batches that the model takes: "
            "model(**batch)"
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
