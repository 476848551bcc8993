"""Cut a copy of a model, with refits or without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from transformers import PreTrainedModel as Model

from tp_hf_config import Calibration, HFConfigSyncHook
from tp_hf_config.calibration.measured import Readings

MakeImportance = Callable[[Model, Calibration], Any]
"""Gets the copy that is about to be pruned, and what its weights read."""
_OF_HOOK = ("prune", "ratios", "gqa", "target")
"""Those of a cut's settings that are the hook's; the others are the pruner's."""


class _OfACopy(Calibration):
    """What was measured of a model, for an equal copy of it that takes one pruning step."""

    def __init__(self, measured: Calibration, model: Model):
        super().__init__(
            model, measured.train, measured.held_out, measured.ridge, measured.max_memory
        )
        self.readings = copy.deepcopy(measured.readings)

    def current(self) -> Readings:
        """Return what was measured: the step chooses, and solves refits, before it cuts."""
        return self.readings


def pruned(
    model: Model,
    settings: Mapping[str, Any],
    importance: MakeImportance,
    measured: Calibration,
    refit: bool,
    seed: int = 0,
) -> tuple[Model, Any]:
    """Return a cut copy of a model, and what its refits came to (``None``: there are none)."""
    torch.manual_seed(seed)  # importance may be random
    cut = copy.deepcopy(model)
    calibration = _OfACopy(measured, cut)
    of_hook = {name: value for name, value in settings.items() if name in _OF_HOOK}
    hook = HFConfigSyncHook(**of_hook, refit=calibration if refit else None)
    pruner = tp.pruner.MetaPruner(
        cut,
        example_inputs=None,
        importance=importance(cut, calibration),
        hooks=[hook],
        # exactly the widths that the tables have
        **{"round_to": 1, **{n: v for n, v in settings.items() if n not in _OF_HOOK}},
    )
    pruner.step()
    cut.zero_grad()
    report = hook.last_report
    return cut, None if report is None else report.refits


def both_ways(
    model: Model,
    settings: Mapping[str, Any],
    importance: MakeImportance,
    measured: Calibration,
    score: Callable[[Model], dict[str, float]],
    seed: int,
) -> dict[str, Any]:
    """Return the row of a cut: how good the model is with the cut only, and refitted."""
    cut, _ = pruned(model, settings, importance, measured, False, seed)
    row: dict[str, Any] = {
        "widths": changed(model, cut),
        "parameters": cut.num_parameters(),
        "cut": score(cut),
    }
    del cut
    refitted, found = pruned(model, settings, importance, measured, True, seed)
    row["refitted"] = score(refitted)
    row["refits"] = {
        "weights": len(found.layers),
        "used": sum(layer.used for layer in found.layers),
        "measure": found.measure,
        "cut": found.cut,
        "refit": found.refit,
        "after": found.after,
        "seconds": found.seconds,
        "notes": list(found.notes),
    }
    return row


def changed(model: Model, cut: Model) -> dict[str, list[Any]]:
    """Return config field -> its value before and after, where they differ."""
    before, after = model.config.to_dict(), cut.config.to_dict()
    return {
        key: [value, after[key]]
        for key, value in before.items()
        if isinstance(value, int) and value != after.get(key)
    }
