"""A measured model: its data, what its weights read of it, and whether that still holds."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CalibrationError
from ..model.tensors import state_of
from ..reports import short
from .batches import Batch, tokens_in
from .linear_ops import Consumer
from .measure import add_grams, measure
from .over_ranks import ALONE, Ranks
from .readings import Readings

if TYPE_CHECKING:
    from typing_extensions import Self

RIDGE = 1e-2
TEXT_RIDGE = 1e-1
"""Of what writes text: it meets other text than it was measured on (`docs/quality.md`)."""


class MeasuredModel:
    """A model, and what its weights read on some data.

    It measures again by itself, on the same data, once the model's weights have changed (after a
    pruning step, after training).

    Attributes:
        model: the model.
        train: the batches that are measured.
        held_out: the batches that tell whether a refit is any good.
        ridge: how strongly a refit stays with the plain cut.
        max_memory: how many bytes Gram matrices may take together; ``None``: half of what is free.
        refits: False: Gram matrices, which refits need, are measured once something asks for them.
        readings: what was measured.
        ranks: the ranks that measure; ``train`` and ``held_out`` are this rank's.
        seconds: how long the latest measurement took.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[Batch],
        held_out: Sequence[Batch],
        ridge: float = RIDGE,
        max_memory: int | None = None,
        ranks: Ranks = ALONE,
        refits: bool = True,
    ):
        self.ranks, self.refits = ranks, refits
        self.model, self.train, self.held_out = model, list(train), list(held_out)
        self.ridge, self.max_memory = ridge, max_memory
        self.readings = Readings()
        self.seconds = 0.0
        self._measured_at: tuple[Any, ...] = ()

    def on_copy(self, model: nn.Module) -> Self:
        """Return what was measured for a copy of the model, without another pass over the data.

        Args:
            model: a copy with the same weights (``copy.deepcopy(model)``).

        Raises:
            CalibrationError: the weights are not the same.
        """
        readings = self.current()
        own, other = self.model.state_dict(), model.state_dict()
        if own.keys() != other.keys() or not all(
            own[name].shape == other[name].shape and torch.equal(own[name], other[name])
            for name in own
        ):
            raise CalibrationError(
                f"this {type(model).__name__} is no copy of the {type(self.model).__name__} that "
                "was measured: its weights differ. Pass calibrate(model, ...) of this one"
            )
        measured = copy.copy(self)
        measured.model = model
        measured.readings = replace(
            readings, statistics={k: copy.copy(v) for k, v in readings.statistics.items()}
        )
        measured._measured_at = state_of(model)
        return measured

    def comparing_on(self, held_out: Sequence[Batch]) -> Self:
        """Return the same measurement with other held-out batches."""
        self.current()
        measured = copy.copy(self)
        measured.held_out = list(held_out)
        return measured

    def check_measures(self, model: nn.Module) -> None:
        """Raise if it was not this model that was measured.

        Raises:
            CalibrationError: another one was.
        """
        measured = {id(parameter) for parameter in self.model.parameters()}
        if not all(id(parameter) in measured for parameter in model.parameters()):
            raise CalibrationError(
                f"what was measured is another model than the {type(model).__name__} that the "
                "pruner prunes. Pass calibrate(model, ...) of this one"
            )

    def current(self) -> Readings:
        """Return what was measured; measure again first where the weights have changed."""
        state = state_of(self.model)
        if state != self._measured_at:
            started = time.perf_counter()
            again = "calibrate again" if self._measured_at else "calibrate"
            self.readings = Readings()  # so that old Gram matrices make room for new ones
            self.readings = measure(
                self.model, self.train, self.max_memory, again, self.ranks, self.refits
            )
            self.seconds = time.perf_counter() - started
            self._measured_at = state
        return self.readings

    def require(self, leaders: Collection[Consumer]) -> list[Consumer]:
        """Return those leaders that have their Gram matrices now: the first, as there is room.

        Where the first has none, another pass measures it, and as many others as fit.
        """
        readings = self.current()
        wanted = [leader for leader in leaders if leader in readings.statistics]
        if wanted and readings.statistics[wanted[0]].gram is None:
            add_grams(self.model, self.train, readings, wanted, self.max_memory, self.ranks)
        return [leader for leader in wanted if readings.statistics[leader].gram is not None]

    def require_all(self, leaders: Collection[Consumer]) -> bool:
        """True if all those leaders have their Gram matrices now, if need be after another pass.

        False: memory has no room for all of them together.
        """
        statistics = self.current().statistics
        missing = [leader for leader in leaders if statistics[leader].gram is None]
        wanted = dict.fromkeys([*missing, *leaders])
        return len(self.require(wanted)) == len(wanted)

    @property
    def tokens(self) -> int:
        """The number of tokens measured on this rank; of other inputs, their number (images)."""
        return tokens_in(self.train)

    def holds_out(self) -> bool:
        """True if some batch is held out, on whichever rank; all ranks have to call this."""
        return any(self.ranks.gathered(len(self.held_out)))

    @property
    def memory(self) -> int:
        """The bytes that Gram matrices take."""
        found = (one.gram for one in self.readings.statistics.values())
        return sum(gram.nbytes for gram in found if gram is not None)

    def __str__(self) -> str:
        inputs = len(self.readings.statistics)
        what = f"{type(self.model).__name__} on {self.tokens:,} tokens"
        if self.ranks.own_data:
            what += f" (of {self.ranks.count} ranks, this one)"
        if not self._measured_at:
            return f"{what}: not measured yet"
        return (
            f"{what}: what {inputs} inputs of "
            f"{len(self.readings.leaders)} weights carry; {self.memory / 2**20:,.0f} MiB, "
            f"{self.seconds:.1f} s"
        )

    def __repr__(self) -> str:
        return short(self, str(self))
