"""A language model that is ranked by the size of its weights is warned of, and no other."""

from __future__ import annotations

import re
import warnings
from typing import Any

import calibrated
import pytest
import torch_pruning as tp
import zoo

from tp_hf_config import CalibrationWarning, HFConfigSyncHook, calibrate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_magnitude_on_a_language_model_is_warned_of() -> None:
    advice = (
        "GroupMagnitudeImportance ranks LlamaForCausalLM by the size of its weights, which often "
        "removes the channels that a language model needs most. Rank the channels by their "
        "activations on data: calibration = tp_hf_config.calibrate(model), "
        "importance=calibration.importance(), hooks=[HFConfigSyncHook(refit=calibration)]"
    )
    importance = tp.importance.GroupMagnitudeImportance()
    with pytest.warns(CalibrationWarning, match=re.escape(advice)) as told:
        calibrated.pruner_of(zoo.build("llama"), importance=importance)
    assert [one.filename for one in told] == [calibrated.__file__]


@pytest.mark.parametrize("name", ["bert", "vit", "t5", "llama"])
def test_others_are_not(name: str) -> None:
    model = zoo.build(name)
    importance: Any = tp.importance.GroupMagnitudeImportance()
    hook = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "llama":  # what refits needs no other ranking
            hook = HFConfigSyncHook(refit=calibrate(model, calibrated.batches(model, 2)))
        warnings.simplefilter("error", CalibrationWarning)
        calibrated.pruner_of(model, hook, importance=importance)
        taylor = tp.importance.GroupTaylorImportance()
        calibrated.pruner_of(zoo.build(name), importance=taylor)
