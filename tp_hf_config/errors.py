"""What can go wrong, as exceptions a caller can tell apart.

Every message says what was found, what was expected, which layer or field it concerns and what to
do next.  Inner functions return reasons; only the edges of the library raise.
"""

from __future__ import annotations

from collections.abc import Sequence


class TPHFConfigError(Exception):
    """Base class of every error this library raises on purpose."""


class UnsupportedModelError(TPHFConfigError):
    """The model cannot be followed at all; raised before anything is pruned."""


class UnknownFieldError(UnsupportedModelError):
    """A name that no width of the model has; on the command line that is wrong usage."""


class TracingError(TPHFConfigError):
    """Torch-Pruning cannot trace this model; raised before anything is pruned."""


class PipelineError(TPHFConfigError):
    """A model folder could not be read, pruned as asked, or written; nothing was written."""


class TrainingError(TPHFConfigError):
    """A model cannot be pruned in this training run, or not with this optimizer.

    Raised before anything is pruned, unless the message says otherwise.
    """


class ConfigSyncError(TPHFConfigError):
    """No config of this class builds the pruned model.

    Raised before anything is written: the config is as it was and the model is as the pruner left
    it.

    Attributes:
        conflicts: the fields that need several values at once, each with the layers that need
            them: ``{"intermediate_size": {64: ["model.layers.0..."], 48: [...]}}``.
    """

    def __init__(self, message: str, conflicts: dict[str, dict[int, list[str]]] | None = None):
        super().__init__(message)
        self.conflicts = conflicts or {}


class CheckpointError(TPHFConfigError):
    """A folder cannot be checked, repaired or verified; nothing in it was changed.

    Attributes:
        candidates: the configs that fit equally well, as ``given=`` of
            :func:`~tp_hf_config.repair_checkpoint` takes them.
    """

    def __init__(self, message: str, candidates: Sequence[dict[str, int]] = ()):
        super().__init__(message)
        self.candidates = tuple(candidates)


class PrunerSettingsWarning(UserWarning):
    """A pruner's settings have another effect than they seem to have; nothing is pruned yet."""
