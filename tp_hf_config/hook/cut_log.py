"""Turn what a graph cut between two syncs into a cut list, and keep one of all."""

from __future__ import annotations

import weakref
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
    """What a hook's pruners cut from one model.

    Attributes:
        total: everything; ``None``: nothing yet, or not all of it is known.
    """

    def __init__(self, model: Any):
        self.model = weakref.ref(model)
        self.total: CutList | None = None
        self._known = True

    def begin(self, cuts: Cuts) -> None:
        """Follow a graph, from now on; ``cuts`` is what it cuts."""
        self._cuts, self._before = cuts, _State.of(self.model())
        cuts.log.clear()

    def take(self) -> CutList | None:
        """Return what was cut since the last call; ``None``: nothing, or not all of it is known."""
        model: Any = self.model()
        before, self._before = self._before, _State.of(model)
        edits = edits_by_name(model, self._cuts.log)
        self._cuts.log.clear()
        self._known &= explained(model, edits, before.shapes, self._before.shapes)
        if not self._known:
            self.total = None
        if not self._known or not edits:
            return None
        step = CutList(before.model, before.config, self._before.config, edits)
        self.total = step if self.total is None else self.total.followed_by(step)
        return step
