"""Ranks of a distributed run agree on what a pruner does, before any of them cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError, in_one_line
from ..model.config_json import OF_NO_EFFECT, config_json
from ..model.locate import find_pretrained
from ..model.ranks import Decision, differing

if TYPE_CHECKING:
    from ..calibration.held_out import Refits
    from .report import GroupCut

_Parts = Iterable[tuple[str, str]]


class Agreement:
    """Compares what this rank is about to do with what all others are about to do.

    Every rank has to call each method at the same point, and each raises ``TrainingError`` on all
    ranks if one is elsewhere, does not come, does something else, or cannot go on.

    Args:
        sharded: True if the ranks hold shards of one model.
        distributed: True if each holds a copy. If neither, there is nobody to agree with.
    """

    def __init__(self, sharded: bool, distributed: bool):
        self._untouched = (
            "The sharded model is as it was." if sharded else "The model is as it was."
        )
        self._needed = sharded or distributed

    def on_settings(self, pruner: Any) -> None:
        """Compare the kinds of pruner and importance, and the config, before a step."""
        if not self._needed:
            return
        data = config_json(find_pretrained(pruner.model)[1].config)
        config = {field: value for field, value in data.items() if field not in OF_NO_EFFECT}
        what = (type(pruner).__name__, type(pruner.importance).__name__, repr(config))
        self.on(f"the start of {step(pruner, 1)}", [("the settings", repr(what))])

    def on_groups(
        self, pruner: Any, groups: Iterable[GroupCut], failure: Exception | None = None
    ) -> None:
        """Compare the channels that are pruned.

        ``failure``: why this rank cannot; all ranks raise then, this one its own error.
        """
        parts = (
            (group.layers[0].name, _digest([vars(layer) for layer in group.layers]))
            for group in groups
            if group.layers
        )
        self.on(step(pruner), parts, failure)

    def on_refits(self, pruner: Any, refits: Refits) -> None:
        """Compare which weights are refitted."""
        used = [(layer.weight, layer.part) for layer in refits.layers if layer.used]
        self.on(f"the refits of {step(pruner)}", [("which weights are refitted", _digest(used))])

    def on(self, when: str, parts: _Parts = (), failure: Exception | None = None) -> None:
        """Compare anything else.

        Args:
            when: where this rank is.
            parts: what it does, and digests of how.
            failure: why this rank cannot; all ranks raise then, this one its own error.
        """
        if not self._needed:
            if failure is not None:
                raise failure
            return
        text = "" if failure is None else in_one_line(failure)
        refusal = differing(Decision(when, tuple(parts), text))
        if failure is not None:
            raise failure
        if refusal is not None:
            raise TrainingError(f"{refusal.reason}. {self._untouched}")


def step(pruner: Any, more: int = 0) -> str:
    """Return the number of a pruner's step as text."""
    return f"step {pruner.current_step + more}"


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
