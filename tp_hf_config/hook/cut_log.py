"""Records a cut list of everything that a hook's pruners cut."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..graph.cut_list import CutList, explained
from ..graph.edits import Edit, NotKept, RefitInPlace
from ..model.config_json import config_json
from ..model.layer_class import stock_class
from ..model.shapes import Shapes, shapes


@dataclass(frozen=True)
class _State:
    """A model between two syncs: class name, config as JSON, shapes."""

    model: str
    config: dict[str, Any]
    shapes: Shapes

    @classmethod
    def of(cls, model: Any) -> _State:
        name = stock_class(type(model)).__name__
        return cls(name, config_json(model.config), shapes(model))


class CutLog:
    """Records what a hook's pruners cut from one model."""

    def __init__(self, model: Any):
        self.model = weakref.ref(model)
        self.total: CutList | None = None  # None: nothing is cut yet, or not all cuts are known
        self._known = True

    def begin(self) -> None:
        self._before = _State.of(self.model())

    def take(self, edits: Mapping[str, tuple[Edit, ...]]) -> None:
        model: Any = self.model()
        before, self._before = self._before, _State.of(model)
        self._known &= explained(model, edits, before.shapes, self._before.shapes)
        if not self._known:
            self.total = None
        if not self._known or not edits:
            return
        kept = {
            name: tuple(NotKept() if isinstance(edit, RefitInPlace) else edit for edit in done)
            for name, done in edits.items()
        }
        step = CutList(before.model, before.config, self._before.config, kept)
        self.total = step if self.total is None else self.total.followed_by(step)
