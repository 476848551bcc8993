"""Refit the weights that read what a step cuts: solved before its cut, reported after its sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..calibration.calibrate import Calibration
from ..calibration.compensation import Compensating, Compensation
from ..errors import CalibrationWarning, warn
from ..graph.config_group import ConfigGroup
from ..graph.edits import RefitInPlace
from ..model.shapes import Shapes
from .agreement import Agreement
from .cheaper import advice_before
from .follow import Follower


class RefitSettings(Protocol):
    """What a hook says of refits; it may change between steps."""

    compensate: Calibration | None
    record_refits: bool


class StepRefits:
    """The refits of one step after the other.

    Args:
        settings: whether weights are refitted.
        follower: follows the pruner.
        agreement: compares what the ranks refit.
    """

    def __init__(self, settings: RefitSettings, follower: Follower, agreement: Agreement):
        self._settings, self._follower, self._agreement = settings, follower, agreement
        self._pruner = follower.pruner
        self._compensating: Compensating | None = None

    def solve(
        self, groups: Sequence[ConfigGroup], remaining: Shapes
    ) -> dict[str, list[RefitInPlace]]:
        """Return the refits of each weight for the groups of a step, if they are wanted.

        ``remaining``: the shapes that the step leaves.
        """
        if self._settings.compensate is None:
            return {}
        compensating = Compensating(self._settings.compensate, groups)
        self._agreement.on_refits(self._pruner, compensating.result)
        self._compensating = compensating
        told = advice_before(
            self._follower.view, self._settings.compensate, compensating, groups, remaining
        )
        if told is not None:
            warn(told, CalibrationWarning)
        return compensating.edits

    def taken(self, synced: bool) -> Compensation | None:
        """Return what the refits of the step that ends came to; ``None`` if there are none.

        ``synced``: True if a config describes what is left.
        """
        compensating, self._compensating = self._compensating, None
        return None if compensating is None else compensating.finished(synced)
