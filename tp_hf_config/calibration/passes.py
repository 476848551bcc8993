"""Run a model over batches, and leave it as it was: mode, gradients, random numbers, no hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, in_one_line
from ..forward.lockstep import Lockstep
from ..graph.standin import standin_behind
from ..model.config_json import configs_of
from ..model.lazy_tensor import is_lazy
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
_SUMS = 3, 8  # of the memory, where weights and batches that wait take some too


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Together:
    """How batches go through a model together whose weights are read from files.

    Attributes:
        memory: the bytes for weights in memory and for batches that wait.
        used: lazy tensors that are used beside the model's parameters.
        stage_done: called whenever all batches have gone through a layer.
    """

    memory: int
    used: Sequence[Tensor] = ()
    stage_done: Callable[[], None] = _nothing


def run_all(model: nn.Module, passes: Sequence[Callable[[], _Item]]) -> list[_Item]:
    """Return the results of functions that run a model; they run together if it is streamed."""
    if not is_streamed(model):
        return [each() for each in passes]
    results: list[_Item] = []
    lockstep = Lockstep(model, memory_limit(model, None))
    lockstep.run(passes, lambda number, result: results.append(result))
    return results


def together_on(
    model: nn.Module,
    max_memory: int | None,
    used: Sequence[Tensor] = (),
    stage_done: Callable[[], None] = _nothing,
) -> Together | None:
    """Return how batches go through a model together; ``None``: its weights are in memory.

    Args:
        model: the model.
        max_memory: how many bytes it may take, with sums; ``None``: half of what is free.
        used: see :class:`Together`.
        stage_done: likewise.
    """
    if not is_streamed(model):
        return None
    limit = memory_limit(model, max_memory)
    return Together(limit - _for_sums(limit), used, stage_done)


def sums_limit(model: nn.Module, max_memory: int | None, ranks: Ranks = ALONE) -> int:
    """Return how many bytes sums over batches may take in memory."""
    limit = memory_limit(model, max_memory, ranks)
    return _for_sums(limit) if is_streamed(model) else limit


def _for_sums(limit: int) -> int:
    part, whole = _SUMS
    return limit * part // whole


def is_streamed(model: nn.Module) -> bool:
    """True if a model's weights are read from files when they are used."""
    return is_lazy(model) and standin_behind(model) is None


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
    together: Together | None = None,
    ranks: Ranks = ALONE,
) -> bool:
    """Run a model over batches while every linear operation on its parameters is watched.

    Args:
        model: the model.
        batches: the batches.
        visit: gets every operation, and returns what it is to return; ``None``: none is watched.
        sources: watches the layers in front of weights.
        after_batch: gets the number of each batch and the model's result.
        what: the title of the progress bar; empty: there is none.
        together: how batches go through the model together; ``None``: one after the other.
        ranks: the ranks that run the model, each over batches of its own.

    Returns:
        True if ``visit`` got each weight's operations in the order of the batches.

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
        if together is None:
            ops = nullcontext() if visit is None else WatchedOps(model, visit, selected)
            for number, batch in enumerate(shown(batches, what)):
                begin(number)
                after(number, _run(model, number, batch, ops, sources))
            return True
        lockstep = Lockstep(
            model,
            together.memory,
            together.used,
            stage_done=together.stage_done,
            about_to_wait=_nothing if sources is None else sources.forget_unused,
            advance=lambda: next(steps, None),
        )

        def noted(op: LinearOp) -> Any:
            lockstep.note_use(op.consumer)
            assert visit is not None
            return visit(op)

        ops = nullcontext() if visit is None else WatchedOps(model, noted, selected)
        steps = iter(shown(range(lockstep.steps * len(batches)), what))
        passes = [
            partial(_run, model, number, batch, ops, sources)
            for number, batch in enumerate(batches)
        ]
        lockstep.run(passes, after)
        return lockstep.in_order


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
