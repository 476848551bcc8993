"""Find tensors that the config ties but that the files hold twice, with different numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .assess import Assessment
from .building import Classes
from .headers import Stored

_SAMPLES = 16  # rows of a tensor


def not_untied(names: tuple[str, str], classes: Classes) -> str:
    """Return the sentence on two tensors that differ, and that the class ties in any config."""
    first, second = names
    return (
        f"the config ties {first} and {second}, which hold different numbers, and no setting of "
        f"{classes.config.__name__} unties them"
    )


def differing_tie(
    folder: Path, classes: Classes, assessment: Assessment, tensors: Mapping[str, Stored]
) -> tuple[str, str] | None:
    """Return two names that the model ties and whose data differ in the files, or None.

    Only some rows are compared.

    ``assessment``: how the tensors load, with the names that the model ties.
    """
    prefix = classes.model.base_model_prefix
    for group in dict.fromkeys(assessment.tied.values()):
        names = sorted(name for name in group if name in assessment.loaded.shapes)
        stored = [(name, _stored(name, tensors, prefix)) for name in names]
        located = [(name, key) for name, key in stored if key is not None]
        for (first, a), (second, b) in itertools.pairwise(located):
            if _differ(folder, {a: tensors[a], b: tensors[b]}):
                return first, second
    return None


def _stored(name: str, tensors: Mapping[str, Stored], prefix: str) -> str | None:
    """Return the name in the files, with or without the base model's prefix, or None."""
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((candidate for candidate in candidates if candidate in tensors), None)


def _differ(folder: Path, pair: Mapping[str, Stored]) -> bool:
    """True if two tensors of safetensors files differ in some of their rows, or in their shape."""
    if not all(stored.file.endswith(".safetensors") for stored in pair.values()):
        return False
    first, *others = ((stored.dtype, stored.shape) for stored in pair.values())
    if any(other != first for other in others):
        return True
    rows = first[1][0] if first[1] else 0
    wanted = sorted({(rows - 1) * part // (_SAMPLES - 1) for part in range(_SAMPLES) if rows})
    try:
        with ExitStack() as stack:
            parts = [
                stack.enter_context(safe_open(folder / stored.file, framework="pt")).get_slice(name)
                for name, stored in pair.items()
            ]
            return any(not torch.equal(*(part[row : row + 1] for part in parts)) for row in wanted)
    except (OSError, RuntimeError, SafetensorError):  # as for a file that is too large to map
        return False
