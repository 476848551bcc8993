"""What a job has decided by the time that it writes, kept for a run that goes on with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..calibration.compensation import Compensation, Refitted
from ..graph.cut_list import CutList
from ..hook.dropped_layers import DroppedLayers
from ..hook.history import PrunedGroup, PrunedLayer
from ..hook.report import SyncReport
from ..planning.allocate import Allocation
from ..planning.layer_curve import LayerCurve
from .resumable import Work

Perplexities = tuple[float | None, float | None]


@dataclass(frozen=True)
class Decided:
    """What a job has decided and measured; the cut list is kept beside it.

    Attributes:
        without_text: why the model is not run on the text after all; empty if it is.
        parameters: how many parameters the model had.
        before: the perplexities before.
        dropped: the layers that were dropped.
        allocation: the widths that were allocated.
        reports: one for each step.
        after: the perplexities afterwards; ``None``: not measured yet.
        cuts: what all steps have cut; ``None``: nothing, or it is not known, or it is kept already.
    """

    without_text: str
    parameters: int
    before: Perplexities
    dropped: DroppedLayers | None
    allocation: Allocation | None
    reports: tuple[SyncReport, ...]
    after: Perplexities | None = None
    cuts: CutList | None = None

    def keep(self, work: Work) -> bool:
        """Keep this and the cut list of all steps, so that a later run can go on from here.

        Returns:
            False if it cannot be: some step has no cut list.
        """
        if self.cuts is None and any(report.groups for report in self.reports):
            return False
        work.decide(replace(self, cuts=None), self.cuts)
        return True

    def measured(self, after: Perplexities, work: Work) -> Decided:
        """Return this with the perplexities afterwards; keep them where this is kept."""
        measured = replace(self, after=after)
        if work.is_decided:
            work.decide(replace(measured, cuts=None))
        return measured


_CLASSES: list[Any] = [
    Allocation,
    Compensation,
    Decided,
    DroppedLayers,
    LayerCurve,
    PrunedGroup,
    PrunedLayer,
    Refitted,
    SyncReport,
]


def decided_before(work: Work) -> tuple[Decided, CutList | None] | None:
    """Return what an interrupted run has decided, with its cut list; ``None``: nothing.

    Raises:
        PipelineError: it cannot be read.
    """
    return work.decision(_CLASSES)
