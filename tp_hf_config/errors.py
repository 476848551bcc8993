"""The exceptions of this library: one class for each kind of failure.

Every message says what was found, what was expected, which layer or field it concerns and what to
do next.  Inner functions return reasons; only functions at the edges of the library raise.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


def in_one_line(error: BaseException) -> str:
    """Return an exception's text without line breaks; its class's name if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def listed(items: Sequence[object], separator: str = ", ") -> str:
    """Return the first three items as text, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return separator.join(map(str, items[:3])) + more


def as_range(values: Sequence[Any]) -> str:
    """Return values as their range: ``96`` or ``61..69``."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}..{high}"


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint to append to a message: the known name that is spelled most like ``name``.

    Args:
        name: a name that is not known.
        known: the names that are.

    Returns:
        ``" (did you mean NAME?)"``, or an empty text if no known name is close.
    """
    return "".join(
        f" (did you mean {match}?)" for match in get_close_matches(name, list(known), n=1)
    )


class TPHFConfigError(Exception):
    """Base class of every error this library raises on purpose."""


class UnsupportedModelError(TPHFConfigError):
    """The library cannot prune this model or this field; raised before anything is pruned."""


class UnknownFieldError(UnsupportedModelError):
    """No width of the model has a field of this name; on the command line that is wrong usage."""


class PipelineError(TPHFConfigError):
    """The pipeline could not read, prune or write a model folder; nothing was written."""


class CalibrationError(TPHFConfigError):
    """A model cannot be measured on this data, or what was measured does not fit the model.

    Raised before anything is pruned.
    """


class TrainingError(TPHFConfigError):
    """A model cannot be pruned in this training run or with this optimizer.

    Raised before anything is pruned, unless the message says otherwise.
    """


class ConfigSyncError(TPHFConfigError):
    """No config of this class builds the pruned model.

    Raised before anything is written: the config is unchanged and the model is as the pruner left
    it.

    Attributes:
        conflicts: the fields that would need several values at once, as field -> value -> the
            layers that need this value:
            ``{"intermediate_size": {64: ["model.layers.0..."], 48: [...]}}``.
    """

    def __init__(self, message: str, conflicts: dict[str, dict[int, list[str]]] | None = None):
        super().__init__(message)
        self.conflicts = conflicts or {}


class CheckpointError(TPHFConfigError):
    """A folder cannot be checked, repaired or verified; nothing in it was changed.

    Attributes:
        candidates: the configs that fit equally well, each as field -> value: pass one of them as
            ``given=`` to :func:`~tp_hf_config.repair_checkpoint`.
    """

    def __init__(self, message: str, candidates: Sequence[dict[str, int]] = ()):
        super().__init__(message)
        self.candidates = tuple(candidates)


class CalibrationWarning(UserWarning):
    """Data says less about a model than it should; the message says what to do."""


class PrunerSettingsWarning(UserWarning):
    """A pruner's settings do something else than they seem to do; nothing is pruned yet."""


def warn(message: str, category: type[UserWarning] = PrunerSettingsWarning) -> None:
    """Warn the first caller outside this package and Torch-Pruning."""
    package, depth, frame = __name__.partition(".")[0], 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        package,
        "contextlib",
        "functools",
        "torch_pruning",
    ):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, category, stacklevel=depth)
