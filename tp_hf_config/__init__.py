"""Prunes any Hugging Face model with Torch-Pruning and keeps config.json correct.

So the smaller model loads with ``from_pretrained``, and computes the same logits as before it was
saved. Pass ``hooks=[HFConfigSyncHook()]`` to the constructor of any Torch-Pruning pruner. After
every step, ``model.config`` matches the weights.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import (
    CalibrationError,
    CalibrationWarning,
    CheckpointError,
    ConfigSyncError,
    PipelineError,
    PrunerSettingsWarning,
    TPHFConfigError,
    TrainingError,
    UnsupportedModelError,
)
from .when_imported import when_imported

if TYPE_CHECKING:
    from .calibration.calibrate import Calibration, calibrate
    from .checkpoint.check import check_checkpoint, repair_checkpoint
    from .checkpoint.reports import CheckReport, RepairReport, RoundtripReport
    from .checkpoint.verify import verify_checkpoint, verify_roundtrip
    from .graph.cut_list import CutList
    from .graph.prunable import Prunable, Width, prunable
    from .hook.drop_layers import DroppedLayers, drop_layers
    from .hook.hook import HFConfigSyncHook
    from .hook.registration import Handle, PrunerHook
    from .hook.report import SyncReport
    from .hook.trainer.callback import PruningCallback
    from .hook.trainer.optimizer import optimizer_follows
    from .pipeline.export import export
    from .pipeline.folders import apply_cuts, save_sharded
    from .pipeline.job import Exported
    from .pipeline.speed import Speed, measure_speed
    from .pipeline.support import Support, supports
    from .planning.allocate import Allocation, LayerCurve, allocate
    from .planning.make_plan import plan
    from .planning.plan import Plan

__all__ = [
    "Allocation",
    "Calibration",
    "CalibrationError",
    "CalibrationWarning",
    "CheckReport",
    "CheckpointError",
    "ConfigSyncError",
    "CutList",
    "DroppedLayers",
    "Exported",
    "HFConfigSyncHook",
    "Handle",
    "LayerCurve",
    "PipelineError",
    "Plan",
    "Prunable",
    "PrunerHook",
    "PrunerSettingsWarning",
    "PruningCallback",
    "RepairReport",
    "RoundtripReport",
    "Speed",
    "Support",
    "SyncReport",
    "TPHFConfigError",
    "TrainingError",
    "UnsupportedModelError",
    "Width",
    "allocate",
    "apply_cuts",
    "calibrate",
    "check_checkpoint",
    "drop_layers",
    "export",
    "measure_speed",
    "optimizer_follows",
    "plan",
    "prunable",
    "repair_checkpoint",
    "save_sharded",
    "supports",
    "verify_checkpoint",
    "verify_roundtrip",
]
__version__ = "0.1.0"

_LOADED_WHEN_USED = {  # lazy: importing torch alone takes longer than a shell command may take
    "calibration.calibrate": ("Calibration", "calibrate"),
    "checkpoint.check": ("check_checkpoint", "repair_checkpoint"),
    "checkpoint.reports": ("CheckReport", "RepairReport", "RoundtripReport"),
    "checkpoint.verify": ("verify_checkpoint", "verify_roundtrip"),
    "hook.drop_layers": ("DroppedLayers", "drop_layers"),
    "hook.hook": ("HFConfigSyncHook",),
    "graph.cut_list": ("CutList",),
    "graph.prunable": ("Prunable", "Width", "prunable"),
    "hook.trainer.optimizer": ("optimizer_follows",),
    "planning.allocate": ("Allocation", "LayerCurve", "allocate"),
    "planning.make_plan": ("plan",),
    "planning.plan": ("Plan",),
    "hook.registration": ("Handle", "PrunerHook"),
    "hook.report": ("SyncReport",),
    "pipeline.export": ("export",),
    "pipeline.job": ("Exported",),
    "pipeline.folders": ("apply_cuts", "save_sharded"),
    "pipeline.speed": ("Speed", "measure_speed"),
    "pipeline.support": ("Support", "supports"),
    "hook.trainer.callback": ("PruningCallback",),
}


def __getattr__(name: str) -> object:
    for module, names in _LOADED_WHEN_USED.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Pruners accept hooks= once both packages are imported, in either order.
when_imported("torch_pruning", f"{__name__}.hook.registration")
