"""Turn what a graph cut between two syncs into a cut list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..graph.cut import Cuts
from ..graph.cut_list import CutList, edits_by_name, explained
from ..model.config_json import config_json
from ..model.layer_class import stock_class
from ..model.shapes import Shapes, shapes


@dataclass(frozen=True)
class _State:
    """A model between two syncs: the name of its class, its config as JSON, its shapes."""

    model: str
    config: dict[str, Any]
    shapes: Shapes

    @classmethod
    def of(cls, model: Any) -> _State:
        """Return the state of a model."""
        name = stock_class(type(model)).__name__
        return cls(name, config_json(model.config), shapes(model))


class CutLog:
    """What was cut from a model, from one sync to the next.

    ``cuts``: what its graph cuts.
    """

    def __init__(self, model: Any, cuts: Cuts):
        self._model, self._cuts = model, cuts
        self._before = _State.of(model)
        cuts.log.clear()

    def take(self) -> CutList | None:
        """Return what was cut since the last call; ``None``: nothing, or not all of it is known."""
        before, self._before = self._before, _State.of(self._model)
        edits = edits_by_name(self._model, self._cuts.log)
        self._cuts.log.clear()
        if not edits or not explained(self._model, edits, before.shapes, self._before.shapes):
            return None
        return CutList(before.model, before.config, self._before.config, edits)


def joined(lists: Sequence[CutList | None]) -> CutList | None:
    """Return the cut lists of several steps as one; ``None``: there is none, or one is missing."""
    total: CutList | None = None
    for cuts in lists:
        if cuts is None:
            return None
        total = cuts if total is None else total.then(cuts)
    return total
