"""The exceptions of this library, and parts of their messages.

A message says what was found, what was expected, where, and what to do next. Inner functions return
reasons; only public functions raise.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


def in_one_line(error: BaseException) -> str:
    """Return an exception's text without line breaks, or its class name."""
    return " ".join(str(error).split()) or type(error).__name__


def listed(items: Sequence[object], separator: str = ", ") -> str:
    """Return the first three items as text, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return separator.join(map(str, items[:3])) + more


def as_range(values: Sequence[Any]) -> str:
    """Return the range of values: ``96`` or ``61..69``."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}..{high}"


def closest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean NAME?)"`` for the most similar known name, or ``""``."""
    return "".join(
        f" (did you mean {match}?)" for match in get_close_matches(name, list(known), n=1)
    )


class TPHFConfigError(Exception):
    """Base class of every error that this library raises on purpose."""


class UnsupportedModelError(TPHFConfigError):
    """The library cannot prune this model or this field; raised before anything is pruned."""


class UnknownFieldError(UnsupportedModelError):
    """No width of the model has a field of this name; a usage error on the command line."""


class PipelineError(TPHFConfigError):
    """A model folder cannot be read, pruned or written; nothing was written."""


class CalibrationError(TPHFConfigError):
    """A model cannot be measured on this data, or a measurement does not fit it.

    Raised before anything is pruned.
    """


class TrainingError(TPHFConfigError):
    """A model cannot be pruned in this training run or with this optimizer.

    Raised before anything is pruned, unless the message says otherwise.
    """


class ConfigSyncError(TPHFConfigError):
    """No config of this class builds the pruned model.

    Raised before anything is written: the config does not change, and the model is as the pruner
    left it.

    Attributes:
        conflicts: fields that would need several values at once: field -> value -> layers that need
            it, such as ``{"intermediate_size": {64: ["model.layers.0..."], 48: [...]}}``.
    """

    def __init__(self, message: str, conflicts: dict[str, dict[int, list[str]]] | None = None):
        super().__init__(message)
        self.conflicts = conflicts or {}


class CheckpointError(TPHFConfigError):
    """A folder cannot be checked, repaired or verified; nothing in it was changed.

    Attributes:
        candidates: configs that fit equally well, each as field -> value. Pass one of them to
            :func:`~tp_hf_config.repair_checkpoint` as ``given=``.
    """

    def __init__(self, message: str, candidates: Sequence[dict[str, int]] = ()):
        super().__init__(message)
        self.candidates = tuple(candidates)


class CalibrationWarning(UserWarning):
    """Data says less about a model than it should; the message says what to do."""


class PrunerSettingsWarning(UserWarning):
    """A pruner's settings have another effect than they seem to; nothing is pruned yet."""


def warn(message: str, category: type[UserWarning] = PrunerSettingsWarning) -> None:
    """Warn with the stack level of the first caller outside this package and Torch-Pruning."""
    package, depth, frame = __name__.partition(".")[0], 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        package,
        "contextlib",
        "functools",
        "torch_pruning",
    ):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, category, stacklevel=depth)
