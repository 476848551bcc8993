"""Find tensors that the config ties but that the files hold twice, with different numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from .assess import Assessment
from .building import Classes
from .headers import Stored

_PIECE = 4096  # bytes of a sample
_PIECES = 16  # samples of a tensor


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

    Only samples of the data are compared.

    ``assessment``: how the tensors load, with the names that the model ties.
    """
    prefix = classes.model.base_model_prefix
    for group in dict.fromkeys(assessment.tied.values()):
        names = sorted(name for name in group if name in assessment.loaded.shapes)
        stored = [(name, _stored(name, tensors, prefix)) for name in names]
        located = [
            (name, tensor)
            for name, tensor in stored
            if tensor is not None and tensor.start is not None
        ]
        for (first, a), (second, b) in itertools.pairwise(located):
            if (a.dtype, a.shape) != (b.dtype, b.shape) or _differ(folder, a, b):
                return first, second
    return None


def _stored(name: str, tensors: Mapping[str, Stored], prefix: str) -> Stored | None:
    """Return the stored tensor of a name, with or without the base model's prefix, or None."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in tensors:
            return tensors[candidate]
    return None


def _differ(folder: Path, a: Stored, b: Stored) -> bool:
    """True if samples of two tensors of one size differ; samples come from everywhere in them."""
    last = max(a.bytes - _PIECE, 0)
    starts = sorted({last * part // (_PIECES - 1) for part in range(_PIECES)})
    try:
        with (
            (folder / a.file).open("rb") as first_file,
            (folder / b.file).open("rb") as second_file,
        ):
            for start in starts:
                length = min(_PIECE, a.bytes - start)
                first_file.seek((a.start or 0) + start)
                second_file.seek((b.start or 0) + start)
                if first_file.read(length) != second_file.read(length):
                    return True
    except OSError:
        return False
    return False
