"""Keep the config of a Hugging Face model true while Torch-Pruning prunes the model.

``HFConfigSyncHook()`` goes into any Torch-Pruning pruner's constructor; after every step
``model.config`` says what the weights are, so that ``save_pretrained`` and ``from_pretrained`` give
back the same model, logit for logit.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import (
    CheckpointError,
    ConfigSyncError,
    PipelineError,
    PrunerSettingsWarning,
    TPHFConfigError,
    TracingError,
    TrainingError,
    UnsupportedModelError,
)
from .imports import when_imported

if TYPE_CHECKING:
    from .checkpoint.check import check_checkpoint
    from .checkpoint.repair import repair_checkpoint
    from .checkpoint.reports import CheckReport, RepairReport, RoundtripReport
    from .checkpoint.verify import verify_checkpoint, verify_roundtrip
    from .hook import HFConfigSyncHook
    from .offers import Prunable, Width, prunable
    from .optimizers import optimizer_follows
    from .planning import plan
    from .plans import Plan
    from .prepare import pruner_kwargs
    from .pruners import Handle, PrunerHook, disable, enable, register
    from .report import SyncReport
    from .support import Support, supports
    from .training import PruningCallback

__all__ = [
    "CheckReport",
    "CheckpointError",
    "ConfigSyncError",
    "HFConfigSyncHook",
    "Handle",
    "PipelineError",
    "Plan",
    "Prunable",
    "PrunerHook",
    "PrunerSettingsWarning",
    "PruningCallback",
    "RepairReport",
    "RoundtripReport",
    "Support",
    "SyncReport",
    "TPHFConfigError",
    "TracingError",
    "TrainingError",
    "UnsupportedModelError",
    "Width",
    "check_checkpoint",
    "disable",
    "enable",
    "optimizer_follows",
    "plan",
    "prunable",
    "pruner_kwargs",
    "register",
    "repair_checkpoint",
    "supports",
    "verify_checkpoint",
    "verify_roundtrip",
]
__version__ = "0.1.0"

_LOADED_WHEN_USED = {  # torch alone takes longer to load than a shell command should to answer
    "checkpoint.check": ("check_checkpoint",),
    "checkpoint.repair": ("repair_checkpoint",),
    "checkpoint.reports": ("CheckReport", "RepairReport", "RoundtripReport"),
    "checkpoint.verify": ("verify_checkpoint", "verify_roundtrip"),
    "hook": ("HFConfigSyncHook",),
    "offers": ("Prunable", "Width", "prunable"),
    "optimizers": ("optimizer_follows",),
    "planning": ("plan",),
    "plans": ("Plan",),
    "prepare": ("pruner_kwargs",),
    "pruners": ("Handle", "PrunerHook", "disable", "enable", "register"),
    "report": ("SyncReport",),
    "support": ("Support", "supports"),
    "training": ("PruningCallback",),
}


def __getattr__(name: str) -> object:
    for module, names in _LOADED_WHEN_USED.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Pruners take hooks= from the moment that both are imported, whichever comes first.
when_imported("torch_pruning", f"{__name__}.pruners")
