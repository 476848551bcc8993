"""Run a model over batches, and leave it as it was: mode, gradients, random numbers, no hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError, in_one_line
from ..model.live_objects import configs_of
from ..model.surroundings import same_random_state
from .batches import Batch, on_device
from .linear_ops import LinearOp, WatchedOps
from .over_ranks import ALONE, Ranks, in_step
from .sources import Sources


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
    ops: Any = nullcontext() if visit is None else WatchedOps(model, visit)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        if sources is not None:
            stack.enter_context(sources.watching())
        begin = stack.enter_context(in_step(model, ranks, what or "a pass over held-out data"))
        for number, batch in enumerate(_shown(batches, what)):
            begin(number)
            try:
                with ops:
                    result = model(**on_device(batch, model))
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
                shapes = {k: list(v.shape) for k, v in batch.items() if hasattr(v, "shape")}
                raise CalibrationError(
                    f"{type(model).__name__} does not run on batch {number + 1} of the calibration "
                    f"data, {shapes}: {type(error).__name__}: {in_one_line(error)}. Pass batches "
                    "that the model takes: model(**batch)"
                ) from error
            if after_batch is not None:
                after_batch(number, result)
            if sources is not None:
                sources.forget()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without gradients and caches, with plain experts; then restore it.

    A cache copies what some weights read (latent attention), so that no norm would be seen there.
    """
    training = {module: module.training for module in model.modules()}
    experts = _experts_of(model)
    caching = [config for config in configs_of(model) if getattr(config, "use_cache", False)]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        if experts:
            model.set_experts_implementation("eager")  # type: ignore[operator]
        with torch.no_grad(), same_random_state():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module, mode in training.items():
            module.training = mode
        if experts:
            model.set_experts_implementation(experts)  # type: ignore[operator]


def _experts_of(model: nn.Module) -> Any:
    """Return how a model of Transformers runs experts, if that can be set and is not eager."""
    get = getattr(model, "get_experts_implementation", None)
    if get is None:
        return None
    current = get()
    return current if any(value not in (None, "eager") for value in current.values()) else None


def _shown(batches: Sequence[Batch], what: str) -> Iterator[Batch]:
    """Yield batches under a progress bar of Transformers, which its users can switch off."""
    if not what:
        yield from batches
        return
    from transformers.utils import logging

    yield from logging.tqdm(batches, desc=what, leave=False)  # type: ignore[no-untyped-call]
