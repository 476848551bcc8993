"""Ranks of a distributed run compare what they are about to do, before any of them cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..model.config_json import OF_NO_EFFECT, config_json
from ..model.locate import find_pretrained
from ..model.ranks import agree

if TYPE_CHECKING:
    from ..calibration.held_out import Refits
    from .report import GroupCut


class Agreement:
    """Compares what this rank is about to do with all others; raises on all if they differ.

    All ranks have to call each method at the same point.
    """

    def __init__(self, sharded: bool, distributed: bool):
        self._what = "The sharded model" if sharded else "The model"
        self._needed = sharded or distributed  # distributed: each rank has a copy of the model

    def on_settings(self, pruner: Any) -> None:
        if self._needed:
            data = config_json(find_pretrained(pruner.model)[1].config)
            config = {field: value for field, value in data.items() if field not in OF_NO_EFFECT}
            what = (type(pruner).__name__, type(pruner.importance).__name__, repr(config))
            self._on(f"the start of {_step(pruner, 1)}", [("the settings", repr(what))])

    def on_groups(
        self, pruner: Any, groups: Iterable[GroupCut], failure: Exception | None = None
    ) -> None:
        """Compare the channels to be pruned; ``failure``: why this rank cannot prune them."""
        parts = (
            (group.layers[0].name, _digest([vars(layer) for layer in group.layers]))
            for group in groups
            if group.layers
        )
        self._on(_step(pruner), parts, failure)

    def on_refits(self, pruner: Any, refits: Refits) -> None:
        used = [(layer.weight, layer.part) for layer in refits.layers if layer.used]
        parts = [("which weights are refitted", _digest(used))]
        self._on(f"the refits of {_step(pruner)}", parts)

    def on_build(self, pruner: Any, failure: Exception | None) -> None:
        """Check that all ranks have built the pruned model; ``failure``: why this one has not."""
        self._on(f"shard= of {_step(pruner)}", (), failure)

    def _on(
        self, when: str, parts: Iterable[tuple[str, str]], failure: Exception | None = None
    ) -> None:
        if self._needed:
            agree(TrainingError, when, parts, failure, f". {self._what} is unchanged.")
        elif failure is not None:
            raise failure


def _step(pruner: Any, more: int = 0) -> str:
    return f"step {pruner.current_step + more}"


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
