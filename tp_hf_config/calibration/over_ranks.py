"""Measure on several ranks: each runs the model on data of its own, and sums are added up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, in_one_line
from ..graph.standin import standin_behind
from ..graph.taking_turns import InterruptedByRankError
from ..model.ranks import Decision, differing, gathered, summed
from .batches import Batch

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """The ranks that measure one model; every rank has to call the methods at the same points.

    Attributes:
        count: how many ranks measure the model.
        own_data: True if each of them has data of its own, so that sums are added up; otherwise
            each has all of the data.
        device: where tensors are added up.
    """

    count: int = 1
    own_data: bool = False
    device: torch.device | str = "cpu"

    def gathered(self, value: _T) -> list[_T]:
        """Return what every rank has, in their order; the own value alone if data is not shared."""
        return gathered(value) if self.own_data else [value]

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, the same bits on all of them.

        ``values`` may be overwritten.
        """
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
        model: the model, or the stand-in of a sharded one.
        batches: this rank's data.
        settings: what all ranks need alike.
        distributed: True if the ranks hold whole copies of the model.
        failure: why this rank cannot measure; all ranks raise then, this one its own error.

    Raises:
        CalibrationError: the ranks have other settings, one does not come or cannot, or none has
            data.
    """
    standin = standin_behind(model)
    if standin is None and not distributed:
        if failure is not None:
            raise failure
        return ALONE
    what = (("the settings", f"{type(model).__name__} {settings!r}"),)
    _agree(Decision("calibrate", what), failure)
    data = gathered((len(batches), _digest(batches)))
    if not any(count for count, _ in data):
        raise CalibrationError("the calibration data has no batch on any rank: pass some")
    source: nn.Module = model if standin is None else standin.sharded
    return Ranks(len(data), len(set(data)) > 1, next(source.parameters()).device)


@contextmanager
def in_step(model: nn.Module, ranks: Ranks, when: str) -> Iterator[Callable[[int], None]]:
    """Let every rank run the model on batches of its own: none goes on before all have finished.

    Args:
        model: the model, or the stand-in of a sharded one.
        ranks: the ranks.
        when: what is measured, for messages.

    Yields:
        A function to call with the number of each batch.

    Raises:
        CalibrationError: another rank cannot go on, is elsewhere, or does not come.
    """
    standin = standin_behind(model)
    if ranks.count == 1:
        yield lambda number: None
        return
    _agree(Decision(f"the start of {when}"))
    failure: BaseException | None = None
    try:
        with nullcontext() if standin is None else standin.taking_turns() as turns:
            yield lambda number: None if turns is None else setattr(turns, "batch", number)
    except InterruptedByRankError as error:
        if error.reason:
            raise CalibrationError(
                f"this rank lost the others in {when}: {error.reason}. Read their logs"
            ) from error
    except BaseException as error:
        failure = error
    _agree(Decision(f"the end of {when}"), failure)


def _agree(mine: Decision, failure: BaseException | None = None) -> None:
    """Raise unless all ranks can go on and do the same."""
    text = "" if failure is None else in_one_line(failure)
    refusal = differing(replace(mine, failure=text))
    if failure is not None:
        raise failure
    if refusal is not None:
        raise CalibrationError(refusal.reason)


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
