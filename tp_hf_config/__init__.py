"""Keep the config of a Hugging Face model true while Torch-Pruning prunes the model.

``HFConfigSyncHook()`` goes into any Torch-Pruning pruner's constructor; after every step
``model.config`` says what the weights are, so that ``save_pretrained`` and ``from_pretrained`` give
back the same model, logit for logit.
"""

from __future__ import annotations

from .errors import (
    CheckpointError,
    ConfigSyncError,
    PrunerSettingsWarning,
    TPHFConfigError,
    TracingError,
    UnsupportedModelError,
)
from .hook import HFConfigSyncHook
from .pruners import Handle, PrunerHook, disable, enable, register
from .report import SyncReport

__all__ = [
    "CheckReport",
    "CheckpointError",
    "ConfigSyncError",
    "HFConfigSyncHook",
    "Handle",
    "Plan",
    "Prunable",
    "PrunerHook",
    "PrunerSettingsWarning",
    "RepairReport",
    "RoundtripReport",
    "Support",
    "SyncReport",
    "TPHFConfigError",
    "TracingError",
    "UnsupportedModelError",
    "Width",
    "check_checkpoint",
    "disable",
    "enable",
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

_CHECKPOINT = {
    "CheckReport": "reports",
    "RepairReport": "reports",
    "RoundtripReport": "reports",
    "check_checkpoint": "check",
    "repair_checkpoint": "repair",
    "verify_checkpoint": "verify",
    "verify_roundtrip": "verify",
}


def __getattr__(name: str) -> object:
    if name == "pruner_kwargs":  # what an import alone does not need is loaded when it is used
        from .prepare import pruner_kwargs

        return pruner_kwargs
    if name in ("Prunable", "Width", "prunable"):
        from . import offers

        return getattr(offers, name)
    if name in ("Support", "supports"):
        from . import support

        return getattr(support, name)
    if name == "plan":
        from .planning import plan

        return plan
    if name == "Plan":
        from .plans import Plan

        return Plan
    if name in _CHECKPOINT:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.checkpoint.{_CHECKPOINT[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


enable()
